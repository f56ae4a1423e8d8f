"""Work cut into parts, done by a pool of Ray Data actors that each load what they need once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gare import errors
from gare.errors import GareError

#: What an actor does with a part: JSON-able in, JSON-able out.
Work = Callable[[Any], dict[str, Any]]


def _result_of(work: Work, part: Any) -> dict[str, Any]:
    """What the work returned, or its fault: Ray Data hands on the text of an exception, not the exception."""
    try:
        return {"done": work(part)}
    except GareError as error:
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        return {"fault": [kind.__name__, error.what, error.where, error.accepted]}


def _done(result: dict[str, Any]) -> dict[str, Any]:
    if "fault" in result:
        kind, what, where, accepted = result["fault"]
        raise getattr(errors, kind)(what, where=where, accepted=accepted)
    done: dict[str, Any] = result["done"]
    return done


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

    Raises:
        GareError: of the work, which ends with it.
    """
    if not parts:
        return
    import ray
    from ray.data import ActorPoolStrategy

    class Worker:
        def __init__(self) -> None:
            self.work = load()

        def __call__(self, block: dict[str, Any]) -> dict[str, np.ndarray]:
            return {"result": np.array([json.dumps(_result_of(self.work, json.loads(block["part"][0])))])}

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
        yield from (_done(json.loads(result)) for result in batch["result"])
