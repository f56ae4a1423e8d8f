"""Claims: files with which jobs ask for a store, each naming its process.

A process is identified by its id, its start in kernel ticks since boot, and the machine's boot id. Setting
the clock changes none of them, unlike times of day such as psutil's ``create_time``.
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

#: Separator between machine and process start in ``Claim.machine``. Both are in one field, so that earlier
#: versions, which refuse unknown fields, can read a claim; they take its machine for another one.
_START = " start "


@dataclass(frozen=True, order=True)
class Claim:
    """A job's file in the lock folder; the smaller one goes first.

    Attributes:
        since_ns: when the job asked for the store, by its own clock.
        job: unique name of the claim.
        owner: user.
        host: name of its machine.
        machine: identifies a set of process ids (two containers may share a host name); newer claims append
            the kernel tick at which the process started.
        pid: process id.
        started_s: process start by a clock that may be set; earlier versions have only this.
        claimed: True if the job has the store or is about to take it, False while it waits.
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
        """Returns True if its process ran on this machine and is gone; False if that cannot be known."""
        machine, _, start = self.machine.partition(_START)
        if machine != _machine():
            return False
        if not psutil.pid_exists(self.pid):
            return True
        # A claim of an earlier version has no start in ticks. A different start time proves nothing, since
        # the clock may have been set; if the process id was reused, the claim's silence will show it.
        return bool(start) and _start_ticks(self.pid) not in ("", start)


def own_claim() -> Claim:
    """Returns a claim of this process under a new name."""
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
    """Reads a claim and its bytes; None if it has been deleted meanwhile or is not a claim."""
    try:
        described, content = read_json_and_bytes(location)
        return Claim(**described), content
    except (DataError, TypeError):
        return None


def _start_ticks(pid: int) -> str:
    """Returns the ticks from boot to the start of a process; empty if the system does not tell."""
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
