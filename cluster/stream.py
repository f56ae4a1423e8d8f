"""Batches loaded ahead by actors and handed over in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cluster.resources import LOADER_CPUS

#: Batches, beside one for each actor, that are loaded, being loaded or loaded next: they wait in memory.
AHEAD = 2
#: Times that a batch is asked for again whose actor has died: nodes come and go, a batch that kills must end.
RETRIES = 3


class Loader:
    """What an actor does: it makes what loads once, and then loads batches."""

    def __init__(self) -> None:
        self._load: Any = None

    def batch(self, made_by: list[Any], number: int) -> dict[str, np.ndarray]:
        """The batch of a number.

        Args:
            made_by: reference to what makes what loads. Not for the constructor, whose faults Ray hands over
                as text alone, and whose arguments a restart no longer finds once they are out of scope.
            number: of the batch.
        """
        import ray

        self._load = self._load or ray.get(made_by[0])()
        loaded: dict[str, np.ndarray] = self._load(number)
        return loaded


def stream(
    load: Callable[[], Callable[[int], dict[str, np.ndarray]]],
    numbers: range,
    *,
    actors: int = 1,
    reserved: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields one batch a number, in order, loaded ahead by actors.

    Not by Ray Data, whose scheduler runs in the process that reads: while batches wait to be taken it polls
    without a pause (2.60) and holds Python's lock against the training, whose steps of many small operations
    then take several times as long.

    The order is that of the numbers whatever the actors do, so that a seed gives the same training again. An
    actor that dies with its process or node is started again, and loads again what was asked of it.

    Args:
        load: called once in each actor; what it returns turns a number into a batch, a mapping of arrays.
        numbers: of the batches.
        actors: loading actors.
        reserved: whether their CPUs are reserved on this node, with those of the process that reads; else
            they run where CPUs are free.
    """
    if not numbers:
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options: dict[str, Any] = {"num_cpus": LOADER_CPUS, "max_restarts": -1, "max_task_retries": RETRIES}
    if reserved:
        here = ray.get_runtime_context().get_node_id()
        options |= {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}
    remote = ray.remote(**options)(Loader)
    pool = [remote.remote() for _ in range(actors)]
    made_by = [ray.put(load)]
    waiting: deque[Any] = deque()
    for place, number in enumerate(numbers):
        waiting.append(pool[place % actors].batch.remote(made_by, number))
        if len(waiting) >= actors + AHEAD:
            yield _taken(waiting.popleft())
    while waiting:
        yield _taken(waiting.popleft())


def _taken(reference: Any) -> dict[str, np.ndarray]:
    """The batch, in this process's own memory: what Ray shares cannot be written to."""
    import ray

    return {name: values.copy() for name, values in ray.get(reference).items()}
