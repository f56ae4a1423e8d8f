"""The folder of a training run: its files by name, and reading and writing them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gare.storage.files import exists, join, read_json, write_json

#: File that every step leaves in its folder: what it prints on stdout.
RESULT = "result.json"


@dataclass(frozen=True)
class RunFolder:
    """Files of a run, ``…/DATA SET/runs/RUN``.

    Attributes:
        uri: the folder, a local path or a URI.
    """

    uri: str

    @classmethod
    def of_evaluation(cls, folder: str) -> RunFolder:
        """Returns the run that an evaluation's folder belongs to."""
        return cls(folder.rstrip("/").rsplit("/", 1)[0])

    @property
    def name(self) -> str:
        """Name of the run as ``DATA SET/RUN``."""
        data_set, _, run = self.uri.rsplit("/", 3)[1:]
        return f"{data_set}/{run}"

    @property
    def record(self) -> str:
        """File of the settings and data that identify the run, written when it begins."""
        return join(self.uri, "run.json")

    @property
    def result(self) -> str:
        """File of the training's result, written when it ends."""
        return join(self.uri, RESULT)

    @property
    def history(self) -> str:
        """File of the metrics of all steps and epochs."""
        return join(self.uri, "history.json")

    @property
    def clips(self) -> str:
        """File of the ids of the clips that the run began with."""
        return join(self.uri, "clips.json")

    @property
    def stop(self) -> str:
        """File by which workers are asked to stop."""
        return join(self.uri, "stop.json")

    @property
    def checkpoints(self) -> str:
        """Folder of the checkpoints and their index."""
        return join(self.uri, "checkpoints")

    @property
    def best(self) -> str:
        """Folder of the checkpoint that is best on val."""
        return join(self.uri, "best")

    @property
    def has_begun(self) -> bool:
        """True if a training of this name has begun."""
        return exists(self.record)

    @property
    def is_finished(self) -> bool:
        """True if the training has completed."""
        return exists(self.result)

    def is_its_best(self, checkpoint: str) -> bool:
        """Returns True if a checkpoint is the run's best one, whatever path leads to the storage root."""
        data_set, _, run = self.name.partition("/")
        return checkpoint.endswith(f"/{data_set}/runs/{run}/best")

    def read_record(self) -> dict[str, Any]:
        """Reads the record; empty if it is missing."""
        return dict(read_json(self.record)) if self.has_begun else {}

    def read_result(self) -> dict[str, Any]:
        """Reads the result; empty if it is missing."""
        return dict(read_json(self.result)) if self.is_finished else {}

    def write_record(self, record: dict[str, Any]) -> None:
        """Replaces the record."""
        write_json(self.record, record)

    def write_result(self, result: dict[str, Any]) -> None:
        """Replaces the result."""
        write_json(self.result, result)
