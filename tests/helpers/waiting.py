"""Waiting for what happens in another process, which can only be polled."""

from __future__ import annotations

import contextlib
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")


def wait_until(
    condition: Callable[[], T],
    *,
    within_s: float,
    every_s: float = 0.05,
    process: subprocess.Popen[bytes] | subprocess.Popen[str] | None = None,
    log: Path | None = None,
) -> T:
    """Calls a condition again and again until what it returns is true, and returns that.

    Args:
        condition: what is waited for.
        within_s: seconds after which the test fails.
        every_s: seconds between two calls.
        process: without it, waiting is in vain: the test fails when it ends.
        log: its output, which the failure shows.
    """
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        said = log.read_text() if log else ""
        if process is not None and process.poll() is not None:
            pytest.fail(f"the process has ended with {process.returncode}: {said}")
        if time.monotonic() > deadline:
            pytest.fail(f"not within {within_s:g} s: {said}")
        time.sleep(every_s)
    return found


def answers(request: str | urllib.request.Request) -> bool:
    """Returns True if a server answers a request."""
    with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5):
        return True
    return False
