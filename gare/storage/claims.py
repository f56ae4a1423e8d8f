"""Claims: files by which jobs ask for a store, and the process that stands behind each.

A process is known by its id and by its start in ticks of the kernel since the machine was started, with the
machine's boot id: none of them moves when the clock is set. Times of day, such as psutil's ``create_time``,
do.
"""

from __future__ import annotations

import functools
import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from gare.errors import DataError
from gare.storage.files import read_json_and_bytes

#: Stands between machine and start of the process in ``Claim.machine``. Both are in one field, so that
#: earlier versions, which refuse unknown fields, understand a claim: to them its machine is another one.
_START = " start "


@dataclass(frozen=True, order=True)
class Claim:
    """A job's file in the lock folder; the smaller one goes first.

    Attributes:
        since_ns: when it asked for the store, by its own clock.
        job: a name of its own.
        owner: user.
        host: name of its machine.
        machine: tells one set of process ids from another (two containers may share a host's name), and
            since claims have it, says in which tick the process started.
        pid: process id.
        started_s: when the process started, by a clock that may be set; all that earlier versions have.
        claimed: whether it has the store or is about to, as opposed to waiting.
    """

    since_ns: int
    job: str
    owner: str
    host: str
    machine: str
    pid: int
    started_s: float
    claimed: bool = False

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since_ns / 1e9))
        return f"{self.owner}@{self.host}, process {self.pid}, since {since}"

    def is_dead(self) -> bool:
        """Returns True if its process ran on this machine and is gone; False where that cannot be known."""
        machine, _, start = self.machine.partition(_START)
        if machine != _machine():
            return False
        if not psutil.pid_exists(self.pid):
            return True
        # A claim of an earlier version has no start in ticks. That its process seems to have started at
        # another time says nothing, since the clock may have been set; of a process id that is used again
        # its silence tells.
        return bool(start) and _start_ticks(self.pid) not in ("", start)


def own_claim() -> Claim:
    """A claim of this process, under a new name."""
    process = psutil.Process()
    start = _start_ticks(process.pid)
    return Claim(
        since_ns=time.time_ns(),
        job=uuid.uuid4().hex,
        owner=_owner(process),
        host=socket.gethostname(),
        machine=_machine() + (f"{_START}{start}" if start else ""),
        pid=process.pid,
        started_s=process.create_time(),
    )


def read_claim(location: str) -> tuple[Claim, bytes] | None:
    """A claim and the bytes that it is written in; None: it has been taken away meanwhile, or is no claim."""
    try:
        described, content = read_json_and_bytes(location)
        return Claim(**described), content
    except (DataError, TypeError):
        return None


def _start_ticks(pid: int) -> str:
    """Ticks from the start of the machine to that of a process; empty where the system does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The name of the program, in parentheses, may hold blanks and parentheses; field 22 is the start.
    return stat.rpartition(")")[2].split()[19]


def _owner(process: psutil.Process) -> str:
    try:
        return str(process.username())
    except (KeyError, psutil.Error):  # a container's user need not have a name
        return str(os.getuid())


@functools.cache
def _machine() -> str:
    def read(action: Callable[[], object]) -> str:
        try:
            return str(action()).strip()
        except OSError:  # not on Linux
            return ""

    boot = read(lambda: Path("/proc/sys/kernel/random/boot_id").read_text())
    return f"{socket.gethostname()} {boot} {read(lambda: Path('/proc/self/ns/pid').readlink())}"
