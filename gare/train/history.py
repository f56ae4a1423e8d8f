"""The record of a run's steps and validations, beside its checkpoints: what curves are drawn from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gare.data.files import exists, read_json, write_json


@dataclass
class History:
    """Points by metric name: (step, value) for losses, (epochs done, value) for validations.

    Attributes:
        uri: JSON file that holds it.
        steps: per optimiser step.
        epochs: per validation.
        resumed: steps after which the run was continued.
    """

    uri: str
    steps: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    epochs: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    resumed: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, uri: str, *, step: int | None = None, epoch: int | None = None) -> History:
        """Reads the record up to a step and an epoch; what a restarted run will do again is left out."""
        tree = read_json(uri) if exists(uri) else {"steps": {}, "epochs": {}}

        def keep(
            points: dict[str, list[list[float]]], last: int | None
        ) -> dict[str, list[tuple[int, float]]]:
            return {
                name: [(int(at), value) for at, value in rows if last is None or at <= last]
                for name, rows in points.items()
            }

        resumed = [at for at in tree.get("resumed", ()) if step is None or at <= step]
        return cls(uri, keep(tree["steps"], step), keep(tree["epochs"], epoch), resumed)

    def add_step(self, step: int, values: dict[str, float]) -> None:
        """Adds the values of an optimiser step; a measure that has none (a mean of no pairs) has no point."""
        for name, value in values.items():
            if math.isfinite(value):
                self.steps.setdefault(name, []).append((step, value))

    def add_epoch(self, epoch: int, values: dict[str, float]) -> None:
        """Adds the metrics of a validation."""
        for name, value in values.items():
            self.epochs.setdefault(name, []).append((epoch, value))

    def copy(self) -> History:
        """The record as it is now, to be saved while it grows."""
        steps, epochs = (
            {name: list(points) for name, points in record.items()} for record in (self.steps, self.epochs)
        )
        return History(self.uri, steps, epochs, list(self.resumed))

    def save(self) -> None:
        """Writes the record."""
        record = {"steps": self.steps, "epochs": self.epochs, "resumed": self.resumed}
        write_json(self.uri, record)
