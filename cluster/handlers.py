"""Handlers of signals below Python, which C++ may replace without Python's knowledge."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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
