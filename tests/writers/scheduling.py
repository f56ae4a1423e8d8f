"""Processes whose threads stop at each operation of the storage, until somebody lets them go on.

Of all threads one runs at a time, so that a history is the same whenever it is repeated. A process that dies
is never woken again: nothing of it is cleaned up, as after a loss of power.
"""

from __future__ import annotations

import _thread
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

#: Operations after which a thread that does not come to its end hangs.
MOST_OPERATIONS = 20_000


class HistoryOverError(BaseException):
    """Ends the threads of a history that is over; nothing in the code under test catches it."""


@dataclass
class Machine:
    """A computer with a clock of its own, which may be set.

    Attributes:
        name: of the machine.
        boots: times that it was started.
        offset_s: of its clock of the day.
    """

    name: str
    boots: int = 0
    offset_s: float = 0.0


@dataclass
class Process:
    """A process of a machine.

    Attributes:
        machine: where it runs.
        boot: of the machine.
        pid: process id, which another one may get once it has ended.
        start: ticks from the start of the machine to that of the process.
        is_dead: whether it was killed or has ended.
        asleep_since_s: since when it does not run; None: it runs.
        lost_s: seconds that its steady clock lacks, since its machine was suspended.
        longest_sleep_s: the longest time that it did not run.
        faults: how many of its operations failed.
    """

    machine: Machine
    boot: int
    pid: int
    start: int
    is_dead: bool = False
    asleep_since_s: float | None = None
    lost_s: float = 0.0
    longest_sleep_s: float = 0.0
    faults: int = 0

    @property
    def runs(self) -> bool:
        """Whether it is neither dead nor asleep."""
        return not self.is_dead and self.asleep_since_s is None


@dataclass
class Stop:
    """The operation before which a thread waits.

    Attributes:
        what: name of the operation.
        where: the file, or empty.
        due_s: time at which it goes on by itself.
        is_ready: whether it goes on before that.
    """

    what: str
    where: str = ""
    due_s: float = math.inf
    is_ready: Callable[[], bool] = lambda: False


@dataclass
class Actor:
    """A thread of a process."""

    process: Process
    name: str
    stop: Stop = field(default_factory=lambda: Stop("begin"))
    is_over: bool = False
    error: BaseException | None = None
    fault: str = ""
    is_doomed: bool = False
    go: Any = field(default_factory=_thread.allocate_lock)
    thread: threading.Thread | None = None

    @property
    def waits(self) -> bool:
        """Whether it waits for time or for another thread, not for the storage."""
        return self.stop.what in ("sleep", "wait", "join")


class Scheduler:
    """Lets threads go on one operation at a time, and counts the seconds that they wait."""

    def __init__(self, after: Callable[[Actor, Stop], None]) -> None:
        self.now_s = 1000.0
        self.storage_offset_s = 0.0
        self.actors: list[Actor] = []
        self.processes: list[Process] = []
        self.current: Actor | None = None
        self._after = after
        self._back = _thread.allocate_lock()
        self._back.acquire()

    # Called by threads.

    def stop(self, what: str, where: str = "", due_s: float = math.inf, ready: Any = None) -> str:
        """Waits until it may go on; the kind of fault that the operation is to have, mostly none."""
        actor = self.current
        if actor is None or threading.current_thread() is not actor.thread:
            return ""
        if actor.is_doomed:
            raise HistoryOverError
        actor.stop = Stop(what, where, due_s, ready or (lambda: False))
        self._back.release()
        actor.go.acquire()
        if actor.is_doomed:
            raise HistoryOverError
        fault, actor.fault = actor.fault, ""
        if fault:
            actor.process.faults += 1
        return fault

    def operation(self, what: str, where: str) -> str:
        """Waits before an operation of the storage, which may fail.

        Raises:
            OSError: where it is to fail.
        """
        fault = self.stop(what, where)
        if fault == "fails":
            raise OSError(5, "the storage does not answer", where)
        return fault

    @property
    def process(self) -> Process | None:
        """The process that runs now; None outside of all."""
        return self.current.process if self.current else None

    # Called by who makes the history.

    def start(self, process: Process, name: str, action: Callable[[], None]) -> Actor:
        """A new thread, which has not begun yet."""
        actor = Actor(process, name)

        def run() -> None:
            actor.go.acquire()
            try:
                if not actor.is_doomed:
                    action()
            except BaseException as error:
                actor.error = error
            actor.is_over = True
            self._back.release()

        actor.go.acquire()
        actor.thread = threading.Thread(target=run, daemon=True, name=name)
        actor.thread.start()
        self.actors.append(actor)
        return actor

    def run(self, actor: Actor, operations: int) -> int:
        """Lets a thread go on for so many operations; how many it made before it ended or had to wait."""
        for done in range(operations):
            if actor.is_over or not actor.process.runs:
                return done
            if actor.waits and not actor.stop.is_ready():
                if math.isinf(actor.stop.due_s):
                    return done
                self.advance(actor.stop.due_s, but=actor)
            self._resume(actor)
        return operations

    def advance(self, until_s: float, but: Actor | None = None) -> None:
        """Lets time pass, in which claims of processes that run are renewed, but for one."""
        while True:
            others = [one for one in self.renewers if one is not but]
            late = [one for one in others if one.stop.due_s <= until_s or not one.waits]
            if not late:
                break
            first = min(late, key=lambda one: one.stop.due_s if one.waits else -math.inf)
            self.now_s = max(self.now_s, first.stop.due_s if first.waits else 0.0)
            self._resume(first)
            while not first.waits and not first.is_over:
                self._resume(first)
        self.now_s = max(self.now_s, until_s)

    @property
    def renewers(self) -> list[Actor]:
        """Threads that renew a claim, of processes that run."""
        return [one for one in self.actors if one.name == "renewal" and not one.is_over and one.process.runs]

    def suspend(self, process: Process) -> None:
        """Puts a process to sleep."""
        process.asleep_since_s = self.now_s

    def wake(self, process: Process, *, was_machine: bool) -> None:
        """Wakes a process up; where its machine had slept too, its steady clock had stopped."""
        assert process.asleep_since_s is not None
        slept_s = self.now_s - process.asleep_since_s
        process.longest_sleep_s = max(process.longest_sleep_s, slept_s)
        process.lost_s += slept_s if was_machine else 0.0
        process.asleep_since_s = None

    def kill(self, process: Process) -> None:
        """Ends a process where it is."""
        process.is_dead = True

    def end(self) -> None:
        """Ends all threads."""
        for actor in self.actors:
            actor.is_doomed = True
        for actor in self.actors:
            if not actor.is_over:
                self.current = actor
                actor.go.release()
                self._back.acquire()
        self.current = None

    def _resume(self, actor: Actor) -> None:
        before, self.current, outer = actor.stop, actor, self.current
        actor.go.release()
        self._back.acquire()
        self.current = outer
        self._after(actor, before)
