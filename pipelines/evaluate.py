"""evaluate: checkpoint + frame or feature store → retrieval metrics of a split, both directions."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys
    from pathlib import Path

    # Before other folders of PYTHONPATH, which may have a module of the same name.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from cluster.runtime.signals import take_signals

    take_signals()

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.command import Flag, main
from cluster.layout import Layout, layout
from cluster.runtime.session import ray_session
from cluster.tracking import (
    RunHandle,
    benchmark_name,
    git_revision,
    processing_tag,
    run_tags,
    split_tags,
    status_after,
)
from gare.config import Config
from gare.data.manifest import SPLITS, ManifestRow, require_captions
from gare.data.splits import StoredSplits, read_splits, split_hash_of
from gare.data.store.frame_reader import FrameReader, GreyPictures, open_pictures
from gare.errors import DataError
from gare.retrieval.results.evaluation import ZERO_SHOT
from gare.retrieval.results.notes import evaluation_note
from gare.storage.files import exists, join, read_json, write_atomically, write_json
from gare.storage.lock import StoreLock
from gare.storage.run_folder import RESULT, RunFolder
from pipelines.evaluating.comparison import FOLDER_TAG, collect, compare
from pipelines.evaluating.registration import write_and_register
from pipelines.evaluating.scoring import encode, rank
from pipelines.evaluating.subject import (
    PICTURE,
    Subject,
    checkpoint_subject,
    open_tracking,
    take_folder,
    zero_shot_subject,
)
from pipelines.evaluating.sync import sync
from pipelines.evaluating.test_curve import score_curve
from pipelines.locks import evaluation_lock
from pipelines.sizes import sizes_for_evaluation

if TYPE_CHECKING:
    from gare.retrieval.ranking.ranks import Ranks

logger = logging.getLogger(__name__)

#: Tags that say how a run was trained.
TRAINING_TAGS = ("world_size", "batch", "seed", "precision")
#: The options of this command.
FLAGS = {
    "--compare": Flag("evaluate.compare", "compare two evaluated runs", names=("RUN_A", "RUN_B")),
    "--suite": Flag("evaluate.suite", "collect evaluate.runs under one MLflow run of this name"),
    "--sync": Flag("evaluate.sync", "deliver to MLflow what it missed while it was lost", "true"),
    "--zero-shot": Flag("evaluate.zero_shot", "score towers as they are, without a run", "true"),
    "--test-curve": Flag("evaluate.test_curve", "score every kept checkpoint on test, to look at", "true"),
}


def run(config: Config) -> dict[str, Any]:
    """Scores a split and logs the metrics to the training's MLflow run; or runs another task of evaluate.

    Other tasks: compare two runs, collect runs in a suite, bring MLflow up to date, score the test curve.

    Raises:
        CheckpointError: for a checkpoint that is missing or belongs to another model.
        DataError: for a store that is missing or made with other settings, a split without videos, runs to
            compare that were not evaluated, or if another job runs the same evaluation and
            ``upkeep.when_locked`` is refuse.
        GareError: if MLflow cannot be reached.
    """
    if config.evaluate.compare:
        return compare(config)
    if config.evaluate.suite:
        return collect(config, run)
    if config.evaluate.sync:
        return sync(config)
    if config.evaluate.test_curve:
        return score_curve(config)
    return _evaluate(config)


def _evaluate(config: Config) -> dict[str, Any]:
    started = time.monotonic()
    places = layout(config)
    split = config.evaluate.split
    require_captions(places.manifest)  # who has none has no checkpoint either: name the cause
    if config.evaluate.zero_shot:
        config, subject = zero_shot_subject(config, places)
    else:
        subject = checkpoint_subject(config, places)
    splits = read_splits(places.manifest, subject.store, config.extract, subject.settings)
    rows = splits.of_split(split)
    if not rows:
        raise DataError(
            f"split {split!r} has no videos", where=places.manifest, accepted="another evaluate.split"
        )
    with evaluation_lock(config, places, subject.run, split) as lock:
        return _score(config, places, subject, splits, lock, started)


def _score(
    config: Config, places: Layout, subject: Subject, splits: StoredSplits, lock: StoreLock, started: float
) -> dict[str, Any]:
    """Scores the split, ends its MLflow run in any case, and returns the result."""
    handle = open_tracking(config, places, subject)
    try:
        result = _score_and_write(config, places, subject, splits, handle, lock, started)
    except BaseException as error:
        # The training itself did not fail.
        handle.finish("FINISHED" if subject.is_trained_run else status_after(error))
        raise
    handle.finish()
    metrics = result["metrics"]
    logger.info(
        "%s on %s: R@1 %.1f t2v, %.1f v2t over %d texts × %d videos",
        subject.run,
        result["split"],
        metrics["t2v/R1"],
        metrics["v2t/R1"],
        result["num_texts"],
        result["num_videos"],
    )
    return result


def _score_and_write(
    config: Config,
    places: Layout,
    subject: Subject,
    splits: StoredSplits,
    handle: RunHandle,
    lock: StoreLock,
    started: float,
) -> dict[str, Any]:
    """Scores the split, writes all outputs to files and to the run, and returns the result."""
    from gare.report.evaluation_figures import figures_of

    split = config.evaluate.split
    rows, own = splits.of_split(split), subject.is_trained_run
    with ray_session(config.cluster):
        features = encode(config, subject, rows, splits.train)
        ranks = rank(config, subject, rows, features)
        handle.set_tags(_tags(config, subject, splits, places, len(features["text/embedding"])))
    reader = open_pictures(places.frames)
    title = f"{config.name}/{subject.run}"
    picture = _picture(config, title, reader, rows, ranks[""])
    figures = figures_of(
        subject.model,
        features,
        rows,
        ranks[""],
        reader,
        count=config.evaluate.num_examples,
        title=f"{title} on {split}",
    )
    lock.raise_if_lost()
    take_folder(places, subject, handle.run_id)
    written = _write(config, places, subject, splits, ranks, picture)
    metrics = written["metrics"]
    counts = {"videos": len(rows), "captions": len(features["text/embedding"])}
    dataset = f"{splits.benchmark}-{split}", split_hash_of(rows)
    handle.log_dataset(*dataset, places.manifest, split, counts)
    # MLflow keeps a metric's data set only for metrics of a model.
    trained = RunFolder(places.run(subject.run)).read_result() if own else {}
    logged = trained.get("mlflow_model", "")
    named = {f"{split}/{name}": value for name, value in metrics.items()}
    handle.log_metrics(named, 0, dataset=dataset, model=logged)
    registered = write_and_register(config, places, handle, rows, splits.val, features) if own else ""
    for figure, png in {"retrieval": picture, **figures}.items():
        handle.log_figure_bytes(f"{figure}-{split}.png", png)
    result = {
        "run": subject.run,
        **({"model": ZERO_SHOT, "note": subject.note} if subject.is_zero_shot else {}),
        "checkpoint": subject.checkpoint,
        "benchmark": benchmark_name(config, splits.benchmark),
        "protocol": splits.protocol,
        "split": split,
        "split_hash": dataset[1],
        "num_texts": counts["captions"],
        "num_videos": counts["videos"],
        **written,
        "mlflow_run_id": handle.run_id,
        "registered": registered,
        "seconds": round(time.monotonic() - started, 2),
    }
    lock.raise_if_lost()
    write_json(join(places.evaluation(subject.run, split), RESULT), result)
    handle.describe(_note(places, subject.run, result))
    return result


def _note(places: Layout, run: str, result: dict[str, Any]) -> str:
    """Returns a note with the scores of this evaluation and of the checkpoint's other splits."""
    found = {result["split"]: result}
    for split in SPLITS:
        location = join(places.evaluation(run, split), RESULT)
        if split not in found and exists(location):
            other = read_json(location)
            if other.get("mlflow_run_id") == result["mlflow_run_id"] and "split_hash" in other:
                found[split] = other
    return evaluation_note([found[split] for split in reversed(SPLITS) if split in found])


