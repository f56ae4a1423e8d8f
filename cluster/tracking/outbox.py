"""Entries that the tracking server has not accepted yet, kept in a JSON-lines file.

Entries are idempotent: a metric carries its own time, a tag its value, so sending one twice does no harm.
The file is therefore emptied only once everything in it has been delivered.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)

#: MLflow's limits for one batch.
MAX_METRICS = 1000
MAX_TAGS = 100

#: Suffix of files with lines or objects that are not entries.
DAMAGED = ".damaged"

# Lines that are not entries and that this process has reported.
_named: set[tuple[str, bytes]] = set()

#: ``run_id``, and any of ``metrics`` (key, value, timestamp in ms, step), ``tags`` (key, value), ``status``;
#: ``once`` to leave out metrics of a step that the run has already.
Entry = dict[str, Any]


class Outbox(Protocol):
    """Keeps entries until they can be delivered; can be pickled, and ``str`` gives its location."""

    def add(self, entry: Entry) -> None:
        """Stores one entry.

        Raises:
            Exception: if it cannot be stored.
        """

    def deliver(self, send: Callable[[Entry], None]) -> int:
        """Sends all stored entries, as the function ``deliver``."""


@dataclass(frozen=True)
class FileOutbox:
    """Outbox in a local file."""

    path: str

    def __str__(self) -> str:
        return self.path

    def add(self, entry: Entry) -> None:
        """Appends an entry."""
        add(self.path, entry)

    def deliver(self, send: Callable[[Entry], None]) -> int:
        """Delivers its entries."""
        return deliver(self.path, send)


def add(path: str | Path, entry: Entry) -> None:
    """Appends one entry; safe with other processes of this machine.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # An incomplete line, left by a killed process, stays on a line of its own.
        torn = bool(file.seek(0, os.SEEK_END)) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * torn + json.dumps(entry).encode() + b"\n")


def deliver(path: str | Path, send: Callable[[Entry], None]) -> int:
    """Sends all entries of the file and empties it.

    Args:
        path: the file; if it is missing, nothing happens.
        send: delivers one entry. Any exception from it ends the delivery, and the file stays as it was.

    Returns:
        The number of lines delivered.
    """
    path = Path(path)
    if not path.exists() or not path.stat().st_size:
        return 0
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        entries, damaged = [], []
        for number, line in enumerate(file, start=1):
            try:
                entries.append(parse(line))
            except ValueError:
                damaged.append(line.rstrip(b"\n") + b"\n")
                _warn_once(path, number, line)
        for entry in merge(entries):
            send(entry)
        if damaged:
            with path.with_name(path.name + DAMAGED).open("ab") as aside:
                aside.writelines(damaged)
        # The file itself stays: another process may hold it open, waiting to append.
        file.truncate(0)
    return len(entries)


def parse(text: bytes) -> Entry:
    """Parses the bytes of an entry.

    Raises:
        ValueError: if they are no entry, for example because the writing process was killed.
    """
    entry = json.loads(text)
    if not isinstance(entry, dict) or not isinstance(entry.get("run_id"), str):
        raise ValueError("it names no run")
    for key, kind in (("metrics", list), ("tags", dict)):
        if not isinstance(entry.get(key, kind()), kind):
            raise ValueError(f"{key} is no {kind.__name__}")
    if "status" in entry and "end_time" not in entry:
        raise ValueError("status has no end_time")
    return entry


def merge(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Joins neighbouring entries of a run, up to the size of a batch, so that a long gap is sent quickly."""
    batch: Entry = {}
    for entry in entries:
        fits = (
            batch.get("run_id") == entry["run_id"]
            and "status" not in batch
            and batch.get("once") == entry.get("once")
            and len(batch.get("metrics", ())) + len(entry.get("metrics", ())) <= MAX_METRICS
            and len({**batch.get("tags", {}), **entry.get("tags", {})}) <= MAX_TAGS
        )
        if not fits:
            if batch:
                yield batch
            batch = {"run_id": entry["run_id"]} | ({"once": True} if entry.get("once") else {})
        batch["metrics"] = [*batch.get("metrics", ()), *entry.get("metrics", ())]
        batch["tags"] = {**batch.get("tags", {}), **entry.get("tags", {})}
        if "status" in entry:
            batch |= {"status": entry["status"], "end_time": entry["end_time"]}
    if batch:
        yield batch


def _warn_once(path: Path, number: int, line: bytes) -> None:
    """Logs a line that is no entry, once: a lost store is retried every few seconds, with the same lines."""
    if (str(path), line) not in _named:
        _named.add((str(path), line))
        logger.warning("%s:%d: skipping an incomplete entry; kept in %s%s", path, number, path.name, DAMAGED)
