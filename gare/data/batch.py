"""What a training or evaluation step consumes.

B text-video pairs, F frames, W words.
"""

from __future__ import annotations

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
    """

    token_ids: Tensor
    token_mask: Tensor
    frames: Tensor
    frame_mask: Tensor

    def to(self, device: Any) -> Batch:
        """The same batch on another device."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))
