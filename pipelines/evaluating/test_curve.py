"""Part of evaluate: the test curve, the test scores of a run's kept checkpoints; never used to select."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from cluster.layout import Layout, layout
from cluster.runtime.session import ray_session
from cluster.tracking import RunHandle, benchmark_name
from gare.config import Config
from gare.data.manifest import ManifestRow
from gare.data.splits import StoredSplits, read_splits, split_hash_of
from gare.errors import CheckpointError, ConfigError, DataError
from gare.storage.files import delete_file, join, write_atomically, write_json
from gare.storage.run_folder import RESULT, RunFolder
from gare.train.checkpoint.index import Checkpoints, Entry
from pipelines.evaluating.scoring import device_of, pool_of
from pipelines.evaluating.subject import Subject, checkpoint_subject, open_tracking, require_name_of_a_run
from pipelines.locks import evaluation_lock
from pipelines.training.checkpointing import SELECTION, checkpoints_of

if TYPE_CHECKING:
    from gare.train.curve import CheckpointScore, Curve

logger = logging.getLogger(__name__)

#: The curve's tag in MLflow and the prefix of its metrics. Those of an evaluation begin with ``test/``.
PREFIX = "test_curve"


def score_curve(config: Config) -> dict[str, Any]:
    """Scores every kept checkpoint of ``train.run`` on test, from the kind of store that it was trained on.

    Writes ``curve.json``, ``curve.png`` and ``result.json`` into a folder of their own, and metrics below
    ``test_curve/`` to the run in MLflow. Selection, comparison and registration never read them.

    Raises:
        CheckpointError: for a run whose training has not ended, or without a readable checkpoint.
        ConfigError: for a store of another kind than the run was trained on, or a run name not allowed.
        DataError: for a run that does not exist or keeps no checkpoint, a store that does not fit, or if
            another job does the same and ``upkeep.when_locked`` is refuse.
        GareError: if MLflow cannot be reached.
    """
    from gare.train.curve import Curve

    require_name_of_a_run(config)
    started = time.monotonic()
    places, run = layout(config), config.train.run
    entries, chosen, validated = _kept(config, places)
    subject = checkpoint_subject(config, places)
    _require_its_own_input(config, subject)
    splits = read_splits(places.manifest, subject.store, config.extract, subject.settings)
    rows = splits.test
    if not rows:
        raise DataError("split 'test' has no videos", where=places.manifest, accepted="a manifest with them")
    with evaluation_lock(config, places, run, "test-curve") as lock:
        handle = open_tracking(config, places, subject)
        try:
            folder = RunFolder(places.run(run))
            kept = checkpoints_of(config.train, folder, validated=validated)
            scores = _scores(config, subject, rows, kept, entries)
            curve = Curve.of(list(zip(entries, scores, strict=True)), chosen, validated=validated)
            if not curve.rows:
                name, reason = next(iter(curve.left_out.items()))
                raise CheckpointError(f"none of {len(entries)} has scores; {name}: {reason}", where=run)
            picture = _picture(curve, f"{config.name}/{run}: its kept checkpoints on test")
            lock.raise_if_lost()
            result = _write(config, places, splits, curve, picture, handle, started)
            _log(handle, curve, picture)
        finally:
            # The training itself did not fail.
            handle.finish()
    logger.info("%s: %s", run, curve.note)
    return result


def _kept(config: Config, places: Layout) -> tuple[list[Entry], Entry | None, bool]:
    """Returns the kept checkpoints, one per step; the selected one; and True if it was selected on val.

    Raises:
        DataError: if there is no run, or no checkpoint.
    """
    from gare.train.curve import last_of_each_step

    run, folder = config.train.run, RunFolder(places.run(config.train.run))
    if not folder.has_begun:
        raise DataError(
            f"there is no run {run!r} whose checkpoints could be scored",
            where=folder.uri,
            accepted="train.run of a run that pipelines/train.py has trained",
        )
    entries = last_of_each_step(checkpoints_of(config.train, folder, validated=False).entries())
    if not entries:
        raise DataError(
            f"run {run!r} keeps no checkpoint",
            where=folder.checkpoints,
            accepted="a run whose folder checkpoints was not deleted",
        )
    validated = any(SELECTION in entry.metrics for entry in entries)
    return entries, checkpoints_of(config.train, folder, validated=validated).best(), validated


def _require_its_own_input(config: Config, subject: Subject) -> None:
    """Refuses a store of the other kind: a run on frames changes its towers, a run on features has none."""
    from gare.train.checkpoint.files import read_config

    asked = "frames" if subject.settings is None else "features"
    own = read_config(subject.checkpoint).train.input
    if asked != own:
        raise ConfigError(
            f"is {asked}, and run {subject.run!r} learned from {own}: "
            + (
                "its checkpoints have no towers to encode frames with, best/ apart"
                if own == "features"
                else "each of its checkpoints has other towers than those that made the features"
            ),
            where="evaluate.input",
            accepted=f"auto or {own}",
        )


def _scores(
    config: Config,
    subject: Subject,
    rows: Sequence[ManifestRow],
    checkpoints: Checkpoints,
    entries: Sequence[Entry],
) -> list[CheckpointScore]:
    """Returns the scores of the checkpoints, in their order."""
    from gare.train.curve import CheckpointScorer

    store, from_features = subject.store, subject.settings is not None
    device = "cpu" if from_features else device_of(config)
    cache_mb = config.features.cache_mb

    sums = {checkpoints.location(entry): entry.sha256 for entry in entries}

    def load() -> CheckpointScorer:
        return CheckpointScorer(
            store, rows, from_features=from_features, cache_mb=cache_mb, device=device, sums=sums
        )

    locations = list(sums)
    if from_features:
        # The work after the towers is too small to distribute.
        return _reported(subject.run, entries, map(load().score, locations))
    # One actor scores a whole checkpoint: no new actors for each one, and no features to send.
    with ray_session(config.cluster), pool_of(config, load) as pool:
        return _reported(subject.run, entries, pool.map(("score", location) for location in locations))


def _reported(run: str, entries: Sequence[Entry], scores: Iterable[CheckpointScore]) -> list[CheckpointScore]:
    """Logs each score as it comes."""
    found = []
    for number, (entry, score) in enumerate(zip(entries, scores, strict=True), 1):
        about = f"{run}: checkpoint {number} of {len(entries)}, step {entry.step}"
        if score.fault:
            logger.warning("%s, is left out of the test curve: %s", about, score.fault)
        else:
            t2v, v2t = score.metrics["t2v/R1"], score.metrics["v2t/R1"]
            logger.info("%s, on test: R@1 %.1f t2v, %.1f v2t", about, t2v, v2t)
        found.append(score)
    return found


def _picture(curve: Curve, title: str) -> bytes:
    from gare.report.figures import checkpoints_picture

    curves = {
        name: curve.points(f"{way}/R1") for way, name in (("t2v", "text → video"), ("v2t", "video → text"))
    }
    rows = {"the checkpoint to report": curve.chosen, f"the best of {len(curve.rows)} looks": curve.best}
    marked = {name: (row["step"], row["metrics"]["t2v/R1"]) for name, row in rows.items() if row}
    return checkpoints_picture(curves, marked, curve.note, title)


def _write(
    config: Config,
    places: Layout,
    splits: StoredSplits,
    curve: Curve,
    picture: bytes,
    handle: RunHandle,
    started: float,
) -> dict[str, Any]:
    """Writes the files and returns the result."""
    folder, rows = places.test_curve(config.train.run), splits.test
    files = {name: join(folder, f"curve.{name}") for name in ("json", "png")}
    result = {
        "run": config.train.run,
        "note": curve.note,
        "benchmark": benchmark_name(config, splits.benchmark),
        "protocol": splits.protocol,
        "split": "test",
        "split_hash": split_hash_of(rows),
        "num_texts": sum(len(row.captions) for row in rows),
        "num_videos": len(rows),
        "num_looks": len(curve.rows),
        "num_left_out": len(curve.left_out),
        "left_out": dict(curve.left_out),
        "chosen": curve.chosen,
        "best_of_the_looks": curve.best,
        "curve": files["json"],
        "picture": files["png"],
        "mlflow_run_id": handle.run_id,
    }
    # A curve counts only with its result file: an interruption here leaves no mix of two runs.
    delete_file(join(folder, RESULT))
    about = {key: result[key] for key in ("run", "note", "split_hash", "left_out")}
    write_json(files["json"], about | {"checkpoints": list(curve.rows)})
    write_atomically(files["png"], picture)
    result["seconds"] = round(time.monotonic() - started, 2)
    write_json(join(folder, RESULT), result)
    return result


def _log(handle: RunHandle, curve: Curve, picture: bytes) -> None:
    """Logs the curve under names that no view, comparison or registration asks for."""
    for row in curve.rows:
        named = {f"{PREFIX}/{name}": value for name, value in row["metrics"].items()}
        handle.log_metrics(named, row["step"], once=True)
    handle.set_tags({PREFIX: curve.note})
    handle.log_figure_bytes("test-curve.png", picture)
