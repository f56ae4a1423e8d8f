"""Work cut into parts, done by a pool of Ray Data actors that each load what they need once."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

#: What an actor does with a part: JSON-able in, JSON-able out.
Work = Callable[[Any], dict[str, Any]]

#: Logs the trace of an exception that ends the work and then raises it.
_EXECUTOR = "ray.data._internal.execution.streaming_executor_state"


def _is_told_nowhere_else(record: logging.LogRecord) -> bool:
    return "execution will now abort" not in record.getMessage()


def run_parts(
    load: Callable[[], Work],
    parts: Sequence[Any],
    *,
    workers: int,
    num_cpus: float = 1,
    num_gpus: float = 0,
    memory_bytes: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yields what the work returned for each part as it is done, in any order.

    A part is what one actor gets, finishes and, after a crash of it or its node, another one gets again: the
    work must be the same when done twice.

    Args:
        load: called once in each actor.
        parts: JSON-able descriptions of the parts.
        workers: actors at most.
        num_cpus: of an actor.
        num_gpus: of an actor.
        memory_bytes: heap of an actor and its children, which Ray does not see otherwise.
    """
    if not parts:
        return
    import ray
    from ray.data import ActorPoolStrategy

    logging.getLogger(_EXECUTOR).addFilter(_is_told_nowhere_else)

    class Worker:
        def __init__(self) -> None:
            self.work = load()

        def __call__(self, block: dict[str, Any]) -> dict[str, np.ndarray]:
            return {"result": np.array([json.dumps(self.work(json.loads(block["part"][0])))])}

    rows = [{"part": json.dumps(part)} for part in parts]
    most = min(workers, len(parts))
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Worker,
        batch_size=1,
        # All at once, instead of one by one as the work proves to be too much; and one is enough to go on
        # with, where a node is lost.
        compute=ActorPoolStrategy(min_size=1, max_size=most, initial_size=most),
        num_cpus=num_cpus,
        num_gpus=num_gpus or None,
        memory=memory_bytes or None,
    )
    for batch in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        yield from map(json.loads, batch["result"])
