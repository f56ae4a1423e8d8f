"""Processes whose threads stop at each storage operation until they are told to go on.

Only one thread runs at a time, so that a history is the same whenever it is repeated. A process that dies is
never woken again: it cleans up nothing, as after a power failure.
"""

from __future__ import annotations

import _thread
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

#: Number of operations after which a thread that has not ended is taken to hang.
MOST_OPERATIONS = 20_000


class HistoryOverError(BaseException):
    """Ends the threads of a history that is over; nothing in the code under test catches it."""


@dataclass
class Machine:
    """A computer with its own clock, which may be set.

    Attributes:
        name: name of the machine.
        boots: number of times that it was started.
        offset_s: offset of its wall clock, seconds.
    """

    name: str
    boots: int = 0
    offset_s: float = 0.0


@dataclass
class Process:
    """A process of a machine.

    Attributes:
        machine: machine that it runs on.
        boot: boot number of the machine.
        pid: process id, which may be reused once the process has ended.
        start: ticks from the start of the machine to that of the process.
        is_dead: True if it was killed or has ended.
        asleep_since_s: time since which it has been asleep; None if it runs.
        lost_s: seconds that its monotonic clock lags behind, because its machine was suspended.
        longest_sleep_s: its longest sleep.
        faults: number of its operations that failed.
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
        """True if it is neither dead nor asleep."""
        return not self.is_dead and self.asleep_since_s is None


@dataclass
class Stop:
    """The operation before which a thread is waiting.

    Attributes:
        what: name of the operation.
        where: the file, or empty.
        due_s: time at which it continues by itself.
        is_ready: returns True if it may continue before that.
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
        """True if it waits for time or for another thread, not for the storage."""
        return self.stop.what in ("sleep", "wait", "join")


class Scheduler:
    """Runs threads one operation at a time, and counts the seconds that they wait."""

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
        """Waits until the thread may go on; returns the operation's kind of fault, empty in most cases."""
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
        """Waits before a storage operation, which may fail.

        Raises:
            OSError: if the operation is to fail.
        """
        fault = self.stop(what, where)
        if fault == "fails":
            raise OSError(5, "the storage does not answer", where)
        return fault

    @property
    def process(self) -> Process | None:
        """The process that runs now; None if none does."""
        return self.current.process if self.current else None

    # Called by the history.

    def start(self, process: Process, name: str, action: Callable[[], None]) -> Actor:
        """Creates a thread that has not begun yet."""
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
        """Runs a thread for some operations; returns how many it made before it ended or had to wait."""
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
        """Advances the time; running processes renew their claims, except for ``but``."""
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
        """Wakes a process; if its machine slept too, its monotonic clock had stopped."""
        assert process.asleep_since_s is not None
        slept_s = self.now_s - process.asleep_since_s
        process.longest_sleep_s = max(process.longest_sleep_s, slept_s)
        process.lost_s += slept_s if was_machine else 0.0
        process.asleep_since_s = None

    def kill(self, process: Process) -> None:
        """Kills a process at its current operation."""
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
