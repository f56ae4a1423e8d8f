"""The model as MLflow serves it: captions in, text embeddings (captions, D) float32 out."""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster.tracking import serve_model
from gare import load_checkpoint, tokenize


def predict(model: Any, captions: list[str]) -> np.ndarray:
    """Embeds captions."""
    import torch

    with torch.inference_mode():
        features = model.encode_text(*tokenize(captions, model.config.max_words))
    embeddings: np.ndarray = features.embedding.numpy()
    return embeddings


serve_model(load_checkpoint, predict)
