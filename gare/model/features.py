"""Features of texts and videos, as the encoders hand them to the score.

N texts, M videos, F frames, W words, D embedding width. Nothing here is normalised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gare.errors import ConfigError, DataError
from gare.tensor_group import TensorGroup


@dataclass(frozen=True, repr=False)
class TextFeatures(TensorGroup):
    """Encoded captions.

    Attributes:
        embedding: (N, D), the end-of-text token after the text projection.
        words: (N, W, D), every token after the projection, or None if ψ does not attend to words.
        mask: (N, W) bool, true for real tokens.
    """

    embedding: Tensor
    words: Tensor | None
    mask: Tensor

    @property
    def known_words(self) -> Tensor:
        """The words, which ψ attends to.

        Raises:
            ConfigError: if there are none.
        """
        if self.words is None:
            raise ConfigError(
                "the text features have no words", where="model.context", accepted="words, from encode_text"
            )
        return self.words


@dataclass(frozen=True, repr=False)
class VideoFeatures(TensorGroup):
    """Encoded clips.

    Attributes:
        frames: (M, F, D), frame features after the temporal transformer. Padded frames are zero, or have
            features of their own where ``model.padding`` is released: the model knows which.
        mask: (M, F) bool, true for real frames; every video has at least one.
    """

    frames: Tensor
    mask: Tensor

    def unmasked(self) -> VideoFeatures:
        """Returns the features with every frame marked as real."""
        return VideoFeatures(self.frames, torch.ones_like(self.mask))

    @property
    def mean(self) -> Tensor:
        """v̄ (M, D), the mean over the real frames."""
        weights_MF = self.mask.to(self.frames.dtype)
        # As a matrix product, which makes no copy of the frames.
        total_MD = (weights_MF.unsqueeze(1) @ self.frames).squeeze(1)
        return total_MD / weights_MF.sum(dim=1, keepdim=True)


def clip_mask(frame_mask: Tensor, limit: int, *, exactly: bool = False) -> Tensor:
    """Checks the lengths of clips and returns their mask (M, F) as bool.

    Args:
        frame_mask: (M, F) bool or 0/1, true for real frames.
        limit: the largest F allowed.
        exactly: whether F must equal ``limit``.

    Raises:
        DataError: for a clip without a frame, or a number of frames, padding included, that is not allowed.
    """
    mask_MF = frame_mask.bool()
    num_frames = mask_MF.shape[1]
    if exactly and num_frames != limit:
        raise DataError(
            f"clips of {num_frames} frames",
            where="encode_video",
            accepted=f"{limit}, padding included: model.padding released counts padded frames",
        )
    if num_frames > limit:
        raise DataError(
            f"clips of {num_frames} frames",
            where="encode_video",
            accepted=f"at most {limit}: model.max_frames and model.clip.max_positions",
        )
    if not mask_MF.any(dim=1).all():
        raise DataError(f"clip {int((~mask_MF.any(dim=1)).nonzero()[0])} has no frame", where="encode_video")
    return mask_MF
