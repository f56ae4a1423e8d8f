"""What the encoders hand to the score.

N texts, M videos, F frames, W words, D embedding width. Nothing here is normalised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextFeatures:
    """Encoded captions.

    Attributes:
        embedding: (N, D), the end-of-text token after the text projection.
        words: (N, W, D), every token after the projection, or None where no one attends to words.
        mask: (N, W) bool, true for real tokens.
    """

    embedding: Tensor
    words: Tensor | None
    mask: Tensor

    def float(self) -> TextFeatures:
        """The same in float32."""
        words = None if self.words is None else self.words.float()
        return TextFeatures(self.embedding.float(), words, self.mask)

    def __getitem__(self, rows: slice | Tensor) -> TextFeatures:
        words = None if self.words is None else self.words[rows]
        return TextFeatures(self.embedding[rows], words, self.mask[rows])


@dataclass(frozen=True)
class VideoFeatures:
    """Encoded clips.

    Attributes:
        frames: (M, F, D), frame features after the temporal transformer, zero at padded frames.
        mask: (M, F) bool, true for real frames; every video has at least one.
    """

    frames: Tensor
    mask: Tensor

    def float(self) -> VideoFeatures:
        """The same in float32."""
        return VideoFeatures(self.frames.float(), self.mask)

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, rows: slice | Tensor) -> VideoFeatures:
        return VideoFeatures(self.frames[rows], self.mask[rows])

    def split(self, size: int) -> Iterator[VideoFeatures]:
        """Consecutive parts of ``size`` clips, whose gradients are joined once and not added up."""
        parts = zip(torch.split(self.frames, size), torch.split(self.mask, size), strict=True)
        return (VideoFeatures(*part) for part in parts)

    @property
    def mean(self) -> Tensor:
        """v̄ (M, D), the mean over the real frames."""
        weights_MF = self.mask.to(self.frames.dtype)
        # A product, so that no copy of the frames is made.
        total_MD = (weights_MF.unsqueeze(1) @ self.frames).squeeze(1)
        return total_MD / weights_MF.sum(dim=1, keepdim=True)
