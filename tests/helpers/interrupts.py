"""Runs a command, interrupts it at a given moment, and checks how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.runtime.signals import NAMES, STATUS

PATIENCE_S = 240


@dataclass(frozen=True)
class Ended:
    """Result of a command that was run.

    Attributes:
        status: its exit status.
        stdout: its whole stdout.
        stderr: its whole stderr.
        seconds: time from its start to its end.
        signalled: True if it was still running when the signal was sent.
        left: command lines of child processes that outlived it.
    """

    status: int
    stdout: str
    stderr: str
    seconds: float
    signalled: bool
    left: tuple[str, ...]

    @property
    def result(self) -> dict[str, Any] | None:
        """The result that it printed; None if there is none."""
        lines = self.stdout.splitlines()
        return dict(json.loads(lines[-1])) if lines else None


def run_command(
    repository: Path,
    step: str,
    arguments: list[str],
    *,
    interrupt: tuple[signal.Signals, float] | None = None,
    **environment: str,
) -> Ended:
    """Runs ``python pipelines/STEP.py`` and interrupts it.

    Args:
        repository: folder to run it in.
        step: name of the command.
        arguments: its arguments.
        interrupt: signal, and seconds to wait before it; None to let the command finish.
        environment: variables to add.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, f"pipelines/{step}.py", *arguments],
        cwd=repository,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a shell ignores Ctrl-C, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    family: dict[int, psutil.Process] = {}
    signalled = threading.Event()

    def strike() -> None:
        assert interrupt is not None
        if process.poll() is None:
            with contextlib.suppress(psutil.Error):
                for one in psutil.Process(process.pid).children(recursive=True):
                    family[one.pid] = one
            signalled.set()
            process.send_signal(interrupt[0])

    timer = threading.Timer(interrupt[1], strike) if interrupt else None
    try:
        if timer:
            timer.start()
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    finally:
        if timer:
            timer.cancel()
        process.kill()
        process.wait()
    seconds = time.monotonic() - started
    _, alive = psutil.wait_procs(list(family.values()), timeout=30)
    left = tuple(" ".join(one.cmdline()) for one in alive if one.is_running())
    return Ended(process.returncode, stdout, stderr, seconds, signalled.is_set(), left)


def assert_ended_in_order(ended: Ended, number: signal.Signals) -> None:
    """Asserts status 4 with one message that names the signal, unless the command was done before it."""
    if ended.status == 0:
        assert ended.result is not None, ended.stderr
        return
    assert ended.status == STATUS, f"{ended.status}: {ended.stderr}"
    assert ended.stdout == ""
    messages = re.findall(r"^error: .*", ended.stderr, re.MULTILINE)
    assert len(messages) == 1, ended.stderr
    assert NAMES[number] in messages[0], messages
    assert "the same command continues" in messages[0], messages
    # From a thread of Ray, if other Ray instances run on this machine.
    own = [line for line in ended.stderr.splitlines() if not line.startswith("(PlacementGroupCleaner ")]
    assert not any("Traceback" in line for line in own), ended.stderr
    assert not ended.left
