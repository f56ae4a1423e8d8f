"""Starting or joining Ray, and saying at once what it cannot give."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gare.config import ClusterConfig
from gare.errors import ConfigError, GareError

logger = logging.getLogger(__name__)

#: Object store of a local Ray; frames are small and a laptop's memory is not ours alone.
LOCAL_OBJECT_STORE_BYTES = 512 * 1024**2
#: CPUs of the actor that loads a training worker's data: reading stored frames is short work beside training.
LOADER_CPUS = 0.25


@contextmanager
def ray_session(config: ClusterConfig) -> Iterator[None]:
    """Joins the cluster that the configuration or RAY_ADDRESS names, else starts a local Ray; ends it after.

    A session that is open already is used and left open, so that the demo's steps share one.

    A fault of ours that comes back from Ray inside its own exceptions leaves the session as itself.

    Raises:
        GareError: where a named cluster cannot be joined.
    """
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    _set_environment(local=not address)
    import ray

    if ray.is_initialized():
        quiet_data()
        with _own_faults():
            yield
        return
    quiet = {"logging_level": logging.WARNING, "log_to_driver": True, "configure_logging": False}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            # "local" never joins a cluster that happens to run on this machine.
            ray.init(
                address="local",
                num_cpus=config.num_cpus or max(2, os.cpu_count() or 2),
                # Ray Train asks the dashboard's state service whether its controller lives.
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=0,
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                **quiet,
            )
    except Exception as error:  # Ray raises Exception itself where a process of its own does not start
        raise GareError(
            f"Ray cannot be {'reached' if address else 'started'}: {error}",
            where=address or "cluster.address is empty",
            accepted="a running cluster (ray start --head) with its token in RAY_AUTH_TOKEN or ~/.ray"
            if address
            else "a machine that is less busy, or the address of a running cluster",
        ) from error
    try:
        quiet_data()
        with _own_faults():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _own_faults() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        fault = fault_of(error)
        if fault is None or fault is error:
            raise
        # Not chained: Ray's message holds the worker's trace, and the fault says what a person needs.
        raise fault from None


def fault_of(error: BaseException) -> GareError | None:
    """The fault of ours at the bottom of an exception from Ray, which wraps what its workers raise."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    wrapped: GareError | None = None
    while pending:
        inner = pending.pop(0)
        if inner is None or id(inner) in seen:
            continue
        seen.add(id(inner))
        # Ray makes classes that derive from the cause's and whose text is a trace: the cause itself is meant.
        cause = getattr(inner, "cause", None)
        if isinstance(inner, GareError) and not isinstance(cause, BaseException):
            return inner
        wrapped = wrapped or (inner if isinstance(inner, GareError) else None)
        pending += [cause] if isinstance(cause, BaseException) else []
        pending += [inner.__cause__, *getattr(inner, "worker_failures", {}).values()]
    return wrapped


def _set_environment(*, local: bool) -> None:
    """What Ray reads when it is imported; nothing that the person has set is replaced."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    # Ray has read its mode when it was imported; one that its children then read elsewhere locks it out.
    if not local or "ray" in sys.modules:
        return
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    has_token = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if not has_token and not (Path.home() / ".ray" / "auth_token").exists():
        # A token of this session alone; Ray would otherwise write one to the home folder, readable by all.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def watches_preemption() -> bool:
    """Whether Ray Train looks for nodes that are about to be taken away; not on a local Ray."""
    return os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") not in ("0", "false", "False")


def quiet_data() -> None:
    """Leaves of Ray Data's reports only its warnings; the pipelines print one line of their own."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Its import set these up anew. The file in Ray's session folder still gets everything.
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
    # Warns that the bars are off.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def num_cpus() -> int:
    """CPUs that the cluster has, whoever uses them now."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def num_gpus() -> int:
    """GPUs that the cluster has."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def require_train_resources(config: ClusterConfig) -> None:
    """Makes sure that the training workers fit, each with the actor that loads its data.

    Raises:
        ConfigError: for more than the cluster has at all.
        GareError: where other jobs still hold it after ``cluster.wait_s``.
    """
    import ray

    needed = {"CPU": config.train_workers * (config.cpus_per_worker + LOADER_CPUS)}
    if config.use_gpu:
        needed["GPU"] = float(config.train_workers)
    total = ray.cluster_resources()
    for kind, amount in needed.items():
        if total.get(kind, 0) < amount:
            raise ConfigError(
                f"{config.train_workers} workers of {config.cpus_per_worker:g} CPU"
                f"{' and 1 GPU' if config.use_gpu else ''}, each with {LOADER_CPUS:g} CPU to load its data, "
                f"need {amount:g} {kind}, the cluster has {total.get(kind, 0):g}",
                where="cluster.train_workers",
                accepted="fewer workers, a smaller cluster.cpus_per_worker or a larger cluster",
            )
    deadline = time.monotonic() + config.wait_s
    while lacking := _lacking(needed):
        if time.monotonic() >= deadline:
            raise GareError(
                f"other jobs hold {lacking}, still after {config.wait_s:g} s",
                where="cluster",
                accepted="end them, wait longer (cluster.wait_s), or ask for less",
            )
        logger.warning("waiting for %s that other jobs hold", lacking)
        time.sleep(min(5.0, max(0.1, deadline - time.monotonic())))


def _lacking(needed: dict[str, float]) -> str:
    import ray

    free = ray.available_resources()
    return " and ".join(
        f"{amount - free.get(kind, 0):g} {kind}"
        for kind, amount in needed.items()
        if free.get(kind, 0) < amount - 1e-6
    )
