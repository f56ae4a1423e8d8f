"""Batches of training, loaded ahead by actors on the worker's node and handed over in order, in chunks."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import numpy as np

from cluster.runtime.actors import ActorPool
from gare.config import ClusterConfig

logger = logging.getLogger(__name__)

Arrays: TypeAlias = dict[str, np.ndarray]
#: Loads rows of a batch: its number, the first row, the one after the last.
Load: TypeAlias = Callable[[int, int, int], Arrays]

#: Bytes that a task loads at most, unless one row is larger: small enough for many loaders to share a batch,
#: large enough for what a task costs by itself not to count.
CHUNK_BYTES = 32 * 10**6
#: Share of a node's object store that batches may take, of all training workers there together.
STORE_SHARE = 0.5
_MEGABYTE = 10**6


def stream(
    load: Callable[[], Load],
    batches: Iterable[tuple[int, int]],
    *,
    row_bytes: int,
    loaders: int,
    ahead_bytes: float,
) -> Iterator[Arrays]:
    """Yields chunks of consecutive rows, in order, none with rows of two batches.

    Not by Ray Data, whose scheduler runs in the process that reads: while batches wait to be taken it polls
    without a pause (2.60) and holds Python's lock against the training, whose steps of many small operations
    then take several times as long.

    The order is that of the batches whatever the actors do, so that a seed gives the same training again. The
    actors run on this node; their CPUs are reserved with those of the worker (``resources_of_worker``).

    Args:
        load: called once in each actor.
        batches: number and rows of each batch.
        row_bytes: of a row, about.
        loaders: actors.
        ahead_bytes: that are loaded or being loaded and not yet taken at most, but one chunk at least.

    Raises:
        GareError: of the loading; for a chunk whose loading ends actor after actor.
    """
    import ray

    rows = max(1, CHUNK_BYTES // max(row_bytes, 1))
    here = ray.get_runtime_context().get_node_id()
    tasks = (
        (number, first, min(first + rows, size)) for number, size in batches for first in range(0, size, rows)
    )
    largest = max(row_bytes, 1) * rows
    with ActorPool(load, count=loaders, num_cpus=0, node_id=here) as pool:
        found = pool.map(tasks, ahead=max(1, int(ahead_bytes / largest)))
        with contextlib.closing(found):  # type: ignore[type-var]
            yield from found


def ahead_bytes(config: ClusterConfig, workers_here: int) -> float:
    """Bytes of clips that may wait for a training worker: the setting, or less where a node has less room.

    Args:
        config: its ``prefetch_mb``.
        workers_here: training workers on this node.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    wanted = config.prefetch_mb * _MEGABYTE
    for node in ray.nodes():
        if node["NodeID"] == here:
            room = node["Resources"].get("object_store_memory", 0) * STORE_SHARE / max(workers_here, 1)
            if room < wanted:
                logger.info(
                    "%.0f MB of clips wait for each worker at most, less than cluster.prefetch_mb %g: the "
                    "object store of the node has no room for more",
                    room / _MEGABYTE,
                    config.prefetch_mb,
                )
                return float(room)
    return wanted
