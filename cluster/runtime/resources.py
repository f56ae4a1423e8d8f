"""Resources of the cluster: what exists, what each step needs, and requests that can never be met."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.runtime._compat import resources_after_growth
from gare.config import ClusterConfig, Config, ResolvedCluster
from gare.errors import ConfigError, GareError

logger = logging.getLogger(__name__)

#: CPUs reserved for an actor that loads a training worker's data; it is idle while batches wait.
LOADER_CPUS = 0.25
#: Maximum of an automatic number of loaders, more than any step needs; and minimum bytes of a worker's batch
#: for each loader, since a process takes memory and time to start.
MAX_LOADERS, LOADER_BYTES = 16, 4 * 10**6
#: Maximum CPUs of an automatic training worker with a GPU: it only starts kernels and copies.
GPU_WORKER_CPUS = 4
_MEGABYTE = 10**6
_SLACK = 1e-6


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs of a node, both free and in use."""

    cpus: float
    gpus: float


def nodes() -> list[Node]:
    """Returns the nodes that are alive."""
    import ray

    return [
        Node(float(one["Resources"].get("CPU", 0)), float(one["Resources"].get("GPU", 0)))
        for one in ray.nodes()
        if one["Alive"]
    ]


def num_cpus() -> int:
    """Returns the number of the cluster's CPUs, both free and in use."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def num_gpus() -> int:
    """Returns the number of the cluster's GPUs."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def wants_gpus(config: ClusterConfig) -> bool:
    """Returns True if GPUs are to be used; needs Ray only if that is automatic."""
    return config.use_gpu is True or (config.use_gpu == "auto" and num_gpus() > 0)


def usable_gpus(config: ClusterConfig) -> int:
    """Returns the number of GPUs for extraction and evaluation: the free ones, at least 1; 0 without GPUs."""
    import ray

    if not wants_gpus(config):
        return 0
    return min(num_gpus(), max(1, int(ray.available_resources().get("GPU", 0))))


def cluster_address(config: ClusterConfig) -> str:
    """Returns the address of the cluster to join; empty if a local Ray is started for this command."""
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def extraction_cpus(config: ClusterConfig) -> int:
    """Returns the CPUs for extraction: all but those that it leaves for training."""
    total = num_cpus()
    leave = config.leave_cpus
    if leave == "auto":
        leave = 0
        if cluster_address(config):
            resolved = resolve(config, 0, nodes())
            leave = int(min(resolved.train_workers * cpus_of_worker(resolved), total / 4))
    return max(1, total - leave)


def cpus_of_worker(config: ResolvedCluster) -> float:
    """Returns the CPUs reserved for a training worker and for the actors that load its data on its node.

    Ray counts workers by dividing floats, so the share of one must be exact in binary.
    """
    cpus = config.cpus_per_worker + config.loaders_per_worker * LOADER_CPUS
    return math.ceil((cpus - _SLACK) * 4) / 4


def resources_of_worker(config: ResolvedCluster) -> dict[str, float]:
    """Returns the resources that Ray reserves for a training worker."""
    return {"CPU": cpus_of_worker(config)} | ({"GPU": 1.0} if config.use_gpu else {})


def object_store_bytes(config: ClusterConfig) -> int:
    """Returns the object store size of a local Ray; frames are small, and a laptop runs other programs."""
    import psutil

    if config.object_store_mb != "auto":
        return config.object_store_mb * _MEGABYTE
    return int(min(max(0.1 * psutil.virtual_memory().total, 512 * _MEGABYTE), 8192 * _MEGABYTE))


def resolve_resources(config: Config, batch_bytes: int) -> ResolvedCluster:
    """Resolves the automatic values of ``cluster`` for the cluster that this process has joined.

    Args:
        config: the requested configuration.
        batch_bytes: approximate size of the global batch as it is loaded.
    """
    resolved = resolve(config.cluster, config.train.batch_size, nodes(), batch_bytes)
    if resolved.model_dump() == config.cluster.model_dump():
        return resolved
    logger.info(
        "training workers: %d, each with %g CPU%s and %d loader%s; the cluster's nodes: %d with %d CPU and "
        "%d GPU",
        resolved.train_workers,
        resolved.cpus_per_worker,
        " and 1 GPU" if resolved.use_gpu else "",
        resolved.loaders_per_worker,
        "s" * (resolved.loaders_per_worker > 1),
        len(nodes()),
        num_cpus(),
        num_gpus(),
    )
    return resolved


