"""Outbox for MLflow entries next to the run's data, in an object store or a local file."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.layout import Layout
from cluster.tracking.outbox import DAMAGED, merge, parse
from gare.storage.files import delete_file, join, list_files, read_bytes, write_atomically, write_json

logger = logging.getLogger(__name__)

#: Folders that this process has found empty, so that the object store is not asked at every step.
_empty: set[str] = set()


@dataclass(frozen=True)
class StoredOutbox:
    """Entries as single objects in a folder of an object store, which has no append.

    Attributes:
        uri: the folder.
    """

    uri: str

    def __str__(self) -> str:
        return self.uri

    def add(self, entry: dict[str, Any]) -> None:
        """Keeps one entry.

        Raises:
            DataError: if it cannot be written.
        """
        _empty.discard(self.uri)
        write_json(join(self.uri, f"{time.time_ns():020d}-{uuid.uuid4().hex}.json"), entry)

    def deliver(self, send: Callable[[dict[str, Any]], None]) -> int:
        """Sends all entries, the oldest first, and deletes them.

        Objects that are no entries are moved into a folder next to this one, and logged.

        Args:
            send: delivers one entry. Any exception from it ends the delivery, and all entries stay.

        Returns:
            The number of entries.
        """
        if self.uri in _empty:
            return 0
        entries: dict[str, dict[str, Any]] = {}
        for file in list_files(self.uri, ".json"):
            data = read_bytes(file)
            try:
                entries[file] = parse(data)
            except ValueError as error:
                self._put_aside(file, data, error)
        for entry in merge(entries.values()):
            send(entry)
        for file in entries:
            delete_file(file)
        _empty.add(self.uri)
        return len(entries)

    def _put_aside(self, file: str, data: bytes, error: ValueError) -> None:
        aside = join(f"{self.uri}{DAMAGED}", file.rsplit("/", 1)[-1])
        logger.warning("%s: skipping an incomplete entry (%s); kept as %s", file, error, aside)
        write_atomically(aside, data)
        delete_file(file)


def pending_of(places: Layout) -> str | StoredOutbox:
    """Returns the outbox of a data set: a local file, or a folder of an object store."""
    if places.is_local:
        return str(Path(places.data) / "mlflow-pending.jsonl")
    return StoredOutbox(join(places.data, "mlflow-pending"))
