"""Part of evaluate: the model that is scored, and the MLflow run that gets its scores."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.layout import Layout, absolute
from cluster.tracking import RunHandle, connect
from gare.config import Config, differences
from gare.data.manifest import SPLITS
from gare.errors import CheckpointError, ConfigError, DataError
from gare.retrieval.results.evaluation import ZERO_SHOT
from gare.retrieval.results.files import delete_results
from gare.storage.files import delete_file, exists, join, read_json, write_json
from gare.storage.run_folder import RunFolder
from pipelines.stored_outbox import pending_of
from pipelines.training.best import add_repair_advice

if TYPE_CHECKING:
    from gare.model.gare import GARE


logger = logging.getLogger(__name__)

#: File name of an evaluation's picture.
PICTURE = "retrieval.png"


@dataclass(frozen=True)
class Subject:
    """The model that an evaluation scores.

    Attributes:
        run: name of the folder of its results, below the data set's runs.
        checkpoint: location of its weights.
        model: the model, on the CPU.
        load: builds the same model in another process.
        store: store that it is scored from.
        settings: settings that a feature store must have been made with; None for a frame store.
        record: JSON file that names its MLflow run; empty for a checkpoint from elsewhere.
        trained: configuration that the checkpoint was trained with; None for zero-shot.
        is_zero_shot: True for pretrained towers as they are, without a run.
        towers_sha256: hash for the record of a zero-shot evaluation; else empty.
        note: caveat about the weights for readers of a zero-shot score; else empty.
    """

    run: str
    checkpoint: str
    model: GARE
    load: Callable[[], GARE]
    store: str
    settings: dict[str, Any] | None
    record: str = ""
    trained: Config | None = None
    is_zero_shot: bool = False
    towers_sha256: str = ""
    note: str = ""

    @property
    def is_trained_run(self) -> bool:
        """True if it is the best checkpoint of ``run`` itself."""
        return bool(self.record) and not self.is_zero_shot


def require_name_of_a_run(config: Config) -> None:
    """Refuses a run with the name that is reserved for evaluations without a run.

    Raises:
        ConfigError: if ``train.run`` has that name.
    """
    if config.train.run == ZERO_SHOT:
        raise ConfigError(
            "is the name of evaluations without a run", where="train.run", accepted="another name"
        )


def checkpoint_subject(config: Config, places: Layout) -> Subject:
    """Returns the checkpoint of ``evaluate.checkpoint``, or the best one of ``train.run``.

    Raises:
        CheckpointError: for a checkpoint that is missing or belongs to another model.
        DamagedError: for a checkpoint with a damaged file.
        ConfigError: for a run name that is not allowed.
        DataError: for imported features other than those that the run learned from.
    """
    from gare.train.checkpoint.files import load_checkpoint, read_config

    require_name_of_a_run(config)
    best = places.checkpoint(config.train.run)
    checkpoint = absolute(config.evaluate.checkpoint) or best
    if not exists(checkpoint):
        raise CheckpointError(
            "there is no checkpoint",
            where=checkpoint,
            accepted="run pipelines/train.py first, or evaluate.checkpoint",
        )
    with add_repair_advice(checkpoint == best):
        trained = read_config(checkpoint)
    asked = config.model.computed_as(trained.model)
    differing = differences(trained.model.identity(), asked.identity(), "model")
    if differing:
        raise CheckpointError(
            f"is of another model: {'; '.join(differing[:8])}",
            where=checkpoint,
            accepted="the model settings that it was trained with",
        )

    _require_same_origin(config, trained, checkpoint)

    def load(*, quiet: bool = True) -> GARE:
        loaded = load_checkpoint(checkpoint, quiet=quiet)
        loaded.take_compute_settings(config.model)
        return loaded

    with add_repair_advice(checkpoint == best):
        model = load(quiet=False)
    kind = trained.train.input if config.evaluate.input == "auto" else config.evaluate.input
    settings = settings_of(config, model, places.features) if kind == "features" else None
    folder = RunFolder(places.run(config.train.run))
    is_of_run = checkpoint == best and folder.has_begun
    if is_of_run and settings and not config.has_towers:
        _require_learned_arrays(folder, places.features, settings)
    return Subject(
        config.train.run,
        checkpoint,
        model,
        load,
        places.frames if settings is None else places.features,
        settings,
        folder.record if is_of_run else "",
        trained,
    )


def zero_shot_subject(config: Config, places: Layout) -> tuple[Config, Subject]:
    """Returns the towers of ``features.weights`` as they are, by default of ``train.clip_weights``.

    Returns:
        The configuration with the scored model, and the subject.

    Raises:
        CheckpointError: for weights that cannot be used.
        ConfigError: if no weights are named, or ``model.clip`` has other sizes than they have.
    """
    from gare.model.encoders.clip import towers_sha256
    from gare.train.checkpoint.initial_model import fault_of_zero_shot, zero_shot_model

    weights = absolute(config.features.weights or config.train.clip_weights)
    features = config.features.model_copy(update={"weights": weights})
    config = config.model_copy(update={"model": config.model.zero_shot(), "features": features})
    model = zero_shot_model(config)
    settings = None
    if config.evaluate.input == "features":
        settings = settings_of(config, model, places.features)
    note = f"the towers of {weights} as they are"
    if fault := fault_of_zero_shot(weights):
        note += f", NOT the zero-shot score of published weights: {fault}"
        logger.warning("zero-shot: %s", note)
    return config, Subject(
        ZERO_SHOT,
        weights,
        model,
        lambda: zero_shot_model(config),
        places.frames if settings is None else places.features,
        settings,
        join(places.run(ZERO_SHOT), "zero-shot.json"),
        is_zero_shot=True,
        towers_sha256=towers_sha256(model.towers),
        note=note,
    )


def _require_same_origin(config: Config, trained: Config, checkpoint: str) -> None:
    """Refuses a checkpoint of imported features for others, and one of others for imported features."""
    if trained.has_towers == config.has_towers:
        return
    what = (
        "has towers, which did not make the imported features"
        if trained.has_towers
        else "was learned from imported features and has no towers to encode others with"
    )
    raise CheckpointError(
        what, where=checkpoint, accepted=f"data.benchmark={trained.data.benchmark}, as it was trained"
    )


def _require_learned_arrays(folder: RunFolder, store: str, settings: Mapping[str, Any]) -> None:
    """Refuses imported features other than the run's own: no hash of towers tells encoders apart."""
    from gare.data.store.contents import fingerprint

    if folder.read_record()["store_fingerprint"] != fingerprint(settings):
        raise DataError(
            f"holds other features than those that {folder.name} learned from",
            where=store,
            accepted="the features that it was trained on, or a training on these",
        )


