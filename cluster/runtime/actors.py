"""A pool of Ray actors with one rule for dead actors and one rule for errors.

**Deaths.** If an actor dies during a task, alone or with its node, the task is given to another actor, at
most ``RETRIES`` times, and a new actor replaces the dead one if there is work for it. A task may therefore
run twice and must give the same result each time. A task whose actor dies every time ends the work with an
error that names it.

**Errors.** A ``GareError`` raised by loading or by a task leaves the pool unchanged, without Ray's traces,
and ends the work. Any other exception becomes a ``GareError`` with its type and message, and its trace is
logged.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from gare.errors import GareError

logger = logging.getLogger(__name__)

#: Function that does a task, called with the task's arguments.
Work = Callable[..., Any]
#: Times that a task is given to another actor after its actor has died.
RETRIES = 3

#: Default advice about dying actors.
ADVICE = (
    "more memory or smaller tasks, where they are killed for the memory they take; the node's logs say why"
)


@dataclass(frozen=True)
class Failure:
    """An error sent back by an actor, with its trace if it was unexpected."""

    error: GareError
    trace: str = ""

    def leave(self) -> NoReturn:
        """Raises the error."""
        # Logged here and not by the actor, which may be killed as soon as the work is over.
        if self.trace:
            logger.error("unexpected error in an actor: %s", self.trace)
        raise self.error


class Worker:
    """Process of an actor: loads what it needs with its first task, then runs tasks.

    Args:
        load: returns the function that does a task.
    """

    def __init__(self, load: Callable[[], Work]) -> None:
        self._load = load
        self._work: Work | None = None

    def do(self, *arguments: Any) -> tuple[Failure | None, Any]:
        """Runs one task and returns (failure, None) or (None, result)."""
        try:
            # Not in the constructor: Ray passes on only the text of its errors.
            if self._work is None:
                self._work = self._load()
            return None, self._work(*arguments)
        except GareError as error:
            return Failure(error), None
        except Exception as error:
            return Failure(_as_gare(error), traceback.format_exc()), None


@dataclass(eq=False)
class _Task:
    number: int
    arguments: tuple[Any, ...]
    deaths: int = 0
    #: Reference to the result, which stays in Ray's object store until the caller takes it.
    value: Any = None


class ActorPool:
    """Pool of actors that each load what they need with their first task and run one task at a time.

    A thread of the pool hands out the tasks, so that work goes on whatever the driver does. Only an actor
    that has answered gets a task, so actors that wait for resources or whose node is lost block nothing. A
    pool that is larger than the cluster works with the actors that start; if none is left, it waits for one.
    It never starts more actors than there are tasks.

    Use it as a context manager, which ends the actors on exit, from one thread at a time.

    Args:
        load: called once in each actor; returns the function that is called with the arguments of each task.
        count: maximum number of actors.
        num_cpus: CPUs of an actor.
        num_gpus: GPUs of an actor.
        memory_bytes: heap of an actor and its children, which Ray cannot see.
        node_id: node on which all actors run; None for any.
        advice: text for the error of a task that ends its actors.
    """

    def __init__(
        self,
        load: Callable[[], Work],
        *,
        count: int,
        num_cpus: float = 1,
        num_gpus: float = 0,
        memory_bytes: int = 0,
        node_id: str | None = None,
        advice: str = ADVICE,
    ) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        if memory_bytes:
            options["memory"] = memory_bytes
        if node_id is not None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id, soft=False)
        # With retries, Ray would give a task to the same actor again, which may be waiting for another node.
        actor = ray.remote(max_restarts=0, max_task_retries=0, **options)(Worker)
        self._start = partial(actor.remote, partial(_load_shared, [ray.put(load)]))
        self._count, self._advice = max(count, 1), advice
        # Only the pool's thread uses these. It gets its instructions through _events and answers through
        # _results.
        self._waiting: deque[_Task] = deque()
        self._actors: set[Any] = set()
        self._asked: set[Any] = set()  # actors that have not answered yet
        self._idle: list[Any] = []
        self._num_silent = 0  # actors in a row that died without an answer
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[_Task | GareError] = queue.SimpleQueue()
        # Only the caller uses these.
        self._early: dict[int, _Task] = {}  # finished before earlier tasks that must be yielded first
        self._num_given, self._num_open, self._is_closed = 0, 0, False
        self._thread = threading.Thread(target=self._dispatch, name="actor-pool", daemon=True)
        self._thread.start()

    def __enter__(self) -> ActorPool:
        """Returns the pool."""
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the actors."""
        self.close()

    def map(
        self, tasks: Iterable[tuple[Any, ...]], *, ordered: bool = True, ahead: int | None = None
    ) -> Generator[Any, None, None]:
        """Runs tasks and yields their results; arrays in them are read-only views of Ray's object store.

        An error ends the actors, and so does closing the iterator early.

        Args:
            tasks: arguments of each task. References to Ray objects arrive as the objects.
            ordered: True to yield in the order of the tasks, False to yield as they finish.
            ahead: maximum number of tasks submitted and not taken yet; bounds the tasks drawn early and the
                results held in memory; None for no limit.

        Raises:
            GareError: from loading or from a task, or if a task has ended too many actors.
        """
        assert self._num_open == 0, "tasks that were submitted must be finished first"
        coming, self._num_given = iter(tasks), 0
        try:
            for number in itertools.count():
                room = None if ahead is None else max(ahead, 1) - self._num_open
                self.submit(itertools.islice(coming, room))
                if not self._num_open:
                    return
                yield self._take(number if ordered else None)
        finally:
            if self._num_open:
                self.close()

    def submit(self, tasks: Iterable[tuple[Any, ...]]) -> None:
        """Submits tasks, which run from now on in any order; ``finish`` yields their results."""
        assert not self._is_closed, "the pool is closed"
        added = [_Task(number, arguments) for number, arguments in enumerate(tasks, self._num_given)]
        self._num_given += len(added)
        self._num_open += len(added)
        self._events.put(partial(self._waiting.extend, added))

    def finish(self) -> Iterator[Any]:
        """Waits for all submitted tasks and yields their results as they finish.

        Raises:
            GareError: as in ``map``.
        """
        while self._num_open:
            yield self._take(None)
        self._num_given = 0

    def close(self) -> None:
        """Ends the actors, also those at work."""
        import ray

        if self._is_closed:
            return
        self._is_closed = True
        self._events.put(None)
        self._thread.join()
        if ray.is_initialized():
            for actor in self._actors:
                ray.kill(actor)
        self._num_open = 0

    def _take(self, number: int | None) -> Any:
        """Waits for the task with this number, or for any task, and returns its result."""
        import ray
        from ray.exceptions import ObjectLostError, ObjectReconstructionFailedError

        while True:
            done = self._early.pop(number, None) if number is not None else None
            task = done or self._results.get()
            if isinstance(task, GareError):
                self.close()
                raise task
            if number is not None and task.number != number:
                self._early[task.number] = task
                continue
            try:
                value = ray.get(task.value)
            except (ObjectLostError, ObjectReconstructionFailedError) as error:  # lost with its node
                self._events.put(partial(self._again, task, error))
                continue
            self._num_open -= 1
            return value

    def _dispatch(self) -> None:
        """Hands out tasks on every event, until the pool is closed or an error ends it."""
        try:
            while (event := self._events.get()) is not None:
                event()
                del event  # it holds a result, which should be freed once it is taken
                while self._waiting and self._idle:
                    self._give(self._idle.pop(), self._waiting.popleft())
                while len(self._waiting) > len(self._asked) and len(self._actors) < self._count:
                    actor = self._start()
                    self._actors.add(actor)
                    self._ask(actor)
        except GareError as error:
            self._results.put(error.with_traceback(None))
        except Exception as error:
            logger.exception("unexpected error in a pool of actors")
            self._results.put(_as_gare(error))

    def _ask(self, actor: Any) -> None:
        """Asks an actor to answer, before it is given a task."""
        self._asked.add(actor)
        self._when_there(actor.__ray_ready__.remote(), partial(self._answered, actor))

    def _answered(self, actor: Any, answer: Any) -> None:
        self._asked.remove(actor)
        error = answer.exception()
        if error is None:
            self._num_silent = 0
            self._idle.append(actor)
            return
        self._drop_actor(actor, error)
        self._num_silent += 1
        if self._num_silent > RETRIES * self._count:
            raise GareError(
                f"actors die before they can do anything: {_reason(error)}", accepted=self._advice
            )

    def _give(self, actor: Any, task: _Task) -> None:
        # Two objects: the small failure, if any, is fetched here at once; the result stays where it is.
        failure, task.value = actor.do.options(num_returns=2).remote(*task.arguments)
        self._when_there(failure, partial(self._ended, actor, task))

    def _ended(self, actor: Any, task: _Task, answer: Any) -> None:
        error = answer.exception()
        if error is not None:
            self._drop_actor(actor, error)
            self._again(task, error)
            return
        if failure := answer.result():
            failure.leave()
        self._num_silent = 0
        self._idle.append(actor)
        self._results.put(task)

    def _drop_actor(self, actor: Any, error: BaseException) -> None:
        """Gives up an actor after an error; raises the error if the actor did not die."""
        import ray
        from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError

        if not isinstance(error, RayActorError | OutOfMemoryError | NodeDiedError):
            raise error
        self._actors.remove(actor)
        ray.kill(actor)  # it may only be unreachable
        # Others may have died with the same node; a task given to one of them would seem to have killed it.
        idle, self._idle = self._idle, []
        for other in idle:
            self._ask(other)

    def _again(self, task: _Task, error: BaseException) -> None:
        """Runs a task again after its actor has died or its result is lost."""
        # A preempted node is not the task's fault.
        task.deaths += not getattr(error, "preempted", False)
        if task.deaths > RETRIES:
            raise lethal_task_error(f"task {task.number} (the first is 0)", _reason(error), self._advice)
        logger.warning("retrying task %d: %s", task.number, _reason(error))
        self._waiting.appendleft(task)

    def _when_there(self, reference: Any, then: Callable[[Any], None]) -> None:
        """Calls ``then`` in the pool's thread with the object's future, once the object is available."""
        reference.future().add_done_callback(lambda future: self._events.put(partial(then, future)))


def lethal_task_error(task: str, last: str = "", advice: str = ADVICE) -> GareError:
    """Builds the error for a task that has ended too many actors, with the reason for the last death."""
    return GareError(
        f"{task} has ended {RETRIES + 1} actors{last and f', the last by {last}'}", accepted=advice
    )


def _reason(error: BaseException) -> str:
    """Returns the line of Ray's message that says why an actor died."""
    from ray.exceptions import RayActorError

    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[-1 if isinstance(error, RayActorError) else 0]}"


def _as_gare(error: Exception) -> GareError:
    return GareError(f"{type(error).__name__}: {error}")


def _load_shared(held: list[Any]) -> Work:
    """Calls the load function that all actors share, which is stored once in Ray's object store."""
    import ray

    work: Work = ray.get(held[0])()
    return work
