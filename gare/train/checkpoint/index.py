"""The checkpoints of a run: their index, the rule by which they are kept, and the thread that writes them.

``INDEX`` is authoritative: a folder that it does not name was never finished. It is written last and
atomically, so that earlier checkpoints survive a kill at any time.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gare.errors import CheckpointError, DataError, FullDiskError, GareError, without_secrets
from gare.storage.files import delete_leftovers, delete_tree, exists, join, list_files, read_json, write_json
from gare.storage.patience import PATIENCE_S, retry_until_answered
from gare.train.checkpoint.history import History
from gare.train.checkpoint.sums import sha256_of

if TYPE_CHECKING:
    from gare.train.checkpoint.files import CapturedState

logger = logging.getLogger(__name__)

INDEX = "index.json"
_ANOTHER_INDEX = "a copy of it as it was written, or train.overwrite=true"


@dataclass(frozen=True)
class Entry:
    """One checkpoint.

    Attributes:
        step: optimiser steps done.
        epoch: epochs done, including their validation.
        metrics: on val; empty for a checkpoint within an epoch.
        sha256: of its files, by name; empty for a checkpoint of an earlier version.
    """

    step: int
    epoch: int
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    sha256: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """Name of its folder; names sort in the order of the training."""
        return f"epoch-{self.epoch:04d}-step-{self.step:08d}"


class Checkpoints:
    """The folder of a run's checkpoints.

    Args:
        uri: the folder.
        keep: number of the last checkpoints to keep; None for all.
        score: metric whose best checkpoint is kept too, the first of equals; empty for none.
    """

    def __init__(self, uri: str, *, keep: int | None = 1, score: str = "") -> None:
        self.uri, self.keep, self.score = uri, keep, score

    def entries(self) -> list[Entry]:
        """Reads the complete checkpoints, in the order of the training.

        Raises:
            CheckpointError: for a file that is not an index.
            DataError: where the storage does not answer.
        """
        return self._read()[0]

    def _read(self) -> tuple[list[Entry], bool]:
        """Returns the entries, and True if a row was left out because it was changed."""
        index = join(self.uri, INDEX)
        if not exists(index):
            return [], False
        try:
            rows = read_json(index)
            found = [_entry_of(row) for row in rows]
        except (DataError, KeyError, TypeError, ValueError) as error:
            if isinstance(error.__cause__, OSError):
                raise
            raise CheckpointError(f"cannot be read: {error}", where=index, accepted=_ANOTHER_INDEX) from error
        damaged = [number for number, entry in enumerate(found, 1) if entry is None]
        if damaged and len(damaged) == len(found):
            raise CheckpointError("is not as it was written", where=index, accepted=_ANOTHER_INDEX)
        for number in damaged:
            logger.warning(
                "%s: row %d is not as it was written, skipping its checkpoint",
                without_secrets(index),
                number,
            )
        return sorted(filter(None, found), key=lambda entry: entry.name), bool(damaged)

    def location(self, entry: Entry) -> str:
        """Returns the location of a checkpoint."""
        return join(self.uri, entry.name)

    def best(self) -> Entry | None:
        """Returns the checkpoint with the highest score, the first of equals; without a score, the last."""
        return next(iter(self.ranked()), None)

    def ranked(self) -> list[Entry]:
        """Sorts checkpoints by score, ``best`` first; those without a score are left out."""
        return _ranked(self.entries(), self.score)

    def remove_from_index(self, entry: Entry) -> None:
        """Removes a checkpoint from the index; its folder stays.

        Raises:
            DataError: if the index cannot be written.
        """
        self._write([one for one in self.entries() if one.name != entry.name])

    def add(self, entry: Entry) -> None:
        """Adds a folder that has been written to the index, and deletes those that are no longer kept.

        Raises:
            DataError: if the index cannot be written; it then does not have the folder.
        """
        known = [one for one in self.entries() if one.name != entry.name]
        entries = sorted([*known, entry], key=lambda one: one.name)
        best = next(iter(_ranked(entries, self.score)), None)
        last = entries if self.keep is None else entries[-self.keep :]
        kept = [one for one in entries if one in last or one is best]
        self._write(kept)
        for one in entries:
            if one not in kept:
                self._delete(one.name)

    def remove_after(self, entry: Entry | None) -> None:
        """Removes the checkpoints after a given one (all for None), and deletes unfinished folders."""
        try:
            # From a writer that was killed: there is only one writer, and it has not started yet.
            delete_leftovers(self.uri, time.time_ns())
        except DataError as error:
            logger.warning("what a killed writer left stays: %s", error)
        entries, damaged = self._read()
        kept = [one for one in entries if entry is not None and one.name <= entry.name]
        if damaged or len(kept) < len(entries):
            self._write(kept)
        names = {one.name for one in kept}
        prefix = self.uri.rstrip("/") + "/"
        found = {file.removeprefix(prefix).split("/")[0] for file in list_files(self.uri, recursive=True)}
        for name in sorted(found - names - {INDEX}):
            self._delete(name)

    def _write(self, entries: list[Entry]) -> None:
        write_json(join(self.uri, INDEX), [_row_of(entry) for entry in entries])

    def _delete(self, name: str) -> None:
        try:
            delete_tree(join(self.uri, name))
        except DataError as error:
            # It only costs space; the next start tries again.
            logger.warning("an old checkpoint stays: %s", error)


def _ranked(entries: list[Entry], score: str) -> list[Entry]:
    if not score:
        return entries[::-1]
    scored = [entry for entry in entries if score in entry.metrics]
    return sorted(scored, key=lambda entry: -entry.metrics[score])  # stable: the first of equals


def _row_of(entry: Entry) -> dict[str, Any]:
    """Returns a row of the index; besides the SHA-256 of the files it has its own."""
    row = {"step": entry.step, "epoch": entry.epoch, "metrics": dict(entry.metrics)}
    if not entry.sha256:
        return row
    row["sha256"] = dict(entry.sha256)
    return row | {"row_sha256": sha256_of(json.dumps(row, sort_keys=True).encode())}


def _entry_of(row: Any) -> Entry | None:
    """Reads the checkpoint of a row; None if the row was changed."""
    if set(row) == {"step", "epoch", "metrics"}:  # as earlier versions wrote it
        return Entry(int(row["step"]), int(row["epoch"]), dict(row["metrics"]))
    try:
        entry = Entry(row["step"], row["epoch"], dict(row["metrics"]), dict(row["sha256"]))
        return entry if row == _row_of(entry) else None
    except (KeyError, TypeError, ValueError):
        return None


class CheckpointWriter:
    """Writer of checkpoints in a separate thread, one at a time, while training goes on.

    Args:
        checkpoints: to write into.
        patience_s: seconds for which writing to a failing storage is retried.
    """

    def __init__(self, checkpoints: Checkpoints, *, patience_s: float = PATIENCE_S) -> None:
        self.checkpoints, self.patience_s = checkpoints, patience_s
        self.fault: GareError | None = None
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """True while a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def write(self, captured: CapturedState, entry: Entry, history: History) -> None:
        """Starts to write a checkpoint; waits for an earlier one first, since each holds a copy of the model.

        Args:
            captured: the content to write.
            entry: its entry in the index.
            history: the record up to this step, which no longer changes; it is saved first.
        """
        self.wait()
        self._thread = threading.Thread(
            target=self._write, args=(captured, entry, history), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Waits until nothing is being written; ``fault`` then says whether it succeeded."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, captured: CapturedState, entry: Entry, history: History) -> None:
        from gare.train.checkpoint.files import write_checkpoint

        location = self.checkpoints.location(entry)

        def attempt() -> None:
            history.save()
            sums = write_checkpoint(location, captured)
            self.checkpoints.add(replace(entry, sha256=sums))

        try:
            retry_until_answered(
                attempt, f"the checkpoint of step {entry.step} cannot be written", self.patience_s
            )
        except GareError as error:
            self._give_up(entry, location, error)
        except Exception as error:
            self._give_up(entry, location, GareError(f"{type(error).__name__}: {error}"))

    def _give_up(self, entry: Entry, location: str, error: GareError) -> None:
        last = "its last checkpoint"
        try:
            earlier = self.checkpoints.entries()
            last = f"step {earlier[-1].step}, whose checkpoint is kept" if earlier else "its beginning"
            if not any(one.name == entry.name for one in earlier):
                # Half a checkpoint would take the space that the next one needs.
                delete_tree(location)
        except GareError as fault:
            logger.warning("what was written of the checkpoint of step %d stays: %s", entry.step, fault)
        mend = "make room there" if isinstance(error, FullDiskError) else "mend that"
        self.fault = GareError(
            f"the checkpoint of step {entry.step} cannot be written: {error.what}",
            where=error.where or location,
            accepted=f"{mend}; the same command then continues from {last}",
        )
