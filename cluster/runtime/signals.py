"""Handling of SIGTERM and Ctrl-C: ends a command in order at any moment, keeping what can be kept.

The first signal raises ``Interrupted`` in the main thread, so that everything open is closed. It is delayed
during work that must not be interrupted (``shielded``). Workers that have something to save are asked to end
by themselves (``workers_asked_to_end``); a second signal stops waiting for them. A third ends the process
without closing anything.

A signal during an import waits for the import's end: a half-imported module stays so for the rest of the
process, and a C++ extension may abort at an exception during its set-up, as Triton does.

This module imports nothing slow, so that a command can take signals before it imports the rest.
"""

from __future__ import annotations

import _thread
import atexit
import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

from gare.errors import StoppedError

logger = logging.getLogger(__name__)

#: The signals, with their names in messages.
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
STATUS = 4
#: Seconds that workers get to write a checkpoint before the driver ends anyway; Kubernetes waits 30.
GRACE_S = 25.0
#: Seconds after which an exception that no code has noticed is raised again: libraries swallow exceptions
#: raised within a destructor or a callback.
UNSEEN_S = 10.0
#: The same if Python itself reports the swallowed exception; also the pause between two checks of an import.
SOON_S = 0.05


class Interrupted(KeyboardInterrupt):
    """End of a command by a signal, whose name is the exception's text."""


def interrupt_message(name: str) -> str:
    """Returns the message with which a command says that a signal ended it."""
    return f"interrupted by {name}; the same command continues where this one stopped"


