"""Ending a command on SIGTERM or Ctrl-C: at any moment, in one way, with what there is to keep kept.

The first signal raises ``Interrupted`` in the main thread, so that all that is open is closed. It waits while
something goes on that must not be cut in two (``shielded``), and workers that have something to keep are
asked to end by themselves (``asking``), which a second signal does not wait for any longer. A third ends the
process without closing anything.

Not within an import: what is half imported stays so for the rest of the process, and an extension written in
C++ may abort at an exception while it sets itself up, as Triton does. The signal waits for the import's end.

This module imports nothing that takes time, so that a command can take signals before it imports the rest.
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

#: The signals, by the name that messages give them.
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
STATUS = 4
#: Seconds that workers get to write a checkpoint before the driver ends all the same; Kubernetes waits 30.
GRACE_S = 25.0
#: Seconds after which an exception that nobody has seen is raised again: libraries swallow one that is raised
#: within a destructor or a callback.
UNSEEN_S = 10.0
#: The same for one that Python itself says it has swallowed, and between two looks at an import under way.
SOON_S = 0.05


class Interrupted(KeyboardInterrupt):
    """The end of a command by a signal, whose name is its text."""


def message(name: str) -> str:
    """The words by which a command says that a signal ended it."""
    return f"interrupted by {name}; the same command continues where this one stopped"


class _Signals:
    """State of this process's signals, and their handlers; there is one.

    Attributes:
        is_taken: True while the handlers are ours.
        is_running: False before the command has begun, when there is nothing to close.
        is_over: True once the command has ended, and its status is fixed.
        name: of the first signal; empty: none has come.
    """

    def __init__(self) -> None:
        self._unraisable: Callable[[Any], Any] = sys.unraisablehook
        self._hook = self._hear_unraisable  # one object, by which it is known again
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
        """Installs the handlers; returns those before. What is ignored stays so, as below ``nohup``."""
        before: dict[int, Any] = {number: signal.getsignal(number) for number in NAMES}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        if not self._hears:  # once: a library may have put one before ours since, which calls it
            self._unraisable, sys.unraisablehook = sys.unraisablehook, self._hook
            self._hears = True
        self.is_taken = True
        return before

    def ignore(self) -> None:
        """Ignores signals from here on: the process is about to end with its status."""
        for number in NAMES:
            signal.signal(number, signal.SIG_IGN)

    def give_back(self, before: dict[int, Any]) -> None:
        """Installs the handlers that ``take`` has found."""
        for number, handler in before.items():
            signal.signal(number, handler)
        if sys.unraisablehook is self._hook:
            sys.unraisablehook, self._hears = self._unraisable, False
        self.stop_timer()
        self._forget()

    def _hear_unraisable(self, unraisable: Any) -> None:
        """Raises again what a destructor or a callback had to swallow, instead of printing it."""
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
            _end_at_once(message(name))
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
            _tell(f"{name}: the command ends once what must not be cut in two is done")

    def _handle_another(self, frame: FrameType | None) -> None:
        if (self._ask or self._is_asked) and not (self._is_raised or self._depth):
            self._raise_outside_imports(frame)
        _tell(f"{self.name}: what is open is being closed; once more ends at once, without that")

    def _begin_asking(self, ask: Callable[[str], None]) -> None:
        _tell(f"{self.name}: the workers write a checkpoint and end, in at most {GRACE_S:.0f} s")
        self._wake_after(GRACE_S)
        try:
            ask(self.name)
        except Exception as error:
            _tell(f"the workers cannot be told: {error}")

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
        """Has the main thread look again later, whatever it waits for then."""
        self.stop_timer()
        self._timer = threading.Timer(seconds, self._wake)
        self._timer.daemon = True
        self._timer.start()

    def _wake(self) -> None:
        self._is_woken = True
        # Sent to the thread, so that what it waits for in the system is ended as by a signal from outside.
        signal.pthread_kill(_main_ident(), self._number)

    def _look_again(self, frame: FrameType | None) -> None:
        if self.is_over or self._is_seen or not self.name:
            return
        if self._depth:
            self._wake_after(UNSEEN_S)
        else:
            self._raise_outside_imports(frame)

    def stop_timer(self) -> None:
        """Forgets what was to be looked at again."""
        if self._timer:
            self._timer.cancel()

    def see(self) -> None:
        """Notes that the exception has reached code of ours, where that is what closes something for it."""
        if self._is_raised and _is_unwinding(sys.exc_info()[1]):
            self._is_seen = True

    def enter(self) -> None:
        """Begins what must not be cut in two."""
        self._depth += 1
        self.see()

    def leave(self) -> None:
        """Ends it, and raises what came meanwhile."""
        self._depth -= 1
        if not self.name or self._depth or self._ask or self._is_asked or self.is_over:
            return
        # One that was raised before this began, and is not on its way, has been swallowed.
        if not self._is_raised or not (self._is_seen or _is_unwinding(sys.exc_info()[1])):
            self._raise()

    def ask_with(self, ask: Callable[[str], None] | None) -> None:
        """Has the first signal ask, in place of raising; None: no longer."""
        self._ask = ask
        if ask is None and self.name and not self._is_raised:
            # Who was asked has ended by himself, or was done: what is to be done with that may still be done.
            self._is_asked = True
            self.stop_timer()

    def raise_if_asked(self) -> None:
        """Raises what came while somebody could be asked, and has been waiting since."""
        if self.name and not self._is_raised and not self.is_over:
            self._raise()


_signals = _Signals()
#: Locks of lines that are being logged; each is free once its line is out.
_being_told: list[Any] = []


def take_signals() -> None:
    """Ends this process in our way from here on, where a signal says so; for commands, in the main thread."""
    _signals.take()
    # Registered first, called last. Python then goes back to the system's handlers, by which a signal in the
    # last moment would end the process with another status than its own.
    atexit.register(_signals.ignore)


@contextmanager
def command_running() -> Iterator[None]:
    """Says that a command is open; a signal before it ends the process, one after it changes nothing."""
    _signals.is_running = True
    try:
        yield
    finally:
        _signals.is_running, _signals.is_over = False, _signals.is_taken
        _signals.stop_timer()


def wait_until_told() -> None:
    """Waits a moment for what handlers have logged, so that nothing comes after the command's last line."""
    while _being_told:
        _being_told.pop().acquire(timeout=1.0)


