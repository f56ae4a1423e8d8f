"""Actors that work on parts as they are handed over, beside whatever else the driver does meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

#: What an actor does with a part: JSON-able in, counts by name out.
Work = Callable[[Any], dict[str, int]]
#: Times that a part is given to an actor again whose process or node died.
RETRIES = 3


class Beside:
    """A pool of actors, each of which loads what it needs once, with the first part.

    A part may be done twice after a crash: the work must be the same when done again.

    Args:
        load: called once in each actor.
        workers: actors.
        num_cpus: of an actor.
        num_gpus: of an actor.
    """

    def __init__(
        self, load: Callable[[], Work], *, workers: int, num_cpus: float = 0, num_gpus: float = 0
    ) -> None:
        self._load, self._workers = load, workers
        self._resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self._actors: list[Any] = []
        self._pool: Any = None

    def submit(self, parts: Sequence[Any]) -> None:
        """Hands over parts, to be done in any order."""
        if parts and self._pool is None:
            self._start()
        for part in parts:
            self._pool.submit(lambda actor, one: actor.do.remote(one), part)

    def finish(self) -> Iterator[dict[str, int]]:
        """Waits for all parts that were handed over and yields the counts of each."""
        while self._pool is not None and self._pool.has_next():
            yield self._pool.get_next_unordered()

    def close(self) -> None:
        """Ends the actors."""
        import ray

        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._pool = [], None

    def _start(self) -> None:
        import ray
        from ray.util import ActorPool

        class Worker:
            def __init__(self, load: Callable[[], Work]) -> None:
                self.load = load
                self.work: Work | None = None

            def do(self, part: Any) -> dict[str, int]:
                # Not in the constructor, whose faults Ray hands over as text alone.
                self.work = self.work or self.load()
                return self.work(part)

        remote = ray.remote(max_restarts=RETRIES, max_task_retries=RETRIES, **self._resources)(Worker)
        self._actors = [remote.remote(self._load) for _ in range(self._workers)]
        self._pool = ActorPool(self._actors)
