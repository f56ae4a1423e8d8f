"""Where what MLflow has not taken waits: beside the run's data, wherever that is."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.storage import Layout
from cluster.tracking.outbox import merge
from gare.data.files import delete_file, join, list_files, read_json, write_json

#: Folders in which this process has found nothing: an object store need not be asked at every step.
_empty: set[str] = set()


@dataclass(frozen=True)
class StoredOutbox:
    """Entries as objects of a folder of an object store, to which nothing can be appended.

    Attributes:
        uri: the folder.
    """

    uri: str

    def __str__(self) -> str:
        return self.uri

    def add(self, entry: dict[str, Any]) -> None:
        """Keeps one entry.

        Raises:
            DataError: where it cannot be written.
        """
        _empty.discard(self.uri)
        write_json(join(self.uri, f"{time.time_ns():020d}-{uuid.uuid4().hex}.json"), entry)

    def deliver(self, send: Callable[[dict[str, Any]], None]) -> int:
        """Sends all entries, the oldest first, and deletes them.

        Args:
            send: delivers one entry. Whatever it raises ends the delivery, and all stay.

        Returns:
            The number of entries.
        """
        if self.uri in _empty:
            return 0
        files = list_files(self.uri, ".json")
        for entry in merge(read_json(file) for file in files):
            send(entry)
        for file in files:
            delete_file(file)
        _empty.add(self.uri)
        return len(files)


def pending_of(places: Layout) -> str | StoredOutbox:
    """What waits for MLflow, of all runs of a data set: a local file, or a folder of an object store."""
    if places.is_local:
        return str(Path(places.data) / "mlflow-pending.jsonl")
    return StoredOutbox(join(places.data, "mlflow-pending"))
