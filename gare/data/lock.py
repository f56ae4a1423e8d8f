"""One writer at a time in a store, with nothing but files: a mounted disk or an object store will do.

A training run has one driver at a time by the same means. Every job that wants to write keeps a file of its
own in the store's folder ``lock``: ``waiting``, or ``claimed``. It holds the store once it has claimed it and
*then* sees no other claim of a living job: of two that claim at once at least the one that looks later sees
both, and the elder goes first. A claim is renewed while its job lives. The times that are compared are those
of the storage, so that clocks need not agree.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import psutil

from gare.data.files import (
    delete_file,
    delete_leftovers,
    join,
    list_files,
    open_fs,
    read_bytes,
    stat_file,
    write_json,
)
from gare.errors import DataError, GareError

logger = logging.getLogger(__name__)

FOLDER = "lock"
_POLL_S = 0.5
_TELL_EVERY_S = 60.0
#: Jobs that claim at the same moment settle who goes first within this.
_SETTLE_S = 5.0


@dataclass(frozen=True, order=True)
class Claim:
    """A job's file in the lock folder; the smaller one goes first.

    Attributes:
        since_ns: when it asked for the store, by its own clock.
        job: a name of its own.
        owner: user.
        host: name of its machine.
        machine: what tells one set of process ids from another: two containers may share a host's name.
        pid: process id.
        started_s: when the process started, since process ids are used again.
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
        """Whether its process ran on this machine and is gone; False where that cannot be known."""
        if self.machine != _machine():
            return False
        try:
            return bool(abs(psutil.Process(self.pid).create_time() - self.started_s) > 1)
        except psutil.NoSuchProcess:
            return True


class StoreLock:
    """Holds a store while the context lasts.

    Args:
        uri: the store, or another folder that one job at a time is to work in.
        when_locked: whether to wait for another job or to refuse.
        stale_s: seconds without a sign of life after which the claim of a job elsewhere is void.

    Who enters removes temporary files that killed jobs have left in the store, once they are older than
    ``stale_s``.

    Raises:
        DataError: on entering, where another job has the store and ``when_locked`` is ``refuse``, or if the
            folder cannot be written.
    """

    def __init__(
        self, uri: str, *, when_locked: Literal["wait", "refuse"] = "wait", stale_s: float = 120.0
    ) -> None:
        self.uri = uri
        self._refuses = when_locked == "refuse"
        self._stale_s = stale_s
        self._claim = _own_claim()
        self._location = join(uri, FOLDER, f"{self._claim.job}.json")
        self._ended = threading.Event()
        self._lost = ""
        self._thread = threading.Thread(target=self._renew_until_ended, daemon=True, name="store lock")

    def __enter__(self) -> Self:
        try:
            self._acquire()
            self._clear()
        except BaseException:
            delete_file(self._location)
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        delete_file(self._location)

    def check(self) -> None:
        """Makes sure that the store is still ours.

        Raises:
            GareError: where another job has taken it over, since this one showed no sign of life too long.
        """
        if self._lost:
            raise GareError(
                f"the lock was lost: {self._lost}",
                where=self.uri,
                accepted="run the same command again, it continues where this one stopped",
            )

    def _acquire(self) -> None:
        started = told = time.monotonic()
        self._write(claimed=False)
        first = True
        while True:
            others = self._living_claims()
            if not others:
                self._write(claimed=True)
                others = self._living_claims()
                if not others:
                    return
            now = time.monotonic()
            if any(other < self._claim for other in others):
                self._write(claimed=False)
                if self._refuses:
                    self._refuse(others)
            elif self._refuses and now - started > _SETTLE_S:
                self._refuse(others)
            if first or now - told > _TELL_EVERY_S:
                logger.warning("%s: waiting for another job: %s", self.uri, min(others))
                first, told = False, now
            time.sleep(_POLL_S)
            self._renew()

    def _clear(self) -> None:
        mine = stat_file(self._location)
        # A job that has lost the lock and does not know yet may still be writing.
        before_ns = mine[1] - int(self._stale_s * 1e9) if mine else 0
        try:
            if deleted := delete_leftovers(self.uri, before_ns):
                logger.info("%s: removed %d temporary files of killed jobs", self.uri, deleted)
        except DataError as error:  # another user's, for one: nothing that the work needs
            logger.warning("%s", error)

    def _refuse(self, others: list[Claim]) -> None:
        raise DataError(
            f"another job works here: {min(others)}",
            where=self.uri,
            accepted="wait for it, or upkeep.when_locked=wait",
        )

    def _living_claims(self) -> list[Claim]:
        """Claims of others; those of dead jobs are taken away."""
        mine = stat_file(self._location)
        living = []
        for location in list_files(join(self.uri, FOLDER), ".json"):
            claim, info = _read_claim(location), stat_file(location)
            if claim is None or info is None or claim.job == self._claim.job:
                continue
            silent_s = (mine[1] - info[1]) / 1e9 if mine else 0.0
            if claim.is_dead() or silent_s > self._stale_s:
                why = "its process is gone" if claim.is_dead() else f"no sign of life for {silent_s:.0f} s"
                if claim.claimed:
                    logger.warning("%s: taking over from %s: %s", self.uri, claim, why)
                delete_file(location)
            elif claim.claimed:
                living.append(claim)
        return living

    def _write(self, *, claimed: bool) -> None:
        self._claim = dataclasses.replace(self._claim, claimed=claimed)
        write_json(self._location, dataclasses.asdict(self._claim))

    def _renew(self) -> bool:
        """Shows a sign of life; False where another job has taken the file away."""
        filesystem, path = open_fs(self._location)
        if filesystem.type_name == "local":
            try:
                os.utime(path)  # works on a full disk, and never brings a file back
            except FileNotFoundError:
                return False
            return True
        if stat_file(self._location) is None:
            return False
        write_json(self._location, dataclasses.asdict(self._claim))
        return True

    def _renew_until_ended(self) -> None:
        while not self._ended.wait(self._stale_s / 6):
            try:
                if not self._renew():
                    self._lost = "another job has taken it over"
                    return
            except (DataError, OSError) as error:
                logger.warning("%s: the lock cannot be renewed: %s", self.uri, error)


def _read_claim(location: str) -> Claim | None:
    """None: it has been taken away meanwhile, or is no claim."""
    try:
        return Claim(**json.loads(read_bytes(location)))
    except (DataError, TypeError, ValueError):
        return None


def _own_claim() -> Claim:
    process = psutil.Process()
    return Claim(
        since_ns=time.time_ns(),
        job=uuid.uuid4().hex,
        owner=_owner(process),
        host=socket.gethostname(),
        machine=_machine(),
        pid=process.pid,
        started_s=process.create_time(),
    )


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