class _Signals:
    """State and handlers of this process's signals; there is one instance.

    Attributes:
        is_taken: True while our handlers are installed.
        is_running: False before the command has begun, when there is nothing to close.
        is_over: True once the command has ended and its status is fixed.
        name: name of the first signal; empty if none has come.
    """

    def __init__(self) -> None:
        self._unraisable: Callable[[Any], Any] = sys.unraisablehook
        self._hook = self._hear_unraisable  # one object, so that it can be recognised
        self._hears = False
        self._forget()

    def _forget(self) -> None:
        self.is_taken = self.is_running = self.is_over = False
        self.name = ""
        self._number = 0
        self._count = self._depth = 0
        self._is_raised = self._is_seen = self._is_woken = self._is_asked = False
        self._ask: Callable[[str], None] | None = None
        self._timer: threading.Timer | None = None

    def take(self) -> dict[int, Any]:
        """Installs the handlers and returns the old ones. Ignored ones stay ignored, as under ``nohup``."""
        before: dict[int, Any] = {number: signal.getsignal(number) for number in NAMES}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        if not self._hears:  # only once: a library may since have installed a hook that calls ours
            self._unraisable, sys.unraisablehook = sys.unraisablehook, self._hook
            self._hears = True
        self.is_taken = True
        return before

    def ignore(self) -> None:
        """Ignores signals from here on: the process is about to end with its status."""
        for number in NAMES:
            signal.signal(number, signal.SIG_IGN)

    def give_back(self, before: dict[int, Any]) -> None:
        """Restores the handlers that ``take`` returned."""
        for number, handler in before.items():
            signal.signal(number, handler)
        if sys.unraisablehook is self._hook:
            sys.unraisablehook, self._hears = self._unraisable, False
        self.stop_timer()
        self._forget()

    def _hear_unraisable(self, unraisable: Any) -> None:
        """Raises again an exception that a destructor or a callback swallowed, instead of printing it."""
        if not isinstance(unraisable.exc_value, Interrupted):
            self._unraisable(unraisable)
        elif not self.is_over:
            self._is_seen = False
            self._wake_after(SOON_S)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_woken:
            self._is_woken = False
            self._look_again(frame)
            return
        name = NAMES[signal.Signals(number)]
        if not self.is_running and not self.is_over:
            _end_at_once(interrupt_message(name))
        self._count += 1
        if self._count >= 3:
            _end_at_once(f"ended by a third signal ({name}), without closing what is open")
        if self.is_over:
            return
        if self.name:
            self._handle_another(frame)
            return
        self.name, self._number = name, number
        if self._ask:
            self._begin_asking(self._ask)
        elif not self._depth:
            self._raise_outside_imports(frame)
        else:
            _tell(f"{name}: the command ends once work that must not be interrupted is done")

    def _handle_another(self, frame: FrameType | None) -> None:
        if (self._ask or self._is_asked) and not (self._is_raised or self._depth):
            self._raise_outside_imports(frame)
        _tell(
            f"{self.name}: closing what is open; a further signal ends the process at once, without closing"
        )

    def _begin_asking(self, ask: Callable[[str], None]) -> None:
        _tell(f"{self.name}: the workers write a checkpoint and end, in at most {GRACE_S:.0f} s")
        self._wake_after(GRACE_S)
        try:
            ask(self.name)
        except Exception as error:
            _tell(f"cannot ask the workers to end: {error}")

    def _raise(self) -> None:
        self._is_raised, self._is_seen = True, False
        self._wake_after(UNSEEN_S)
        raise Interrupted(self.name)

    def _raise_outside_imports(self, frame: FrameType | None) -> None:
        if _is_importing(frame):
            self._wake_after(SOON_S)
        else:
            self._raise()

    def _wake_after(self, seconds: float) -> None:
        """Makes the main thread check again later, even if it is blocked then."""
        self.stop_timer()
        self._timer = threading.Timer(seconds, self._wake)
        self._timer.daemon = True
        self._timer.start()

    def _wake(self) -> None:
        self._is_woken = True
        # Sent to the thread, so that a blocking system call is interrupted as by a signal from outside.
        signal.pthread_kill(_main_ident(), self._number)

    def _look_again(self, frame: FrameType | None) -> None:
        if self.is_over or self._is_seen or not self.name:
            return
        if self._depth:
            self._wake_after(UNSEEN_S)
        else:
            self._raise_outside_imports(frame)

    def stop_timer(self) -> None:
        """Cancels the pending check."""
        if self._timer:
            self._timer.cancel()

    def see(self) -> None:
        """Notes that the exception has reached our code, if our code is closing something because of it."""
        if self._is_raised and _is_unwinding(sys.exc_info()[1]):
            self._is_seen = True

    def enter(self) -> None:
        """Begins a section that must not be interrupted."""
        self._depth += 1
        self.see()

    def leave(self) -> None:
        """Ends the section and raises the signal that came meanwhile."""
        self._depth -= 1
        if not self.name or self._depth or self._ask or self._is_asked or self.is_over:
            return
        # An exception that was raised before the section and is not propagating now has been swallowed.
        if not self._is_raised or not (self._is_seen or _is_unwinding(sys.exc_info()[1])):
            self._raise()

    def ask_with(self, ask: Callable[[str], None] | None) -> None:
        """Makes the first signal call ``ask`` in place of raising; None ends that."""
        self._ask = ask
        if ask is None and self.name and not self._is_raised:
            # The asked workers ended by themselves or were done; their results may still be processed.
            self._is_asked = True
            self.stop_timer()

    def raise_if_asked(self) -> None:
        """Raises a signal that came while workers could be asked and has been waiting since."""
        if self.name and not self._is_raised and not self.is_over:
            self._raise()


_signals = _Signals()
#: Locks of lines that are being logged; each is released once its line is out.
_pending_log_locks: list[Any] = []


def take_signals() -> None:
    """Installs our signal handlers in this process; for commands, in the main thread."""
    _signals.take()
    # Registered first, so called last. Python then restores the system's handlers, with which a signal at the
    # last moment would end the process with another status than its own.
    atexit.register(_signals.ignore)


@contextmanager
def command_running() -> Iterator[None]:
    """Marks a command as open; a signal before it ends the process, one after it changes nothing."""
    _signals.is_running = True
    try:
        yield
    finally:
        _signals.is_running, _signals.is_over = False, _signals.is_taken
        _signals.stop_timer()


def wait_for_handler_logs() -> None:
    """Waits a moment for lines logged by handlers, so that nothing comes after the command's last line."""
    while _pending_log_locks:
        _pending_log_locks.pop().acquire(timeout=1.0)


def end_command() -> None:
    """Marks the command as done: its result counts, and later signals change nothing."""
    _signals.is_over = _signals.is_taken


