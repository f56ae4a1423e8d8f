"""What a training or evaluation step consumes.

B text-video pairs, F frames, W words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Captions beside their clips.

    Attributes:
        token_ids: (B, W) int64.
        token_mask: (B, W) bool.
        frames: (B, F, 3, H, W) float32, CLIP-normalised.
        frame_mask: (B, F) bool.
        video_ids: (B,) int64, the same number for captions of the same video; None where no one asks.
    """

    token_ids: Tensor
    token_mask: Tensor
    frames: Tensor
    frame_mask: Tensor
    video_ids: Tensor | None = None

    def to(self, device: Any) -> Batch:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def __getitem__(self, rows: slice) -> Batch:
        return self._map(lambda tensor: tensor[rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = (getattr(self, field.name) for field in fields(self))
        return Batch(*(None if value is None else change(value) for value in values))