def _tags(
    config: Config, subject: Subject, splits: StoredSplits, places: Layout, num_texts: int
) -> dict[str, Any]:
    split = config.evaluate.split
    rows = splits.of_split(split)
    tags = run_tags(config, splits.benchmark, splits.protocol)
    about = {name: value for name, value in tags.items() if name not in TRAINING_TAGS}
    if subject.is_zero_shot:
        about["precision"] = "float32" if subject.settings is None else config.features.precision
    elif subject.is_trained_run:
        # The run has the training's tags, and this configuration may differ from that of the training.
        about["ray.job.evaluated"] = about.pop("ray.job")
    elif subject.trained:
        trained = run_tags(subject.trained, splits.benchmark, splits.protocol)
        about |= {name: trained[name] for name in TRAINING_TAGS if name in trained}
    return {
        **about,
        **split_tags(split, split_hash_of(rows), num_texts, len(rows)),
        f"{split}.post-processing": processing_tag(config),
        "git.revision.evaluated": git_revision(Path(__file__).parent),
        FOLDER_TAG + split: places.evaluation(subject.run, split),
    }


def _write(
    config: Config,
    places: Layout,
    subject: Subject,
    splits: StoredSplits,
    ranks: dict[str, Ranks],
    picture: bytes,
) -> dict[str, Any]:
    """Writes the files of the evaluation; returns their entries for the result."""
    from gare.retrieval.results.files import write_results

    split = config.evaluate.split
    folder = places.evaluation(subject.run, split)
    write_atomically(join(folder, PICTURE), picture)
    about = {
        "run": subject.run,
        "checkpoint": subject.checkpoint,
        "split": split,
        "benchmark": splits.benchmark,
        "protocol": splits.protocol,
        "manifest": splits.manifest_fingerprint,
    }
    written = write_results(folder, ranks, splits.of_split(split), about, config.evaluate)
    return written | {"picture": join(folder, PICTURE)}


def _picture(
    config: Config, title: str, reader: FrameReader | GreyPictures, rows: Sequence[ManifestRow], ranks: Ranks
) -> bytes:
    from gare.report.examples import choose_examples
    from gare.report.pictures import retrieval_picture
    from gare.retrieval.results.queries import owners_of

    texts = [caption for row in rows for caption in row.captions]
    examples = choose_examples(ranks.t2v, owners_of(rows), texts, rows, reader, config.evaluate.num_examples)
    return retrieval_picture(examples, f"{title}: text to video on {config.evaluate.split}")


if __name__ == "__main__":
    main(run, __doc__, FLAGS, sizes_for_evaluation)
