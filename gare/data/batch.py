"""Batches of a training or evaluation step.

B text-video pairs, F frames, W words, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Batch:
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

    def to(self, device: Any) -> Batch:
        """Copies the batch to another device."""
        return self._map(lambda tensor: tensor.to(device))

    def __getitem__(self, rows: slice) -> Batch:
        return self._map(lambda tensor: tensor[rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            token_ids=change(self.token_ids),
            token_mask=change(self.token_mask),
            frames=change(self.frames),
            frame_mask=change(self.frame_mask),
            video_ids=None if self.video_ids is None else change(self.video_ids),
        )


@dataclass(frozen=True)
class FeatureBatch:
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

    def to(self, device: Any) -> FeatureBatch:
        """Copies the batch to another device."""
        return self._map(lambda tensor: tensor.to(device))

    def __getitem__(self, rows: slice) -> FeatureBatch:
        return self._map(lambda tensor: tensor[rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> FeatureBatch:
        return FeatureBatch(
            text=change(self.text),
            words=None if self.words is None else change(self.words),
            token_mask=change(self.token_mask),
            frames=change(self.frames),
            frame_mask=change(self.frame_mask),
            video_ids=None if self.video_ids is None else change(self.video_ids),
        )
