"""A lock for one writer at a time in a store, made of plain files on a disk or in an object store.

The same lock gives a training run one driver at a time. Every job that wants to write keeps its own file in
the store's folder ``lock``: ``waiting`` or ``claimed``. It holds the store once it has claimed it and *then*
sees no other claim of a living job. If two jobs claim at once, at least the one that looks later sees both
claims, and the older one goes first. A claim is renewed while its job lives; one that does not change for a
while, by the steady clock of the job that looks, is void. No two clocks are compared, and no clock that can
be set.

The job that has claimed the store begins a generation, see ``gare.storage.generations``. It holds the store
as long as its claim is there and no job has begun a newer generation.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from functools import partial
from types import TracebackType
from typing import Literal, Self

from gare.errors import DataError
from gare.storage.claims import Claim, own_claim, read_claim
from gare.storage.exclusive import renew_object
from gare.storage.files import (
    delete_file,
    delete_leftovers,
    exists,
    join,
    json_bytes,
    list_files,
    open_fs,
    stat_file,
    write_json,
)
from gare.storage.generations import (
    Generation,
    HeldStore,
    OwnedFolder,
    begin_generation,
    forget_generations_before,
    newest_number,
    release_generation,
    withdraw_generation,
)
from gare.storage.uninterrupted import run_uninterrupted

logger = logging.getLogger(__name__)

FOLDER = "lock"
_POLL_S = 0.5
_TELL_EVERY_S = 60.0
#: Seconds within which jobs that claim at the same moment settle which one goes first.
_SETTLE_S = 5.0


class _Silence:
    """Measures for how long claims have not changed.

    Only time during which this job keeps looking counts: a job that was suspended itself, perhaps with the
    owner of the claim, has learnt nothing meanwhile.

    Args:
        stale_s: seconds after which a claim is void.
    """

    def __init__(self, stale_s: float) -> None:
        self._most_between_looks_s = max(stale_s / 6, 2 * _POLL_S)
        self._looked = time.monotonic()
        self._step_s = 0.0
        self._seen: dict[str, tuple[object, float, bool]] = {}

    def look(self) -> None:
        """Begins a look at all claims."""
        now = time.monotonic()
        self._step_s = min(now - self._looked, self._most_between_looks_s)
        self._looked = now

    def of(self, location: str, sign: object) -> tuple[float, bool]:
        """Returns the seconds a claim has not changed for, and True if it ever changed while we looked."""
        before, silent_s, has_changed = self._seen.get(location, (None, 0.0, False))
        if before == sign:
            silent_s += self._step_s
        else:
            silent_s, has_changed = 0.0, before is not None
        self._seen[location] = (sign, silent_s, has_changed)
        return silent_s, has_changed


class StoreLock:
    """Context manager that holds the lock of a store.

    Args:
        uri: the store, or another folder that one job at a time is to work in.
        when_locked: whether to wait for another job or to refuse.
        stale_s: seconds without a sign of life, while this job looks, after which the claim of a job
            elsewhere is void.

    Entering removes temporary files that killed jobs have left in the store, once they are older than
    ``stale_s``.

    Raises:
        DataError: on entering, if another job has the store and ``when_locked`` is ``refuse``, or if the
            folder cannot be written.
    """

    def __init__(
        self, uri: str, *, when_locked: Literal["wait", "refuse"] = "wait", stale_s: float = 120.0
    ) -> None:
        self.uri = uri
        self._refuses = when_locked == "refuse"
        self._stale_s = stale_s
        self._claim = own_claim()
        self._location = join(uri, FOLDER, f"{self._claim.job}.json")
        self._ended = threading.Event()
        self._lost = False
        self._confirmed_s = _steady_s()
        self._generation = Generation()
        self._silence = _Silence(stale_s)
        #: Jobs with a claim that was already old when first seen, until it is clear whether they live.
        self._doubtful: set[str] = set()
        self._thread = threading.Thread(target=self._renew_until_ended, daemon=True, name="store lock")

    def __enter__(self) -> Self:
        try:
            self._begin()
            self._clear()
            self._thread.start()
        except BaseException:
            self._ended.set()
            delete_file(self._location)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        run_uninterrupted(partial(self._leave, went_through=kind is None), f"freeing {self.uri}")

    def _leave(self, *, went_through: bool) -> None:
        self._ended.set()
        self._thread.join()
        try:
            # After a fault, workers may still be about to write.
            if went_through and not self._lost and self._is_ours():
                release_generation(self.uri, self._generation)
        except DataError as error:  # harmless: the next job then fences a job that writes no more
            logger.warning("%s", error)
        finally:
            delete_file(self._location)

    @property
    def held(self) -> HeldStore:
        """Generation number and check of the lock, for what the holder writes."""
        return HeldStore(self._generation.number, self.raise_if_lost)

    @property
    def owned(self) -> OwnedFolder:
        """Proof of ownership for workers on other machines."""
        return OwnedFolder(self.uri, self._generation.number)

    def raise_if_lost(self) -> None:
        """Raises an error if this job no longer holds the store, as far as the storage has said lately.

        Raises:
            LockLostError: if another job has taken it over, since this one showed no sign of life for too
                long.
            DataError: if the storage did not answer for so long that the store may have been taken over.
        """
        if not self._lost:
            try:
                self._lost = not self._is_ours()
            except DataError:
                # The storage does not answer for a moment; other jobs wait longer before they take over.
                if _steady_s() - self._confirmed_s > self._stale_s / 2:
                    raise
        if self._lost:
            raise self.owned.lost_error()

    def _begin(self) -> None:
        """Acquires the store and begins a generation; starts again if another job got the store meanwhile."""
        while True:
            self._acquire()
            begun = begin_generation(self.uri, self._claim.job, lambda: exists(self._location))
            if begun is None:
                continue
            self._generation = begun
            if self._is_ours():
                forget_generations_before(self.uri, begun)
                return
            # Suspended for long between the two: another job has the store.
            withdraw_generation(self.uri, begun)

    def _is_ours(self) -> bool:
        looked_s = _steady_s()
        if newest_number(self.uri) != self._generation.number or not exists(self._location):
            return False
        self._confirmed_s = looked_s
        return True

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
            certain = [other for other in others if other.job not in self._doubtful]
            if any(other < self._claim for other in others):
                self._write(claimed=False)
                if self._refuses and any(other < self._claim for other in certain):
                    self._refuse(certain)
            elif self._refuses and certain and now - started > _SETTLE_S:
                self._refuse(certain)
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
        except DataError as error:  # such as another user's files; the work does not need this
            logger.warning("%s", error)

    def _refuse(self, others: list[Claim]) -> None:
        raise DataError(
            f"another job works here: {min(others)}",
            where=self.uri,
            accepted="wait for it, or upkeep.when_locked=wait",
        )

    def _living_claims(self) -> list[Claim]:
        """Returns other living jobs that have claimed the store; deletes the claims of dead jobs."""
        mine = stat_file(self._location)
        self._silence.look()
        living = []
        for location in list_files(join(self.uri, FOLDER), ".json"):
            found, info = read_claim(location), stat_file(location)
            if found is None or info is None or found[0].job == self._claim.job:
                continue
            claim, content = found
            silent_s, has_changed = self._silence.of(location, (content, info))
            if claim.is_dead() or silent_s > self._stale_s:
                why = "its process is gone" if claim.is_dead() else f"no sign of life for {silent_s:.0f} s"
                if claim.claimed:
                    logger.warning("%s: taking over from %s: %s", self.uri, claim, why)
                delete_file(location)
            elif claim.claimed:
                living.append(claim)
                # The storage's clock may have been set since, so that age alone is not enough.
                is_old = mine is not None and (mine[1] - info[1]) / 1e9 > self._stale_s
                (self._doubtful.add if is_old and not has_changed else self._doubtful.discard)(claim.job)
        return living

    def _write(self, *, claimed: bool) -> None:
        self._claim = dataclasses.replace(self._claim, claimed=claimed)
        write_json(self._location, dataclasses.asdict(self._claim))

    def _renew(self) -> bool:
        """Renews the claim; returns False if another job has deleted its file."""
        filesystem, path = open_fs(self._location)
        if filesystem.type_name == "local":
            try:
                os.utime(path)  # works on a full disk, and never brings a file back
            except FileNotFoundError:
                return False
            except OSError as error:
                raise DataError(f"cannot be renewed: {error.strerror}", where=self._location) from error
            return True
        return renew_object(self._location, json_bytes(dataclasses.asdict(self._claim)))

    def _renew_until_ended(self) -> None:
        while not self._ended.wait(self._stale_s / 6):
            try:
                if not self._renew() or not self._is_ours():
                    self._lost = True
                    logger.error("%s: the lock was lost: another job has taken it over", self.uri)
                    # Renewing may have recreated the file that the other job had deleted.
                    delete_file(self._location)
                    return
            except DataError as error:
                logger.warning("%s: the lock cannot be renewed: %s", self.uri, error)


def _steady_s() -> float:
    """Returns seconds of a clock that cannot be set and goes on while the machine is suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
