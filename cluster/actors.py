"""Actors that each load what they need once and then do tasks, results in the order of the tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

#: How often an actor that dies with its process or node is started again, and its task with it.
RESTARTS = 2


class Actors:
    """A pool of Ray actors.

    A task is done by one actor; where that one dies, it is done again by its successor. Either way it has
    one result.

    Args:
        load: called once in each actor, by its first task; makes the object whose methods tasks name.
        count: actors.
        gpu: whether each has a GPU, and no CPU; else each has a CPU.
    """

    def __init__(self, load: Callable[[], Any], *, count: int, gpu: bool = False) -> None:
        import ray

        class Worker:
            def __init__(self) -> None:
                self.loaded: Any = None

            def call(self, method: str, *arguments: Any) -> Any:
                # Not in the constructor, whose faults Ray hands over as text alone.
                self.loaded = self.loaded or load()
                return getattr(self.loaded, method)(*arguments)

        remote = ray.remote(
            num_cpus=0 if gpu else 1,
            num_gpus=1 if gpu else 0,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )(Worker)
        self._actors = [remote.remote() for _ in range(max(count, 1))]

    def map(self, tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Results of tasks, in order; a task is a method's name and its arguments.

        Arguments that are references to Ray's objects arrive as the objects.
        """
        from ray.util import ActorPool

        results: Iterator[Any] = ActorPool(self._actors).map(
            lambda actor, task: actor.call.remote(*task), list(tasks)
        )
        return results
