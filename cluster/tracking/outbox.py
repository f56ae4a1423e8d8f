"""Entries that could not be delivered to the tracking server yet, kept in a JSON-lines file.

Entries are idempotent for the receiver: a metric carries its own time, a tag its value. So the file is
emptied only once everything in it has been delivered, and sending some of it twice does no harm.
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

#: MLflow's limits of one batch.
MAX_METRICS = 1000
MAX_TAGS = 100

#: Ends the name of what holds lines or objects that are no entries.
DAMAGED = ".damaged"

# Lines that are no entries, of which this process has told.
_named: set[tuple[str, bytes]] = set()

#: ``run_id``, and any of ``metrics`` (key, value, timestamp in ms, step), ``tags`` (key, value), ``status``;
#: ``once`` where metrics of a step that the run has already are left out.
Entry = dict[str, Any]


class Outbox(Protocol):
    """Keeps entries until they can be delivered; it can be pickled, and ``str`` says where it is."""

    def add(self, entry: Entry) -> None:
        """Keeps one entry.

        Raises:
            Exception: where it cannot be kept.
        """

    def deliver(self, send: Callable[[Entry], None]) -> int:
        """Sends all that is kept, as ``deliver``."""


@dataclass(frozen=True)
class FileOutbox:
    """Entries in a local file."""

    path: str

    def __str__(self) -> str:
        return self.path

    def add(self, entry: Entry) -> None:
        """Adds entries to it."""
        add(self.path, entry)

    def deliver(self, send: Callable[[Entry], None]) -> int:
        """Delivers its entries."""
        return deliver(self.path, send)


def add(path: str | Path, entry: Entry) -> None:
    """Appends one entry; safe with other processes of this machine.

    Raises:
        OSError: where the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # A line that a killed process left in the middle stays by itself.
        torn = bool(file.seek(0, os.SEEK_END)) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * torn + json.dumps(entry).encode() + b"\n")


def deliver(path: str | Path, send: Callable[[Entry], None]) -> int:
    """Sends all that is in the file and empties it.

    Args:
        path: the file; nothing happens where there is none.
        send: delivers one entry. Whatever it raises ends the delivery, and the file stays as it was.

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
    """The entry that the bytes are.

    Raises:
        ValueError: where they are none, such as those of a process that was killed while it wrote.
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
    """Names a line that is no entry; a lost store is tried again every few seconds, with the same lines."""
    if (str(path), line) not in _named:
        _named.add((str(path), line))
        logger.warning("%s:%d: not a whole entry, left out; kept in %s%s", path, number, path.name, DAMAGED)
