"""The record of a run's steps and validations, beside its checkpoints; curves are drawn from it.

A run of days saves it at each checkpoint, so each save only adds the new points: ``history.json`` holds the
record up to some moment, and numbered parts in the folder ``history`` beside it hold the later points. A run
that begins, continues or ends writes all of it into ``history.json``.
"""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from gare.errors import DataError
from gare.storage.files import delete_file, exists, list_files, read_json, write_atomically

#: Points by metric name.
Points: TypeAlias = dict[str, list[tuple[int, float]]]

#: Number of parts after which the whole ``history.json`` is rewritten: a run may have thousands of
#: checkpoints.
MAX_PARTS = 200
THREADS = 16


@dataclass
class _Saved:
    """Parts that have been saved, shared by a record and its copies.

    Attributes:
        lengths: number of saved points of each metric, of steps and of epochs; None if all must be written.
        first: number of the first valid part.
        next: number of the next part.
    """

    lengths: tuple[dict[str, int], dict[str, int]] | None = None
    first: int = 0
    next: int = 0


@dataclass
class History:
    """Points by metric name: (step, value) for losses, (epochs done, value) for validations.

    Attributes:
        uri: JSON file that holds it, except for its newest points.
        steps: per optimiser step.
        epochs: per validation.
        resumed: steps after which the run was continued.
    """

    uri: str
    steps: Points = field(default_factory=dict)
    epochs: Points = field(default_factory=dict)
    resumed: list[int] = field(default_factory=list)
    _saved: _Saved = field(default_factory=_Saved, repr=False, compare=False)

    @classmethod
    def read(cls, uri: str, *, step: int | None = None, epoch: int | None = None) -> History:
        """Reads the record up to a step and an epoch; leaves out later points, which a restarted run repeats.

        Raises:
            DataError: where it cannot be read.
        """
        found = cls(uri)
        for tree in _read(uri):
            _extend(found.steps, tree.get("steps", {}), step)
            _extend(found.epochs, tree.get("epochs", {}), epoch)
            found.resumed = [at for at in tree.get("resumed", ()) if step is None or at <= step]
        return found

    def add_step(self, step: int, values: dict[str, float]) -> None:
        """Adds an optimiser step's values; a measure without a value (a mean of no pairs) gets no point."""
        for name, value in values.items():
            if math.isfinite(value):
                self.steps.setdefault(name, []).append((step, value))

    def add_epoch(self, epoch: int, values: dict[str, float]) -> None:
        """Adds the metrics of a validation."""
        for name, value in values.items():
            self.epochs.setdefault(name, []).append((epoch, value))

    def copy(self) -> History:
        """Copies the record as it is now, to save the copy while the record grows."""
        steps, epochs = (
            {name: list(points) for name, points in record.items()} for record in (self.steps, self.epochs)
        )
        return History(self.uri, steps, epochs, list(self.resumed), self._saved)

    def save(self) -> None:
        """Writes the points since the last save; writes everything if the record is new or was just read.

        Raises:
            DataError: where it cannot be written.
        """
        saved = self._saved
        if saved.lengths is None or saved.next - saved.first >= MAX_PARTS:
            self._save_whole()
        else:
            steps, epochs = (
                {name: points[old.get(name, 0) :] for name, points in record.items()}
                for record, old in zip((self.steps, self.epochs), saved.lengths, strict=True)
            )
            new = _tree(steps, epochs, self.resumed)
            if new["steps"] or new["epochs"]:
                _write(_part(self.uri, saved.next), new)
                saved.next += 1
        saved.lengths = _lengths(self.steps), _lengths(self.epochs)

    def _save_whole(self) -> None:
        older = _parts(self.uri)
        first = max(map(_number, older), default=-1) + 1
        _write(self.uri, _tree(self.steps, self.epochs, self.resumed) | {"first_part": first})
        self._saved.first = self._saved.next = first
        for file in older:
            delete_file(file)


def _read(uri: str) -> list[dict[str, Any]]:
    """Reads the file and its valid parts, in order."""
    for attempt in range(3):
        whole = read_json(uri) if exists(uri) else {}
        # Parts below the first are in the file already: the writer was killed before it deleted them.
        files = [file for file in _parts(uri) if _number(file) >= whole.get("first_part", 0)]
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                return [whole, *pool.map(read_json, files)]
        except DataError as error:
            # Merged into the file and deleted meanwhile.
            if attempt == 2 or not isinstance(error.__cause__, FileNotFoundError):
                raise
    raise AssertionError("unreachable")


def _lengths(record: Points) -> dict[str, int]:
    return {name: len(points) for name, points in record.items()}


def _tree(steps: Points, epochs: Points, resumed: list[int]) -> dict[str, Any]:
    kept = ({name: points for name, points in record.items() if points} for record in (steps, epochs))
    return dict(zip(("steps", "epochs"), kept, strict=True)) | {"resumed": resumed}


def _extend(record: Points, points: dict[str, list[list[float]]], last: int | None) -> None:
    for name, rows in points.items():
        new = [(int(at), value) for at, value in rows if last is None or at <= last]
        record.setdefault(name, []).extend(new)


def _write(uri: str, tree: dict[str, Any]) -> None:
    # Without indentation, for which json uses its slow encoder.
    write_atomically(uri, json.dumps(tree, allow_nan=False).encode())


def _folder(uri: str) -> str:
    return uri.removesuffix(".json")


def _part(uri: str, number: int) -> str:
    return f"{_folder(uri)}/{number:08d}.json"


def _parts(uri: str) -> list[str]:
    return list_files(_folder(uri), ".json")


def _number(part: str) -> int:
    return int(part.rsplit("/", 1)[-1].removesuffix(".json"))