def settings_of(config: Config, model: GARE, store: str) -> dict[str, Any]:
    """Returns the settings that a feature store must have to hold features of this model's towers.

    Args:
        config: of the evaluation.
        model: the model; for one of imported features, the settings are those of the arrays in the store.
        store: the feature store.
    """
    from gare.data.store.feature_schema import feature_settings, settings_of_imported
    from gare.model.encoders.clip import towers_sha256

    if not config.has_towers:
        return settings_of_imported(store, config.model)
    return feature_settings(config, towers_sha256(model.towers))


def open_tracking(config: Config, places: Layout, subject: Subject) -> RunHandle:
    """Opens the MLflow run of the training or of these towers, or a new one for an outside checkpoint."""
    tracker, pending = connect(config.tracking, places.root), pending_of(places)
    if subject.is_trained_run:
        run_id = read_json(subject.record)["mlflow_run_id"]
        return tracker.start_run(
            f"{config.name}/{subject.run}", run_id=run_id, pending=pending, when_interrupted="FINISHED"
        )
    if not subject.is_zero_shot:
        tags = {"checkpoint": subject.checkpoint}
        return tracker.start_run(f"{config.name}/evaluate", tags=tags, pending=pending)
    # One MLflow run for all splits of the same towers.
    known = _known(subject)
    same = known.get("towers_sha256") == subject.towers_sha256
    return tracker.start_run(
        f"{config.name}/{ZERO_SHOT}",
        run_id=known["mlflow_run_id"] if same else None,
        tags={"model": ZERO_SHOT, "weights": subject.checkpoint, "towers.sha256": subject.towers_sha256},
        pending=pending,
    )


def take_folder(places: Layout, subject: Subject, run_id: str) -> None:
    """Claims the folder of zero-shot results for these towers; deletes other towers' results, all splits.

    Args:
        places: locations of the data set.
        subject: subject whose results come next.
        run_id: id of its MLflow run.
    """
    if not subject.is_zero_shot:
        return
    known = _known(subject)
    if known and known["towers_sha256"] != subject.towers_sha256:
        logger.warning(
            "the zero-shot results of other towers, of MLflow run %s, are replaced", known["mlflow_run_id"]
        )
        for split in SPLITS:
            folder = places.evaluation(subject.run, split)
            delete_results(folder)
            delete_file(join(folder, PICTURE))
    write_json(subject.record, {"towers_sha256": subject.towers_sha256, "mlflow_run_id": run_id})


def _known(subject: Subject) -> dict[str, str]:
    """Returns the record of the towers whose results the folder holds; empty if there is none."""
    known: dict[str, str] = read_json(subject.record) if exists(subject.record) else {}
    return known
