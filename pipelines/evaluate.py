"""evaluate: checkpoint + frame store → retrieval metrics of a split, both directions."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.command import main
from cluster.session import num_cpus, num_gpus, ray_session
from cluster.storage import Layout, absolute, layout
from cluster.tracking import RunHandle, connect
from gare.config import Config, differences
from gare.data.files import exists, join, read_json, write_atomically, write_json
from gare.data.manifest import ManifestRow
from gare.errors import CheckpointError, DataError
from gare.train.data import read_splits

if TYPE_CHECKING:
    from gare.model.gare import GARE

logger = logging.getLogger(__name__)

#: Clips and captions that one encoding task takes.
CLIPS_PER_TASK, CAPTIONS_PER_TASK = 32, 512


def run(config: Config) -> dict[str, Any]:
    """Scores a split and logs the metrics to the training's MLflow run.

    Raises:
        CheckpointError: for a checkpoint that is missing or of another model.
        DataError: for a store that is missing or made with other settings, or a split without videos.
        GareError: where MLflow cannot be reached.
    """
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
        if settings is None:
            with ray_session(config.cluster):
                features = _encode(config, checkpoint, places.frames, rows)
        else:
            features = _encode_stored(config, model, store, rows)
        metrics, picture = _score(config, model, places.frames, rows, features)
    except BaseException:
        # The training itself has not failed.
        handle.finish("FINISHED" if own else "FAILED")
        raise
    folder = places.evaluation(config.train.run, split)
    write_atomically(join(folder, "retrieval.png"), picture)
    handle.log_metrics({f"{split}/{name}": value for name, value in metrics.items()}, 0)
    counts = {"videos": len(rows), "captions": len(features["text/embedding"])}
    handle.log_dataset(
        f"{splits.benchmark}-{split}", splits.manifest_fingerprint, places.manifest, split, counts
    )
    handle.log_figure_bytes(f"retrieval-{split}.png", picture)
    handle.finish()
    result = {
        "run": config.train.run,
        "checkpoint": checkpoint,
        "split": split,
        "num_texts": counts["captions"],
        "num_videos": counts["videos"],
        "metrics": metrics,
        "picture": join(folder, "retrieval.png"),
        "mlflow_run_id": handle.run_id,
        "seconds": round(time.monotonic() - started, 2),
    }
    write_json(join(folder, "result.json"), result)
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
    config: Config, model: GARE, store: str, rows: Sequence[ManifestRow]
) -> dict[str, np.ndarray]:
    """As ``_encode``, from features; what follows the towers is too little work to be spread."""
    from gare.data.features import FeatureReader
    from gare.retrieval.encode import encode_stored

    reader = FeatureReader(store, words=model.needs_words, cache_mb=config.features.cache_mb)
    return encode_stored(model, reader, [row.video_id for row in rows], batch=CAPTIONS_PER_TASK)


def _open_tracking(config: Config, places: Layout, checkpoint: str) -> tuple[RunHandle, bool]:
    """The training's run and True, or a new one and False for a checkpoint from elsewhere."""
    tracker = connect(config.tracking, places.root)
    record = join(places.run(config.train.run), "run.json")
    own = checkpoint == places.checkpoint(config.train.run) and exists(record)
    run_id = read_json(record)["mlflow_run_id"] if own else None
    pending = str(Path(places.data) / "mlflow-pending.jsonl") if places.is_local else ""
    tags = {} if own else {"checkpoint": checkpoint}
    name = f"{config.name}/{config.train.run if own else 'evaluate'}"
    return tracker.start_run(name, run_id=run_id, tags=tags, pending=pending), own


def _encode(
    config: Config, checkpoint: str, store: str, rows: Sequence[ManifestRow]
) -> dict[str, np.ndarray]:
    """``video/…`` of the clips and ``text/…`` of all their captions, in the order of the rows."""
    device = "cuda" if config.cluster.use_gpu else "cpu"

    def load() -> Any:
        from gare.retrieval.encode import Encoder
        from gare.train.state import load_checkpoint

        return Encoder(load_checkpoint(checkpoint), store, device)

    gpus = config.cluster.use_gpu and num_gpus()
    tasks: list[tuple[str, list[str]]] = []
    ids = [row.video_id for row in rows]
    captions = [caption for row in rows for caption in row.captions]
    for kind, items, size in (("clips", ids, CLIPS_PER_TASK), ("captions", captions, CAPTIONS_PER_TASK)):
        tasks += [(kind, items[first : first + size]) for first in range(0, len(items), size)]
    results = _map_in_order(load, tasks, actors=int(gpus) or min(num_cpus(), len(tasks)), gpu=bool(gpus))
    parts: dict[str, list[np.ndarray]] = {}
    for (kind, _), result in zip(tasks, results, strict=True):
        for name, array in result.items():
            parts.setdefault(f"{'video' if kind == 'clips' else 'text'}/{name}", []).append(array)
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _map_in_order(
    load: Callable[[], Any], tasks: Sequence[tuple[str, list[str]]], *, actors: int, gpu: bool
) -> list[dict[str, np.ndarray]]:
    """Calls method ``kind`` of ``load()`` with the items of each task, on an actor pool; every task once."""
    import ray
    from ray.util import ActorPool

    class Worker:
        def __init__(self) -> None:
            self.encoder: Any = None

        def call(self, kind: str, items: list[str]) -> dict[str, np.ndarray]:
            # Not in the constructor, whose faults Ray hands over as text alone.
            self.encoder = self.encoder or load()
            result: dict[str, np.ndarray] = getattr(self.encoder, kind)(items)
            return result

    remote = ray.remote(num_cpus=0 if gpu else 1, num_gpus=1 if gpu else 0)(Worker)
    pool = ActorPool([remote.remote() for _ in range(actors)])
    return list(pool.map(lambda actor, task: actor.call.remote(*task), list(tasks)))


def _score(
    config: Config,
    model: GARE,
    store: str,
    rows: Sequence[ManifestRow],
    features: dict[str, np.ndarray],
) -> tuple[dict[str, float], bytes]:
    import torch

    from gare.data.frames import open_pictures
    from gare.model.features import TextFeatures, VideoFeatures
    from gare.retrieval.examples import choose_examples
    from gare.retrieval.metrics import retrieval_metrics
    from gare.retrieval.pictures import retrieval_picture
    from gare.retrieval.scoring import score_split

    tensors = {name: torch.from_numpy(array) for name, array in features.items()}
    text = TextFeatures(tensors["text/embedding"], tensors.get("text/words"), tensors["text/mask"])
    video = VideoFeatures(tensors["video/frames"], tensors["video/mask"])
    scores = score_split(model, text, video)
    owners = torch.repeat_interleave(torch.tensor([len(row.captions) for row in rows]))
    texts = [caption for row in rows for caption in row.captions]
    examples = choose_examples(
        scores, owners, texts, rows, open_pictures(store), config.evaluate.num_examples
    )
    title = f"{config.name}/{config.train.run}: text to video on {config.evaluate.split}"
    return retrieval_metrics(scores, owners), retrieval_picture(examples, title)


if __name__ == "__main__":
    main(run, __doc__)