def resolve(
    config: ClusterConfig, batch_size: int, there: Sequence[Node], batch_bytes: float = math.inf
) -> ResolvedCluster:
    """Replaces all automatic values of training by numbers.

    Args:
        config: the requested configuration.
        batch_size: pairs that the workers share, at least one each; 0 for any number.
        there: nodes of the cluster.
        batch_bytes: size of the global batch; a loader needs a minimum share of it to be worth its process.
    """
    on_gpus = config.use_gpu is True or (config.use_gpu == "auto" and any(node.gpus >= 1 for node in there))
    able = [node for node in there if (node.gpus if on_gpus else node.cpus) >= 1] or [Node(1, 0)]
    if config.train_workers == "auto":
        most = int(sum(node.gpus for node in able)) if on_gpus else len(able)
        most = max(most, config.min_workers, 1)
        workers = min(most, batch_size or most)
    else:
        workers = config.train_workers
    if config.cpus_per_worker == "auto":
        cpus = _automatic_cpus(workers, able, on_gpus=on_gpus)
    else:
        cpus = config.cpus_per_worker
    loaders = config.loaders_per_worker
    resolved = ResolvedCluster.model_validate(
        config.model_dump()
        | {
            "train_workers": workers,
            "cpus_per_worker": cpus,
            "loaders_per_worker": 1 if loaders == "auto" else loaders,
            "use_gpu": on_gpus,
        }
    )
    if config.train_workers == "auto" and (room := num_that_fit(resolved, there)):
        resolved = resolved.model_copy(update={"train_workers": max(room, config.min_workers)})
    if loaders != "auto":
        return resolved
    useful = math.ceil(min(batch_bytes / resolved.train_workers / LOADER_BYTES, 99))
    loaders = max(1, min(_loaders_that_fit(resolved, able), useful))
    return resolved.model_copy(update={"loaders_per_worker": loaders})


def _automatic_cpus(workers: int, able: Sequence[Node], *, on_gpus: bool) -> float:
    """Returns half of a training worker's share of the CPUs of the nodes that can hold one."""
    if on_gpus:
        share = min(node.cpus / max(node.gpus, 1) for node in able)
    else:
        share = sum(node.cpus for node in able) / workers
        share = min(share, min(node.cpus for node in able))
    half = share / 2
    cpus = max(0.5, float(math.floor(half)) if half >= 1 else 0.5)
    return min(cpus, float(GPU_WORKER_CPUS)) if on_gpus else cpus


def _loaders_that_fit(config: ResolvedCluster, able: Sequence[Node]) -> int:
    """Returns the number of loaders for which the tightest node has CPUs when full of training workers.

    Args:
        config: with everything but the loaders resolved.
        able: nodes that can hold a training worker.
    """
    spread = config.placement.endswith("spread")
    even = math.ceil(config.train_workers / len(able))
    rooms = []
    for node in able:
        most = node.gpus if config.use_gpu else node.cpus // max(config.cpus_per_worker, _SLACK)
        here = max(1, min(even if spread else config.train_workers, int(most)))
        rooms.append(node.cpus / here - config.cpus_per_worker)
    return max(1, min(int(min(rooms) + _SLACK), MAX_LOADERS))


def require_train_resources(config: ResolvedCluster) -> None:
    """Checks that the training workers fit, each with the actors that load its data.

    Args:
        config: resources of the training.

    Raises:
        ConfigError: for more than the cluster has in total, or can grow to.
        GareError: if other jobs still hold the resources after ``cluster.wait_s``.
    """
    workers = config.min_workers or config.train_workers
    needed = {"CPU": workers * cpus_of_worker(config)}
    if config.use_gpu:
        needed["GPU"] = float(workers)
    grown = _can_grow_to(config)
    there = nodes()
    total = {"CPU": sum(node.cpus for node in there), "GPU": sum(node.gpus for node in there)}
    what = f"{workers} workers of {config.cpus_per_worker:g} CPU{' and 1 GPU' if config.use_gpu else ''}"
    for kind, amount in needed.items():
        most = max(total[kind], grown.get(kind, 0))
        if most < amount - _SLACK:
            growing = f" and can grow to {most:g}" if most > total[kind] else ""
            raise ConfigError(
                f"{what}, each with {cpus_of_worker(config) - config.cpus_per_worker:g} CPU to load its "
                f"data, need {amount:g} {kind}, the cluster has {total[kind]:g}{growing}",
                where="cluster.min_workers" if config.min_workers else "cluster.train_workers",
                accepted="fewer workers, a smaller cluster.cpus_per_worker or a larger cluster",
            )
    is_growing = any(grown.get(kind, 0) > total[kind] for kind in needed)
    if not is_growing and (held := num_that_fit(config, there)) < workers:
        raise ConfigError(
            f"{what} are asked for with placement {config.placement}, and the nodes can hold {held}: "
            f"{', '.join(f'{node.cpus:g} CPU, {node.gpus:g} GPU' for node in there)}",
            where="cluster.cpus_per_worker",
            accepted="fewer CPUs a worker, fewer workers, another cluster.placement or larger nodes",
        )
    _wait_for(config, needed, is_growing=is_growing)


