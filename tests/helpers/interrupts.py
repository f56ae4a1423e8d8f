"""A command that is interrupted at some moment of its life, and what must be true of it then."""

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
    """What a command leaves behind.

    Attributes:
        status: of its exit.
        stdout: all of it.
        stderr: all of it.
        seconds: from its start to its end.
        signalled: True where the signal found it alive.
        left: command lines of its processes that outlived it.
    """

    status: int
    stdout: str
    stderr: str
    seconds: float
    signalled: bool
    left: tuple[str, ...]

    @property
    def result(self) -> dict[str, Any] | None:
        """Its result; None: it has none."""
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
        repository: where it runs.
        step: name of the command.
        arguments: of it.
        interrupt: the signal, and after how many seconds; None: it runs to its end.
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
        # A shell's background job ignores Ctrl-C, and hands that on.
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
    """Status 4 with one message that names the signal; or the command was done before it came."""
    if ended.status == 0:
        assert ended.result is not None, ended.stderr
        return
    assert ended.status == STATUS, f"{ended.status}: {ended.stderr}"
    assert ended.stdout == ""
    messages = re.findall(r"^error: .*", ended.stderr, re.MULTILINE)
    assert len(messages) == 1, ended.stderr
    assert NAMES[number] in messages[0], messages
    assert "the same command continues" in messages[0], messages
    # Ray's own thread, where other Rays run on the machine.
    own = [line for line in ended.stderr.splitlines() if not line.startswith("(PlacementGroupCleaner ")]
    assert not any("Traceback" in line for line in own), ended.stderr
    assert not ended.left
