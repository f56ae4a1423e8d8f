"""A Ray Data stage whose actors process parts, with the rules of ``cluster.runtime.actors``.

For extraction, whose driver has nothing else to do: Ray Data schedules in the iterating process, where it
polls without a pause and holds the GIL while results wait to be taken (2.60). If the driver trains, or the
order matters, use ``ActorPool``.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any

from cluster.runtime._compat import table_of_object
from cluster.runtime.actors import RETRIES, Failure, Work, Worker, lethal_task_error


def run_parts(
    load: Callable[[], Work],
    parts: Sequence[Any],
    *,
    workers: int,
    num_cpus: float = 1,
    num_gpus: float = 0,
    memory_bytes: int = 0,
) -> Generator[Any, None, None]:
    """Processes parts on a Ray Data actor pool and yields their results as they finish.

    Args:
        load: called once in each actor; returns the function that is called with each part.
        parts: parts to process.
        workers: maximum number of actors; one is enough to go on after a node is lost.
        num_cpus: CPUs of an actor.
        num_gpus: GPUs of an actor.
        memory_bytes: heap of an actor and its children, which Ray cannot see.

    Raises:
        GareError: from loading or from a part, or if a part has ended too many actors.
    """
    if not parts:
        return
    import ray
    from ray.data import ActorPoolStrategy
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
    attempts: Any = ray.remote(**options)(_Attempts).remote()
    most = min(workers, len(parts))
    dataset = ray.data.from_arrow([table_of_object(part) for part in enumerate(parts)]).map_batches(
        _PartWorker,
        fn_constructor_args=(load, attempts),
        batch_size=1,
        batch_format="pyarrow",
        # All at once, instead of one by one as the load grows.
        compute=ActorPoolStrategy(min_size=1, max_size=most, initial_size=most),
        num_cpus=num_cpus,
        num_gpus=num_gpus or None,
        memory=memory_bytes or None,
    )
    batches: Any = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    try:
        with contextlib.closing(batches):
            for batch in batches:
                for failure, value in batch["content"].to_pylist():
                    if failure:
                        failure.leave()
                    yield value
    finally:
        if ray.is_initialized():
            ray.kill(attempts)


class _Attempts:
    """Counts the attempts at each part, in a process that outlives the workers.

    Ray Data gives a dead actor's part to another actor without limit. Ray's own limit, max_task_retries, does
    not help: it also counts calls to an actor whose node is lost before the loss is known, and these alone
    use it up (2.60).
    """

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        """Counts one more attempt at a part and returns their number."""
        self._begun[number] += 1
        return self._begun[number]


class _PartWorker:
    """Processes one part per batch; returns errors as values, as Ray Data keeps only an exception's text."""

    def __init__(self, load: Callable[[], Work], attempts: Any) -> None:
        self._worker, self._attempts = Worker(load), attempts

    def __call__(self, batch: Any) -> Any:
        import ray

        ((number, part),) = batch["content"].to_pylist()
        if ray.get(self._attempts.begin.remote(number)) > RETRIES + 1:
            return table_of_object((Failure(lethal_task_error(f"part {number} (the first is 0)")), None))
        return table_of_object(self._worker.do(part))
