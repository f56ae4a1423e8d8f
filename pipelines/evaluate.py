"""evaluate: checkpoint + frame or feature store → retrieval metrics of a split, both directions."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.command import Flags, main
from cluster.resources import num_cpus, usable_gpus, wants_gpus
from cluster.runtime.actors import ActorPool
from cluster.session import ray_session
from cluster.storage import Layout, absolute, layout
from cluster.tracking import (
    RunHandle,
    benchmark_name,
    connect,
    git_revision,
    processing_tag,
    run_tags,
    split_tags,
)
from gare.config import Config, differences
from gare.data.files import exists, join, read_json, write_atomically, write_json
from gare.data.frames import FrameReader, NoPictures, open_pictures
from gare.data.manifest import SPLITS, ManifestRow
from gare.errors import CheckpointError, DataError
from gare.retrieval.evaluated import split_hash_of
from gare.retrieval.notes import evaluation_note
from gare.train.data import StoredSplits, read_splits
from pipelines.comparison import FOLDER_TAG, collect, compare
from pipelines.pending import pending_of
from pipelines.registration import write_and_register
from pipelines.sizes import sizes_for_evaluation
from pipelines.syncing import sync

if TYPE_CHECKING:
    from gare.model.gare import GARE
    from gare.retrieval.ranks import Ranks

logger = logging.getLogger(__name__)

#: Clips and captions that one encoding task takes.
CLIPS_PER_TASK, CAPTIONS_PER_TASK = 32, 512
#: The options of this command.
FLAGS: Flags = {
    "--compare": ("evaluate.compare", "compare two evaluated runs", ("RUN_A", "RUN_B")),
    "--suite": ("evaluate.suite", "collect evaluate.runs under one MLflow run of this name"),
    "--sync": ("evaluate.sync", "deliver to MLflow what it missed while it was lost", "true"),
}
#: Pairs below which actors would take longer to load than to score.
PAIRS_ALONE = 1_000_000


def run(config: Config) -> dict[str, Any]:
    """Scores a split and logs the metrics to the training's MLflow run; or compares runs, or syncs.

    Raises:
        CheckpointError: for a checkpoint that is missing or of another model.
        DataError: for a store that is missing or made with other settings, a split without videos, or runs to
            compare that were not evaluated.
        GareError: where MLflow cannot be reached.
    """
    if config.evaluate.compare:
        return compare(config)
    if config.evaluate.suite:
        return collect(config, run)
    if config.evaluate.sync:
        return sync(config)
    from gare.retrieval.evaluation_figures import figures_of

    started = time.monotonic()
    places = layout(config)
    split = config.evaluate.split
    checkpoint = absolute(config.evaluate.checkpoint) or places.checkpoint(config.train.run)
    model = _load(config, checkpoint)
    settings = _feature_settings(config, checkpoint, model)
    store = places.frames if settings is None else places.features
    splits = read_splits(places.manifest, store, config.extract, settings)
    rows = splits.of_split(split)
    if not rows:
        raise DataError(
            f"split {split!r} has no videos", where=places.manifest, accepted="another evaluate.split"
        )
    handle, own = _open_tracking(config, places, checkpoint)
    try:
        with ray_session(config.cluster):
            bank = _bank(config, splits.train)
            if settings is None:
                features = _encode(config, checkpoint, places.frames, rows, bank)
            else:
                features = _encode_stored(config, model, store, rows, bank)
            ranks = _rank(config, checkpoint, model, rows, features)
            handle.set_tags(_tags(config, splits, places, len(features["text/embedding"])))
        reader = open_pictures(places.frames)
        picture = _picture(config, reader, rows, ranks[""])
        title = f"{config.name}/{config.train.run} on {split}"
        figures = figures_of(
            model, features, rows, ranks[""], reader, count=config.evaluate.num_examples, title=title
        )
        written = _write(config, places, checkpoint, splits, ranks, picture)
    except BaseException:
        # The training itself has not failed.
        handle.finish("FINISHED" if own else "FAILED")
        raise
    metrics = written["metrics"]
    counts = {"videos": len(rows), "captions": len(features["text/embedding"])}
    dataset = f"{splits.benchmark}-{split}", split_hash_of(rows)
    handle.log_dataset(*dataset, places.manifest, split, counts)
    # MLflow keeps a metric's data set only where it is a model's metric too.
    trained = join(places.run(config.train.run), "result.json")
    logged = read_json(trained)["mlflow_model"] if own and exists(trained) else ""
    named = {f"{split}/{name}": value for name, value in metrics.items()}
    handle.log_metrics(named, 0, dataset=dataset, model=logged)
    registered = write_and_register(config, places, handle, rows, splits.val, features) if own else ""
    for figure, png in {"retrieval": picture, **figures}.items():
        handle.log_figure_bytes(f"{figure}-{split}.png", png)
    result = {
        "run": config.train.run,
        "checkpoint": checkpoint,
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
    write_json(join(places.evaluation(config.train.run, split), "result.json"), result)
    handle.describe(_note(places, config.train.run, result))
    handle.finish()
    logger.info(
        "%s on %s: R@1 %.1f t2v, %.1f v2t over %d texts × %d videos",
        config.train.run,
        split,
        metrics["t2v/R1"],
        metrics["v2t/R1"],
        counts["captions"],
        counts["videos"],
    )
    return result


def _note(places: Layout, run: str, result: dict[str, Any]) -> str:
    """The scores of this evaluation, and of those of the checkpoint's other splits."""
    found = {result["split"]: result}
    for split in SPLITS:
        location = join(places.evaluation(run, split), "result.json")
        if split not in found and exists(location):
            other = read_json(location)
            if other.get("mlflow_run_id") == result["mlflow_run_id"] and "split_hash" in other:
                found[split] = other
    return evaluation_note([found[split] for split in reversed(SPLITS) if split in found])


