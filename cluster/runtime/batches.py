"""Training batches, loaded ahead by actors on the worker's node and yielded in order, in chunks."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from cluster.runtime.actors import ActorPool
from gare.config import ClusterConfig

logger = logging.getLogger(__name__)

Arrays: TypeAlias = dict[str, np.ndarray]
#: Loads rows of a batch, from its number, the first row, and the row after the last.
Load: TypeAlias = Callable[[int, int, int], Arrays]

#: Maximum bytes of a task, unless one row is larger: small enough for many loaders to share a batch, large
#: enough for the fixed cost of a task not to matter.
CHUNK_BYTES = 32 * 10**6
#: Share of a node's object store for batches of all training workers there together.
STORE_SHARE = 0.8
_MEGABYTE = 10**6


class BatchRequest(NamedTuple):
    """A batch to load.

    Attributes:
        number: number of the batch.
        rows: number of its rows.
        row_bytes: approximate size of a row.
    """

    number: int
    rows: int
    row_bytes: int

    @property
    def chunk(self) -> int:
        """Maximum number of rows of a task."""
        return max(1, CHUNK_BYTES // max(self.row_bytes, 1))


def stream_chunks(
    load: Callable[[], Load],
    batches: Sequence[BatchRequest],
    *,
    loaders: int,
    config: ClusterConfig,
    workers: int,
) -> Iterator[Arrays]:
    """Yields chunks of consecutive rows, in order; no chunk has rows of two batches.

    Ray Data is not used: its scheduler runs in the reading process and, while batches wait to be taken, polls
    without a pause (2.60). It then holds the GIL against the training, whose steps of many small operations
    take several times as long.

    The order is that of the batches, whatever the actors do, so that a seed repeats the training. The
    actors run on this node; their CPUs are reserved with those of the worker (``resources_of_worker``).

    Args:
        load: called once in each actor.
        batches: batches to load.
        loaders: number of actors.
        config: its ``prefetch_mb`` bounds what is loaded or loading and not yet taken, but allows one chunk.
        workers: training workers on this node.

    Raises:
        GareError: from loading, or if a chunk ends actor after actor.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    tasks = (
        (batch.number, first, min(first + batch.chunk, batch.rows))
        for batch in batches
        for first in range(0, batch.rows, batch.chunk)
    )
    largest = max((min(batch.chunk, batch.rows) * batch.row_bytes for batch in batches), default=1)
    whole = max((batch.rows * batch.row_bytes for batch in batches), default=1)
    # Enough for every loader to have its next chunk ready, and for a whole batch to arrive during a step.
    enough = loaders + max(loaders + 2, math.ceil(whole / max(largest, 1)))
    room = ahead_bytes(config, workers, whole, enough * largest)
    advice = (
        f"{loaders} loaders hold up to {largest / _MEGABYTE:.0f} MB of clips each beside what waits: lower "
        "cluster.loaders_per_worker or cluster.prefetch_mb where memory is short; the node's logs say why"
    )
    with ActorPool(load, count=loaders, num_cpus=0, node_id=here, advice=advice) as pool:
        found = pool.map(tasks, ahead=max(1, int(room / max(largest, 1))))
        with contextlib.closing(found):
            yield from found


def ahead_bytes(config: ClusterConfig, workers: int, batch_bytes: int, enough: float) -> float:
    """Returns the bytes of clips that may wait for a training worker: enough, if setting and node allow it.

    Args:
        config: its ``prefetch_mb``.
        workers: training workers on this node.
        batch_bytes: size of a worker's batch, which is held as well while it is assembled.
        enough: bytes beyond which nothing is gained.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    wanted = min(config.prefetch_mb * _MEGABYTE, enough)
    stores: list[float] = [
        node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["NodeID"] == here
    ]
    room = sum(stores) * STORE_SHARE / max(workers, 1) - batch_bytes
    if room >= wanted:
        return wanted
    tell = logger.warning if room < batch_bytes else logger.info
    tell(
        "loading at most %.0f MB of clips ahead for each worker instead of %.0f MB: the node's object store "
        "of %.0f MB (cluster.object_store_mb, ray start --object-store-memory) has no room for more beside "
        "batches of %.0f MB",
        max(room, 0) / _MEGABYTE,
        wanted / _MEGABYTE,
        sum(stores) / _MEGABYTE,
        batch_bytes / _MEGABYTE,
    )
    return max(room, 0.0)
