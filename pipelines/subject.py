"""Part of evaluate: the model that is scored, and the MLflow run that gets its scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.storage import Layout, absolute
from cluster.tracking import RunHandle, connect
from gare.config import Config, differences
from gare.data.files import exists, join, read_json
from gare.errors import CheckpointError
from pipelines.pending import pending_of

if TYPE_CHECKING:
    from gare.model.gare import GARE


@dataclass(frozen=True)
class Subject:
    """The model that an evaluation scores.

    Attributes:
        run: name of the folder of its results, below the data set's runs.
        checkpoint: location of its weights.
        model: the model, on the CPU.
        load: makes the same model in another process.
        store: the store that it is scored from.
        settings: what a feature store must have been made with; None: the store is one of frames.
        record: JSON file that names its MLflow run; empty for a checkpoint from elsewhere.
    """

    run: str
    checkpoint: str
    model: GARE
    load: Callable[[], GARE]
    store: str
    settings: dict[str, Any] | None
    record: str = ""

    @property
    def is_trained_run(self) -> bool:
        """True if it is the best checkpoint of ``run`` itself."""
        return bool(self.record)


def checkpoint_subject(config: Config, places: Layout) -> Subject:
    """The checkpoint of ``evaluate.checkpoint``, or the best of ``train.run``.

    Raises:
        CheckpointError: for a checkpoint that is missing or of another model.
    """
    from gare.train.state import load_checkpoint, read_config

    best = places.checkpoint(config.train.run)
    checkpoint = absolute(config.evaluate.checkpoint) or best
    if not exists(checkpoint):
        raise CheckpointError(
            "there is no checkpoint",
            where=checkpoint,
            accepted="run pipelines/train.py first, or evaluate.checkpoint",
        )
    trained = read_config(checkpoint)
    differing = differences(trained.model.identity(), config.model.identity(), "model")
    if differing:
        raise CheckpointError(
            f"is of another model: {'; '.join(differing[:8])}",
            where=checkpoint,
            accepted="the model settings that it was trained with",
        )
    model = load_checkpoint(checkpoint)
    kind = trained.train.input if config.evaluate.input == "auto" else config.evaluate.input
    settings = settings_of(config, model) if kind == "features" else None
    record = join(places.run(config.train.run), "run.json")
    return Subject(
        config.train.run,
        checkpoint,
        model,
        lambda: load_checkpoint(checkpoint),
        places.frames if settings is None else places.features,
        settings,
        record if checkpoint == best and exists(record) else "",
    )


def settings_of(config: Config, model: GARE) -> dict[str, Any]:
    """Settings that a feature store must have been made with to hold features of the model's towers."""
    from gare.data.feature_store import feature_settings
    from gare.model.clip import towers_sha256

    return feature_settings(config, towers_sha256(model.towers))


def open_tracking(config: Config, places: Layout, subject: Subject) -> RunHandle:
    """The MLflow run of the training, or a new one for a checkpoint from elsewhere."""
    tracker, pending = connect(config.tracking, places.root), pending_of(places)
    if subject.is_trained_run:
        run_id = read_json(subject.record)["mlflow_run_id"]
        return tracker.start_run(f"{config.name}/{subject.run}", run_id=run_id, pending=pending)
    tags = {"checkpoint": subject.checkpoint}
    return tracker.start_run(f"{config.name}/evaluate", tags=tags, pending=pending)