def _tags(config: Config, splits: StoredSplits, places: Layout, num_texts: int) -> dict[str, Any]:
    split = config.evaluate.split
    rows = splits.of_split(split)
    return {
        **run_tags(config, splits.benchmark, splits.protocol),
        **split_tags(split, split_hash_of(rows), num_texts, len(rows)),
        f"{split}.post-processing": processing_tag(config),
        "git.revision.evaluated": git_revision(Path(__file__).parent),
        FOLDER_TAG + split: places.evaluation(config.train.run, split),
    }


def _write(
    config: Config,
    places: Layout,
    checkpoint: str,
    splits: StoredSplits,
    ranks: dict[str, Ranks],
    picture: bytes,
) -> dict[str, Any]:
    """Files of the evaluation; what the result says of them."""
    from gare.retrieval.results import write_results

    split = config.evaluate.split
    folder = places.evaluation(config.train.run, split)
    write_atomically(join(folder, "retrieval.png"), picture)
    about = {
        "run": config.train.run,
        "checkpoint": checkpoint,
        "split": split,
        "benchmark": splits.benchmark,
        "protocol": splits.protocol,
        "manifest": splits.manifest_fingerprint,
    }
    written = write_results(folder, ranks, splits.of_split(split), about, config.evaluate)
    return written | {"picture": join(folder, "retrieval.png")}


def _load(config: Config, checkpoint: str) -> GARE:
    from gare.train.state import load_checkpoint, read_config

    if not exists(checkpoint):
        raise CheckpointError(
            "there is no checkpoint",
            where=checkpoint,
            accepted="run pipelines/train.py first, or evaluate.checkpoint",
        )
    trained = read_config(checkpoint).model
    differing = differences(trained.identity(), config.model.identity(), "model")
    if differing:
        raise CheckpointError(
            f"is of another model: {'; '.join(differing[:8])}",
            where=checkpoint,
            accepted="the model settings that it was trained with",
        )
    return load_checkpoint(checkpoint)


def _feature_settings(config: Config, checkpoint: str, model: GARE) -> dict[str, Any] | None:
    """What the feature store must have been made with to be this checkpoint's; None: frames are scored."""
    from gare.data.feature_store import feature_settings
    from gare.model.clip import towers_sha256
    from gare.train.state import read_config

    kind = config.evaluate.input
    if kind == "auto":
        kind = read_config(checkpoint).train.input
    return feature_settings(config, towers_sha256(model.towers)) if kind == "features" else None


def _encode_stored(
    config: Config, model: GARE, store: str, rows: Sequence[ManifestRow], bank: Sequence[str]
) -> dict[str, np.ndarray]:
    """As ``_encode``, from features; what follows the towers is too little work to be spread."""
    from gare.data.features import FeatureReader
    from gare.retrieval.encode import Encoder, encode_stored

    reader = FeatureReader(store, words=model.needs_words, cache_mb=config.features.cache_mb)
    features = encode_stored(model, reader, [row.video_id for row in rows], batch=CAPTIONS_PER_TASK)
    encoder = Encoder(model, store)
    for first in range(0, len(bank), CAPTIONS_PER_TASK):
        for kind, array in encoder.captions(bank[first : first + CAPTIONS_PER_TASK]).items():
            known = features.get(f"bank/{kind}", array[:0])
            features[f"bank/{kind}"] = np.concatenate([known, array])
    return features