def num_that_fit(config: ResolvedCluster, there: Sequence[Node]) -> int:
    """Returns how many training workers these nodes can hold when idle, at most as many as asked for."""
    each = cpus_of_worker(config)
    rooms = [
        int(min((node.cpus + _SLACK) / each, node.gpus if config.use_gpu else math.inf)) for node in there
    ] or [0]
    if config.placement == "strict_pack":
        room = max(rooms)
    elif config.placement == "strict_spread":
        room = sum(room > 0 for room in rooms)
    else:
        room = sum(rooms)
    return min(room, config.train_workers)


def _can_grow_to(config: ClusterConfig) -> dict[str, float]:
    """Returns the most CPUs and GPUs of an autoscaling cluster; empty for other clusters."""
    given = {"CPU": config.max_cpus, "GPU": config.max_gpus}
    said = resources_after_growth()
    return {kind: float(said.get(kind, 0) if amount == "auto" else amount) for kind, amount in given.items()}


def _wait_for(config: ResolvedCluster, needed: dict[str, float], *, is_growing: bool) -> None:
    """Waits until the needed resources are free, and asks the autoscaler for them meanwhile.

    Raises:
        GareError: after ``cluster.wait_s``.
    """
    if not _lacking(needed):
        return
    if not is_growing:
        _wait(config, needed, "other jobs hold", "that other jobs hold", "end them")
        return
    from ray.autoscaler.sdk import request_resources

    bundle = {"CPU": max(1, math.ceil(cpus_of_worker(config)))} | ({"GPU": 1} if config.use_gpu else {})
    request_resources(bundles=[bundle] * config.train_workers)
    try:
        _wait(config, needed, "the autoscaler has not added", "to be added", "look at its log")
    finally:
        # The request stands until it is withdrawn, and would keep the nodes after the training.
        request_resources(bundles=[])


def _wait(config: ClusterConfig, needed: dict[str, float], failed: str, why: str, help_: str) -> None:
    deadline = time.monotonic() + config.wait_s
    while lacking := _lacking(needed):
        if time.monotonic() >= deadline:
            raise GareError(
                f"{failed} {lacking}, still after {config.wait_s:g} s",
                where="cluster",
                accepted=f"{help_}, wait longer (cluster.wait_s), or ask for less",
            )
        logger.warning("waiting for %s %s", lacking, why)
        time.sleep(min(5.0, max(0.1, deadline - time.monotonic())))


def _lacking(needed: dict[str, float]) -> str:
    import ray

    free = ray.available_resources()
    return " and ".join(
        f"{amount - free.get(kind, 0):g} {kind}"
        for kind, amount in needed.items()
        if free.get(kind, 0) < amount - _SLACK
    )


LOOK_EVERY_S = 30.0


@contextmanager
def warn_while_short_of_nodes(config: ResolvedCluster, every_s: float = LOOK_EVERY_S) -> Iterator[None]:
    """Warns, inside the context, if the remaining nodes cannot hold the workers that training needs.

    Args:
        config: resources of the training.
        every_s: seconds between checks.
    """
    ended = threading.Event()
    fewest = config.min_workers or config.train_workers

    def look() -> None:
        while not ended.wait(every_s):
            try:
                there = nodes()
            except Exception:  # from Ray, whose head may be gone; the training itself reports that
                continue
            held = num_that_fit(config, there)
            if held < fewest:
                logger.warning(
                    "training waits for nodes: the %d that are left hold %d of the %d workers that it needs",
                    len(there),
                    held,
                    fewest,
                )

    thread = threading.Thread(target=look, name="lost nodes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(5)
