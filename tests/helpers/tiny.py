"""A model small enough to train in a test, and batches for it.

B pairs, F frames, W words.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch

from gare.config import Config, parse_config
from gare.data.batch import Batch, FeatureBatch
from gare.model.gare import GARE
from gare.train.input.sampler import share_of

AnyBatch = TypeVar("AnyBatch", Batch, FeatureBatch)

TREE: dict[str, Any] = {
    "name": "tiny",
    "extract": {"image_size": 16, "num_frames": 4, "encoding": "raw"},
    "model": {
        "clip": {
            "image_size": 16,
            "patch_size": 8,
            "vision_width": 32,
            "vision_layers": 2,
            "vision_heads": 2,
            "text_width": 32,
            "text_layers": 2,
            "text_heads": 2,
            "vocab_size": 64,
            "max_positions": 16,
            "embed_dim": 32,
        },
        "max_words": 8,
        "max_frames": 4,
        "temporal_layers": 2,
        "temporal_heads": 2,
        "increment_heads": 2,
    },
    # Weights with which no term dominates, and a bound that radii do not reach.
    "loss": {
        "bottleneck_weight": 1e-2,
        "radii_weight": 0.5,
        "radii_bound": 1e6,
        "direction_weight": 0.5,
    },
    "train": {"batch_size": 6, "epochs": 3, "clip_lr": 1e-3, "lr": 1e-3},
    "cluster": {"train_workers": 1, "loaders_per_worker": 1},
}


def tiny_config(*overrides: str) -> Config:
    """Returns the tiny configuration with ``section.key=value`` overrides."""
    return parse_config(TREE, overrides)


def moved_model(*overrides: str) -> GARE:
    """Returns the tiny model in evaluation mode, moved away from its start, where much of ψ is near zero."""
    model = GARE(tiny_config(*overrides).model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_batch(config: Config, rng: np.random.Generator) -> Batch:
    """Draws a global batch: captions and clips vary in length, one clip has a single frame."""
    size, model = config.train.batch_size, config.model
    side = model.clip.image_size
    lengths = rng.integers(3, model.max_words + 1, size)
    token_mask = np.arange(model.max_words) < lengths[:, None]
    token_ids = rng.integers(1, model.clip.vocab_size, (size, model.max_words)) * token_mask
    num_frames = rng.integers(2, model.max_frames + 1, size)
    num_frames[0], num_frames[-1] = 1, model.max_frames
    frame_mask = np.arange(model.max_frames) < num_frames[:, None]
    frames = rng.standard_normal((size, model.max_frames, 3, side, side), dtype=np.float32)
    frames *= frame_mask[:, :, None, None, None]
    video_ids = rng.integers(0, max(size // 2, 1), size)
    return Batch(*map(torch.from_numpy, (token_ids, token_mask, frames, frame_mask, video_ids)))


def tiny_feature_batch(config: Config, rng: np.random.Generator) -> FeatureBatch:
    """Draws a batch like ``tiny_batch``, of stored features."""
    batch, width = tiny_batch(config, rng), config.model.clip.embed_dim
    text, words, frames = (
        torch.from_numpy(rng.standard_normal((*shape, width), dtype=np.float32))
        for shape in (batch.token_ids.shape[:1], batch.token_ids.shape, batch.frame_mask.shape)
    )
    frames *= batch.frame_mask.unsqueeze(-1)
    words *= batch.token_mask.unsqueeze(-1)
    return FeatureBatch(text, words, batch.token_mask, frames, batch.frame_mask, batch.video_ids)


def share(batch: AnyBatch, rank: int, workers: int) -> AnyBatch:
    """Returns a worker's rows of a global batch."""
    return batch[share_of(len(batch.frames), rank, workers)]
