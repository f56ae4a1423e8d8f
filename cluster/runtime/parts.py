"""A stage of Ray Data whose actors do parts, with the rules of ``cluster.runtime.actors``.

For extraction, whose driver has nothing else to do: Ray Data schedules in the process that iterates, and
there polls without a pause and holds Python's lock while results wait to be taken (2.60). Where the driver
trains, or the order counts, ``ActorPool`` is the one to use.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cluster.runtime.actors import RETRIES, Work, Worker, is_death, killing


def run_parts(
    load: Callable[[], Work],
    parts: Sequence[Any],
    *,
    workers: int,
    num_cpus: float = 1,
    num_gpus: float = 0,
    memory_bytes: int = 0,
) -> Iterator[Any]:
    """Does parts on an actor pool of Ray Data and yields their results as they are done.

    Args:
        load: called once in each actor; returns the work, which is called with each part.
        parts: what to do.
        workers: actors at most; one is enough to go on with, where a node is lost.
        num_cpus: of an actor.
        num_gpus: of an actor.
        memory_bytes: heap of an actor and its children, which Ray does not see otherwise.

    Raises:
        GareError: raised by loading or by a part, or for a part that has ended too many actors.
    """
    if not parts:
        return
    import ray
    from ray.data import ActorPoolStrategy

    most = min(workers, len(parts))
    dataset = ray.data.from_arrow([_block(part) for part in parts])
    with warnings.catch_warnings():
        # Deprecated in favour of named parameters, of which there is none for max_task_retries (2.60).
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", DeprecationWarning)
        dataset = dataset.map_batches(
            _PartWorker,
            fn_constructor_args=(load,),
            batch_size=1,
            batch_format="pyarrow",
            # All at once, instead of one by one as the work proves to be too much.
            compute=ActorPoolStrategy(min_size=1, max_size=most, initial_size=most),
            num_cpus=num_cpus,
            num_gpus=num_gpus or None,
            memory=memory_bytes or None,
            # Ray Data restarts actors without an end, and so it would give them a task again by default.
            max_task_retries=RETRIES,
        )
    batches: Any = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    left = len(parts)
    with contextlib.closing(batches):
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:
                if not is_death(error):
                    raise
                raise killing(f"one of the {left} parts that are left", error) from None
            if batch is None:
                return
            for fault, value in batch["content"].to_pylist():
                if fault:
                    raise fault
                left -= 1
                yield value


class _PartWorker:
    """Does a part a batch; errors travel as values, since Ray Data hands on the text of exceptions alone."""

    def __init__(self, load: Callable[[], Work]) -> None:
        self._worker = Worker(load)

    def __call__(self, batch: Any) -> Any:
        (part,) = batch["content"].to_pylist()
        return _block(self._worker.do(part))


def _block(content: Any) -> Any:
    """A table of one cell, which holds any object; Ray pickles it, as it does all that it sends."""
    import pyarrow as pa
    from ray.data.extensions import ArrowPythonObjectArray

    return pa.table({"content": ArrowPythonObjectArray.from_objects([content])})
