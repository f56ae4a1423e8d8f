"""Actions that a signal cannot cut in two.

Python raises an interrupt in the main thread between any two of its instructions. Arrow's streams complete an
upload when they are destroyed, so one that an interrupt drops between its opening and its end would put an
empty or a partial object in the place of a whole one. Threads other than the main one are never interrupted.
"""

from __future__ import annotations

import _thread
import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


def run_uninterrupted(action: Callable[[], T], what: str) -> T:
    """Runs an action to its end; an interrupt that comes meanwhile is raised after it.

    Args:
        action: what is to be done whole or not at all.
        what: its name, for the log if an interrupt has to wait.

    Raises:
        BaseException: what the action raises, or the interrupt: the action has then ended, or never begins.
    """
    task = _Task(action)
    if threading.current_thread() is not threading.main_thread():
        task.run()
        return task.result()
    try:
        # Not threading.Thread: an interrupt within its start() can leave one of its locks held for ever.
        _thread.start_new_thread(task.run, ())
        task.ended.acquire()
    except BaseException:
        task.settle(what)
        raise
    return task.result()


class _Task(Generic[T]):
    """An action that begins once or never.

    It uses bare locks: an interrupt cannot leave them half held, as it can those of ``threading.Event``.
    """

    def __init__(self, action: Callable[[], T]) -> None:
        self._action = action
        self._begun = _thread.allocate_lock()
        self.ended = _thread.allocate_lock()
        self.ended.acquire()
        self.is_over = False
        self._value: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        if not self._begun.acquire(blocking=False):
            return
        try:
            self._value.append(self._action())
        except BaseException as error:
            self._error = error
        finally:
            self.is_over = True
            self.ended.release()

    def settle(self, what: str) -> None:
        """Makes sure that the action has ended or never begins."""
        if self._begun.acquire(blocking=False):
            return
        told = False
        while not self.is_over:
            try:
                if not told:
                    told = True
                    logger.warning("interrupted: %s is completed first", what)
                self.ended.acquire()
            except BaseException:  # waits again
                continue

    def result(self) -> T:
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # else error and traceback hold each other
        return self._value[0]