def _open_tracking(config: Config, places: Layout, checkpoint: str) -> tuple[RunHandle, bool]:
    """The training's run and True, or a new one and False for a checkpoint from elsewhere."""
    tracker = connect(config.tracking, places.root)
    record = join(places.run(config.train.run), "run.json")
    own = checkpoint == places.checkpoint(config.train.run) and exists(record)
    run_id = read_json(record)["mlflow_run_id"] if own else None
    tags = {} if own else {"checkpoint": checkpoint}
    name = f"{config.name}/{config.train.run if own else 'evaluate'}"
    return tracker.start_run(name, run_id=run_id, tags=tags, pending=pending_of(places)), own


def _bank(config: Config, train: Sequence[ManifestRow]) -> list[str]:
    """Captions of the training split for query-bank normalisation; none where it is off."""
    if not config.evaluate.qbnorm:
        return []
    captions = [caption for row in train for caption in row.captions]
    if not captions:
        raise DataError(
            "there is no training caption for the query bank",
            where="evaluate.qbnorm",
            accepted="a manifest with a train split, or evaluate.qbnorm=false",
        )
    rng = np.random.default_rng(config.evaluate.seed)
    size = min(config.evaluate.qbnorm_bank, len(captions))
    return [captions[at] for at in sorted(rng.choice(len(captions), size, replace=False))]


def _encode(
    config: Config, checkpoint: str, store: str, rows: Sequence[ManifestRow], bank: Sequence[str]
) -> dict[str, np.ndarray]:
    """``video/…`` of the clips, ``text/…`` of all their captions in the order of the rows, ``bank/…``."""

    def load() -> Any:
        from gare.retrieval.encode import Encoder
        from gare.train.state import load_checkpoint

        return Encoder(load_checkpoint(checkpoint), store, _device(config))

    tasks: list[tuple[str, str, list[str]]] = []
    ids = [row.video_id for row in rows]
    captions = [caption for row in rows for caption in row.captions]
    for name, method, items, size in (
        ("video", "clips", ids, CLIPS_PER_TASK),
        ("text", "captions", captions, CAPTIONS_PER_TASK),
        ("bank", "captions", list(bank), CAPTIONS_PER_TASK),
    ):
        tasks += [(name, method, items[first : first + size]) for first in range(0, len(items), size)]
    parts: dict[str, list[np.ndarray]] = {}
    with _pool(config, load) as pool:
        for (name, *_), result in zip(tasks, pool.map(task[1:] for task in tasks), strict=True):
            for kind, array in result.items():
                parts.setdefault(f"{name}/{kind}", []).append(array)
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _device(config: Config) -> str:
    return "cuda" if wants_gpus(config.cluster) else "cpu"


def _pool(config: Config, load: Callable[[], Any]) -> ActorPool:
    """Actors on all GPUs that are free, else on all CPUs.

    Args:
        config: of the run.
        load: makes the object whose methods tasks name, each with its arguments.
    """

    def load_methods() -> Callable[..., Any]:
        loaded = load()
        return lambda method, *arguments: getattr(loaded, method)(*arguments)

    gpus = usable_gpus(config.cluster)
    return ActorPool(load_methods, count=gpus or num_cpus(), num_cpus=0 if gpus else 1, num_gpus=min(gpus, 1))


def _rank(
    config: Config, checkpoint: str, model: GARE, rows: Sequence[ManifestRow], features: dict[str, np.ndarray]
) -> dict[str, Ranks]:
    """Ranks by variant: shares of the pairs go to actors, or where they are few are done here."""
    from gare.retrieval.queries import owners_of
    from gare.retrieval.results import processing_of
    from gare.retrieval.worker import RankWorker, rank_by_workers

    owners, processing = owners_of(rows), processing_of(config.evaluate)
    here = RankWorker(model, features, owners, processing)
    if len(owners) * len(rows) <= PAIRS_ALONE:

        def call(tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
            return (getattr(here, method)(*arguments) for method, *arguments in tasks)

        return rank_by_workers(here, call)
    import ray

    held = ray.put(features)

    def load() -> Any:
        from gare.train.state import load_checkpoint

        return RankWorker(load_checkpoint(checkpoint), ray.get(held), owners, processing, _device(config))

    with _pool(config, load) as pool:
        return rank_by_workers(here, pool.map, share_once=ray.put)


def _picture(
    config: Config, reader: FrameReader | NoPictures, rows: Sequence[ManifestRow], ranks: Ranks
) -> bytes:
    from gare.retrieval.examples import choose_examples
    from gare.retrieval.pictures import retrieval_picture
    from gare.retrieval.queries import owners_of

    texts = [caption for row in rows for caption in row.captions]
    examples = choose_examples(ranks.t2v, owners_of(rows), texts, rows, reader, config.evaluate.num_examples)
    title = f"{config.name}/{config.train.run}: text to video on {config.evaluate.split}"
    return retrieval_picture(examples, title)


if __name__ == "__main__":
    main(run, __doc__, FLAGS, sizes_for_evaluation)