def raise_if_asked() -> None:
    """Ends a command between two of its steps if a signal came at the end of the first.

    Raises:
        Interrupted: if a signal came.
    """
    _signals.raise_if_asked()


def asked_by() -> str:
    """Returns the name of the signal that has ended the command; empty if none has."""
    _signals.see()
    return _signals.name


@contextmanager
def shielded() -> Iterator[None]:
    """Delays signals inside the context, for short work that must not be left half done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _signals.enter()
    try:
        yield
    finally:
        _signals.leave()


@contextmanager
def handlers_kept(*, below_python: bool = False) -> Iterator[None]:
    """Keeps a command's handlers while a library would install its own.

    Ray does so when it starts (its handler ends Ray first, after which nothing can be closed in order), and
    Ray Train does so for good when it trains.

    Args:
        below_python: True to also keep handlers from being replaced in C++, below Python's. Ray's prints a
            trace of addresses first, and when Ray ends it leaves the system's handler, which ends the process
            without a message. A thread checks every 2 ms, so use this only for short work.
    """
    if not _signals.is_taken:
        yield
        return
    original = signal.signal

    def keep(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in NAMES else original(number, handler)

    signal.signal = keep  # type: ignore[assignment]
    try:
        with kept_below_python(NAMES) if below_python else nullcontext():
            yield
    finally:
        signal.signal = original
        _signals.take()


@contextmanager
def workers_asked_to_end(ask: Callable[[str], None]) -> Iterator[None]:
    """Asks workers to end at the first signal; ends without them at a second one or after the grace time.

    Outside the main thread, which alone receives signals, this changes nothing.

    Args:
        ask: called with the signal's name to tell the workers, which then end by themselves.

    Raises:
        StoppedError: if they did not end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = None if _signals.is_taken else _signals.take()
    if before:
        _signals.is_running = True
    _signals.ask_with(ask)
    try:
        with handlers_kept():
            yield
    except KeyboardInterrupt as error:  # Ray turns ours into one of its own
        _signals.see()
        raise StoppedError(
            f"stopped by {_signals.name or error} before the workers had written a checkpoint",
            accepted="the same command continues from the last one",
        ) from None
    finally:
        _signals.ask_with(None)
        if before:
            _signals.give_back(before)


def _is_importing(frame: FrameType | None) -> bool:
    """Returns True if the interrupted code runs within an import, at any depth."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _is_unwinding(error: BaseException | None) -> bool:
    """Returns True if a block is being left because of an interrupt, or of an error caused by one."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def _tell(text: str) -> None:
    """Logs from within a handler, which may have come while this very thread writes to the log."""
    told = _thread.allocate_lock()
    told.acquire()
    _pending_log_locks.append(told)

    def log() -> None:
        try:
            logger.warning("%s", text)
        finally:
            told.release()

    _thread.start_new_thread(log, ())


def _end_at_once(text: str) -> None:
    try:
        # Not through sys.stderr, which the signal may have interrupted in the middle of a write.
        os.write(2, f"error: {text}\n".encode())
    finally:
        os._exit(STATUS)


def _main_ident() -> int:
    ident = threading.main_thread().ident
    assert ident is not None
    return ident


#: At least the size of the system's description of a handler (152 bytes on 64-bit Linux).
_SIGACTION_BYTES = 512


@contextmanager
def kept_below_python(numbers: Iterable[int]) -> Iterator[None]:
    """Reinstalls the system's current handlers again and again inside the context; on Linux only.

    Args:
        numbers: numbers of the signals.
    """
    if sys.platform != "linux":
        yield
        return
    sigaction = ctypes.CDLL(None).sigaction
    kept = {number: ctypes.create_string_buffer(_SIGACTION_BYTES) for number in numbers}
    for number, action in kept.items():
        sigaction(int(number), None, action)
    over = threading.Event()

    def put_back() -> None:
        while not over.wait(0.002):
            for number, action in kept.items():
                sigaction(int(number), action, None)

    thread = threading.Thread(target=put_back, name="signal handlers", daemon=True)
    try:
        thread.start()
        yield
    finally:
        over.set()
        if thread.is_alive():
            thread.join()
