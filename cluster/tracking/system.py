"""System metrics of every node of the cluster during a run, as MLflow's ``system/NODE/…``.

A small Ray actor on each node samples it, including nodes that only decode. Failures of these actors or of
MLflow do not affect the run.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

from cluster.tracking import client
from cluster.tracking.run import RunHandle, one_line_error
from gare.config import TrackingConfig

logger = logging.getLogger(__name__)

#: Seconds between checks for nodes that have joined or left.
LOOK_EVERY_S = 30.0
#: Seconds that the end of a run waits for the last samples.
PATIENCE_S = 5.0


class NodeSampler:
    """Samples this machine in a thread until it is told to stop.

    Args:
        handle: run that gets the samples.
        node: name of the machine, part of the metrics' names.
        every_s: seconds between samples.
    """

    def __init__(self, handle: RunHandle, node: str, every_s: float) -> None:
        self._handle, self._node, self._every_s = handle, node_key(node), every_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
        self._thread.start()

    def is_up(self) -> bool:
        """Returns once the actor has started."""
        return True

    def stop(self) -> None:
        """Stops sampling; waits a little for samples that are being sent."""
        self._done.set()
        self._thread.join(PATIENCE_S)

    def _run(self) -> None:
        try:
            self._sample()
        except Exception as error:
            logger.warning("no system metrics of %s from now on: %s", self._node, one_line_error(error))

    def _sample(self) -> None:
        import psutil

        psutil.cpu_percent()  # starts the interval that the next call measures
        # A short run ends here without ever importing MLflow.
        if self._done.wait(self._every_s):
            return
        monitor = client.system_monitor(self._handle.tracking_uri, self._handle.run_id, self._node)
        step = monitor._logging_step
        while True:
            monitor.collect_metrics()
            found = {f"system/{self._node}/{name}": value for name, value in _means(monitor).items()}
            self._handle.log_metrics(found, step)
            step += 1
            if self._done.wait(self._every_s):
                return


def _means(monitor: Any) -> dict[str, float]:
    found: dict[str, float] = monitor.aggregate_metrics()
    for one in monitor.monitors:
        one.clear_metrics()
    return found


def node_key(name: str) -> str:
    """Returns a node's name in the form that metric names allow."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)[:100].strip(".") or "node"


@contextlib.contextmanager
def system_metrics(handle: RunHandle, config: TrackingConfig) -> Iterator[None]:
    """Logs the system metrics of every node to the run inside the context; needs Ray. Never raises.

    Args:
        handle: run that gets the metrics.
        config: switch and interval of the samples.
    """
    if not config.system_metrics:
        yield
        return
    samplers = _Samplers(handle, config.system_metrics_every_s)
    try:
        yield
    finally:
        samplers.stop()


class _Samplers:
    """An actor on each node; follows nodes that join or leave."""

    def __init__(self, handle: RunHandle, every_s: float) -> None:
        self._handle, self._every_s = handle, every_s
        self._actors: dict[str, tuple[Any, Any]] = {}
        self._done = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._keep_looking, name="system-metrics-nodes", daemon=True)
        self._thread.start()

    def _keep_looking(self) -> None:
        while not self._done.wait(LOOK_EVERY_S):
            self._look()

    def _look(self) -> None:
        try:
            import ray
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            alive = {one["NodeID"]: one for one in ray.nodes() if one["Alive"]}
            self._actors = {node: one for node, one in self._actors.items() if node in alive}
            for node, about in alive.items():
                if node not in self._actors:
                    here = NodeAffinitySchedulingStrategy(node, soft=False)
                    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
                    sampler: Any = ray.remote(max_restarts=2, **options)(NodeSampler)
                    actor = sampler.remote(self._handle, node_name(about), self._every_s)
                    self._actors[node] = (actor, actor.is_up.remote())
        except Exception as error:
            logger.warning("no system metrics of new nodes: %s", one_line_error(error))

    def stop(self) -> None:
        self._done.set()
        try:
            self._thread.join(PATIENCE_S)
            import ray

            # An actor that is still starting has nothing to send.
            started = [actor for actor, is_up in self._actors.values() if ray.wait([is_up], timeout=0)[0]]
            if started:
                stopping = [actor.stop.remote() for actor in started]
                ray.wait(stopping, num_returns=len(stopping), timeout=PATIENCE_S)
            for actor, _ in self._actors.values():
                ray.kill(actor)
        except Exception as error:
            logger.warning("system metrics were not ended cleanly: %s", one_line_error(error))


def node_name(about: dict[str, Any]) -> str:
    """Returns the node's given name (``ray start --node-name``), else its host name.

    Args:
        about: the node's entry of ``ray.nodes()``.
    """
    name, host = str(about.get("NodeName") or ""), str(about.get("NodeManagerHostname") or "")
    given = name and name != about.get("NodeManagerAddress")
    return name if given else host or socket.gethostname()
