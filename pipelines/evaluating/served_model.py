"""The model as served by MLflow: takes captions, returns ranked videos of its gallery with scores.

A model without a gallery returns text embeddings (captions, D) float32.
"""

from __future__ import annotations

from typing import Any

from cluster.tracking import serve_model
from gare import load_checkpoint, tokenize
from gare.retrieval.gallery import FILE, gallery_of, search
from gare.storage.files import exists, join
from gare.train.checkpoint.sums import SummedFolder

#: Number of videos returned for a caption.
TOP = 10


def load(folder: str) -> tuple[Any, Any]:
    """Returns the model and its gallery, or None without one; checks both against their SHA-256."""
    model, gallery = load_checkpoint(folder).eval(), join(folder, FILE)
    if not exists(gallery):
        return model, None
    return model, gallery_of(SummedFolder(folder).read(FILE), gallery).prepared(model)


def predict(loaded: tuple[Any, Any], captions: list[str]) -> Any:
    """Returns ``video_ids`` and ``scores`` per caption, best first; embeddings without a gallery."""
    import torch

    model, gallery = loaded
    if gallery is not None:
        found = search(model, gallery, captions, TOP)
        return [
            {"video_ids": [video for video, _ in ranked], "scores": [score for _, score in ranked]}
            for ranked in found
        ]
    with torch.inference_mode():
        return model.encode_text(*tokenize(captions, model.config.max_words)).embedding.numpy()


serve_model(load, predict)
