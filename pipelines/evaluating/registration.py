"""Part of evaluate: registers the model in MLflow, with the scored clips as its searchable gallery."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cluster.layout import Layout
from cluster.tracking import RunHandle
from gare.config import Config
from gare.data.manifest import ManifestRow
from gare.data.splits import split_hash_of
from gare.retrieval.gallery import FILE, write_gallery
from gare.storage.files import join, read_bytes
from gare.storage.run_folder import RunFolder

logger = logging.getLogger(__name__)

#: Metric that selects the champion; from the training's result, so never from test.
SELECTION = "val/t2v/R1"
REQUIREMENTS = ("torch", "transformers", "safetensors", "instant-clip-tokenizer", "ftfy", "pyarrow")


def write_and_register(
    config: Config,
    places: Layout,
    handle: RunHandle,
    rows: Sequence[ManifestRow],
    val: Sequence[ManifestRow],
    features: Mapping[str, np.ndarray],
) -> str:
    """Writes the gallery and registers the trained model with it as ``gare-NAME``, once per run.

    Args:
        config: of the evaluation.
        places: locations of the data set.
        handle: the training's MLflow run.
        rows: rows of the gallery.
        val: rows of the split that selected the checkpoint.
        features: ``video/frames`` and ``video/mask`` of the gallery.

    Returns:
        NAME/VERSION; empty if the training has no result, MLflow was lost, or the model has no towers, for
        which no gallery is written either.
    """
    if not config.has_towers:
        logger.info(
            "%s is not registered: it was learned from imported features, and without towers it answers no "
            "query",
            config.train.run,
        )
        return ""
    from gare.train.checkpoint.files import TRAINER, copy_checkpoint
    from gare.train.checkpoint.sums import add_file

    gallery = join(places.evaluation(config.train.run, config.evaluate.split), FILE)
    ids = [row.video_id for row in rows]
    write_gallery(gallery, ids, features["video/frames"], features["video/mask"])
    run = RunFolder(places.run(config.train.run))
    name = f"gare-{config.name}"
    if earlier := handle.versions(name):
        return f"{name}/{earlier[0]}"
    if not run.is_finished:
        return ""
    trained = run.read_result()
    with tempfile.TemporaryDirectory() as folder:
        copy_checkpoint(places.checkpoint(config.train.run), folder, leave_out=(TRAINER,))
        add_file(folder, FILE, read_bytes(gallery))
        model = handle.log_model(
            folder,
            Path(__file__).parent / "served_model.py",
            embed_dim=config.model.clip.embed_dim,
            ranked=True,
            requirements=REQUIREMENTS,
        )
    if not model:
        return ""
    score = trained.get(SELECTION) if val else None
    version = handle.register(name, model, val_score=score, val_hash=split_hash_of(val))
    if version and score is None:
        logger.warning(
            "%s/%s is registered and cannot be its champion: %s has no val split, and test never chooses%s",
            name,
            version,
            config.name,
            "; data.val_videos=N in prepare holds train videos out for val"
            if config.data.is_published
            else "",
        )
    return f"{name}/{version}" if version else ""