def end_command() -> None:
    """Says that the command is done: its result counts, and a signal changes nothing any more."""
    _signals.is_over = _signals.is_taken


def raise_if_asked() -> None:
    """Ends a command of several steps between two of them, where a signal came at the end of the first.

    Raises:
        Interrupted: where one did.
    """
    _signals.raise_if_asked()


def asked_by() -> str:
    """Name of the signal that has ended the command; empty: none has."""
    _signals.see()
    return _signals.name


@contextmanager
def shielded() -> Iterator[None]:
    """Lets nothing be raised while it lasts: for short work that would leave something half open."""
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
    """Keeps the handlers of a command while a library would put its own in their place.

    Ray does so when it starts (its own ends Ray first, after which nothing can be closed in order), and Ray
    Train when it trains, for good.

    Args:
        below_python: whether handlers are also kept that C++ puts below Python's: Ray's prints a trace of
            addresses first, and when Ray ends it leaves the system's there, which ends the process without
            a word. A thread looks every 2 ms, so this is for what is short.
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
def asking(ask: Callable[[str], None]) -> Iterator[None]:
    """Asks workers to end at the first signal; ends without them at a second one, or after the grace.

    Outside the main thread, which alone gets signals, nothing changes.

    Args:
        ask: tells the workers, with the signal's name; they then end what is inside by themselves.

    Raises:
        StoppedError: where they did not.
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
    except KeyboardInterrupt as error:  # Ray makes one of its own of ours
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
    """True where the code that a signal interrupted runs within an import, however far below."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _is_unwinding(error: BaseException | None) -> bool:
    """True where a block is left because of an interrupt, or of a fault that came of one."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def _tell(text: str) -> None:
    """Logs from within a handler, which may have come while this very thread writes to the log."""
    told = _thread.allocate_lock()
    told.acquire()
    _being_told.append(told)

    def log() -> None:
        try:
            logger.warning("%s", text)
        finally:
            told.release()

    _thread.start_new_thread(log, ())


def _end_at_once(text: str) -> None:
    try:
        # Not by sys.stderr, in the midst of whose write the signal may have come.
        os.write(2, f"error: {text}\n".encode())
    finally:
        os._exit(STATUS)


def _main_ident() -> int:
    ident = threading.main_thread().ident
    assert ident is not None
    return ident


#: At least what the system's description of a handler takes (152 on 64-bit Linux).
_SIGACTION_BYTES = 512


@contextmanager
def kept_below_python(numbers: Iterable[int]) -> Iterator[None]:
    """Puts the handlers that the system calls now in place again and again; on Linux alone.

    Args:
        numbers: of the signals.
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
