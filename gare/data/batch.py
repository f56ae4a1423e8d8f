"""Batches of a training or evaluation step.

B text-video pairs, F frames, W words, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gare.tensor_group import TensorGroup


@dataclass(frozen=True, repr=False)
class Batch(TensorGroup):
    """Captions with their clips.

    Attributes:
        token_ids: (B, W) int32 or int64.
        token_mask: (B, W) bool.
        frames: (B, F, H, W, 3) uint8, normalised when they are encoded, or (B, F, 3, H, W) floating,
            CLIP-normalised.
        frame_mask: (B, F) bool.
        video_ids: (B,) int64, the same number for captions of the same video; None if not needed.
    """

    token_ids: Tensor
    token_mask: Tensor
    frames: Tensor
    frame_mask: Tensor
    video_ids: Tensor | None = None


@dataclass(frozen=True, repr=False)
class FeatureBatch(TensorGroup):
    """Captions with their clips, as stored features of the towers.

    Attributes:
        text: (B, D) floating.
        words: (B, W, D) floating, or None if the model does not use words.
        token_mask: (B, W) bool.
        frames: (B, F, D) floating, zero at padded frames.
        frame_mask: (B, F) bool.
        video_ids: (B,) int64, as in ``Batch``.
    """

    text: Tensor
    words: Tensor | None
    token_mask: Tensor
    frames: Tensor
    frame_mask: Tensor
    video_ids: Tensor | None = None
