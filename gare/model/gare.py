"""GARE: encode captions and clips, score every pair.

N texts, M videos, F frames, W words, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from gare.config import ModelConfig
from gare.errors import ConfigError
from gare.model.clip import ClipTowers
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.increment import Increment, IncrementRadius, towards
from gare.model.temporal import TemporalTransformer


@dataclass(frozen=True)
class Pairs:
    """What the direct form computes of all pairs.

    Attributes:
        scores: (N, M), cosine scores s_ij in [-1, 1].
        delta: (N, M, D), increments Δ_ij, or None for the baseline.
    """

    scores: Tensor
    delta: Tensor | None


class GARE(nn.Module):
    """CLIP towers, temporal transformer and the pair score with its increment.

    Args:
        config: sizes and switches; ``increment: false`` is the baseline s_ij = cos(t_i, p_ij).

    Source: arXiv 2505.12499, direct form.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.clip.embed_dim
        self.towers = ClipTowers(config.clip)
        self.temporal = TemporalTransformer(
            width, config.temporal_layers, config.temporal_heads, config.clip.max_positions
        )
        self.temporal.start_from_text_tower(self.towers)
        self.increment = (
            Increment(width, config.increment_heads, config.increment_dropout) if config.increment else None
        )
        self.radius = (
            IncrementRadius(config.max_frames) if config.increment and config.query == "text" else None
        )

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the scale κ, a scalar parameter."""
        return self.towers.logit_scale

    @property
    def needs_words(self) -> bool:
        """Whether scores depend on ``TextFeatures.words``."""
        return self.increment is not None and self.config.context == "words"

    def encode_text(self, token_ids: Tensor, token_mask: Tensor) -> TextFeatures:
        """Encodes captions.

        Args:
            token_ids: (N, W) int64, from ``tokenize``.
            token_mask: (N, W) bool or 0/1, true for real tokens; the last of them is the end marker.
        """
        mask_NW = token_mask.bool()
        end_N = mask_NW.sum(dim=1) - 1
        # Columns beyond the longest caption are padding for all; the causal tower does not look ahead.
        longest = int(end_N.max()) + 1
        hidden = self.towers.encode_tokens(token_ids[:, :longest])
        words = self.towers.project_text(hidden)
        rows_N = torch.arange(len(end_N), device=end_N.device)
        embedding_ND = words[rows_N, end_N]
        # Selected, not multiplied: what stands at a padded word may be anything.
        words = torch.where(mask_NW[:, :longest, None], words, 0)
        words_NWD = functional.pad(words, (0, 0, 0, mask_NW.shape[1] - longest))
        return TextFeatures(embedding_ND, words_NWD, mask_NW)

    def encode_video(self, frames: Tensor, frame_mask: Tensor) -> VideoFeatures:
        """Encodes clips; padded frames never enter the image tower.

        Args:
            frames: (M, F, 3, H, W) float, CLIP-normalised.
            frame_mask: (M, F) bool or 0/1, true for real frames.
        """
        mask_MF = frame_mask.bool()
        real_KD = self.towers.encode_images(frames[mask_MF])
        frames_MFD = real_KD.new_zeros(*mask_MF.shape, real_KD.shape[-1])
        frames_MFD[mask_MF] = real_KD
        return VideoFeatures(self.temporal(frames_MFD, mask_MF), mask_MF)

    def score(
        self, text: TextFeatures, video: VideoFeatures, method: Literal["auto", "direct"] = "auto"
    ) -> Tensor:
        """Cosine scores (N, M) of all pairs.

        Raises:
            ConfigError: for an unknown method.
        """
        if method not in ("auto", "direct"):
            raise ConfigError(f"is {method!r}", where="method", accepted="auto or direct")
        return self.pairs(text, video).scores

    def pairs(self, text: TextFeatures, video: VideoFeatures) -> Pairs:
        """Scores and increments of all pairs, memory N·M·D.

        s_ij = cos(t_i + Δ_ij, p_ij), or cos(t_i, p_ij + Δ_ij) where the video is the corrected side.

        Raises:
            ConfigError: for text features without words where they are the context of ψ.
        """
        pooled_NMD = pool(text.embedding, video, self.config.pool_temperature)
        text_NMD = text.embedding.unsqueeze(1)
        delta_NMD = self.deltas(text, video)
        if delta_NMD is None:
            pass
        elif self.config.corrected_side == "text":
            text_NMD = text_NMD + delta_NMD
        else:
            pooled_NMD = pooled_NMD + delta_NMD
        return Pairs(functional.cosine_similarity(text_NMD, pooled_NMD, dim=-1), delta_NMD)

    def deltas(self, text: TextFeatures, video: VideoFeatures) -> Tensor | None:
        """The increments Δ_ij (N, M, D) of all pairs, or None for the baseline.

        Query gap: Δ_ij = ψ(η(v̄_j − t_i)). Query text: t*_ij = ψ(t_i), Δ_ij = R_ij·unit(v̄_j − t*_ij).
        ψ attends to the frames of video j, or to the words of text i.

        Raises:
            ConfigError: for text features without words where they are the context of ψ.
        """
        if self.increment is None:
            return None
        text_NMD = text.embedding.unsqueeze(1)
        if self.radius is not None:
            query_NMD = text_NMD.expand(-1, len(video.frames), -1)
            radius_NM = self.radius(text.embedding, video.frames, video.mask)
            return towards(video.mean, self.increment(query_NMD, video.frames, video.mask), radius_NM)
        gap_NMD = self.config.gap_sign * (video.mean.unsqueeze(0) - text_NMD)
        if self.config.context == "frames":
            delta_NMD: Tensor = self.increment(gap_NMD, video.frames, video.mask)
            return delta_NMD
        if text.words is None:
            raise ConfigError(
                "the text features have no words", where="model.context", accepted="words, from encode_text"
            )
        delta_MND: Tensor = self.increment(gap_NMD.transpose(0, 1), text.words, text.mask)
        return delta_MND.transpose(0, 1)


def pool(text_ND: Tensor, video: VideoFeatures, temperature: float) -> Tensor:
    """Text-conditioned pooling p_ij = Σ_f softmax_f(t_i·v_jf / τ_pool) v_jf, padded frames excluded.

    Returns:
        (N, M, D).
    """
    logits_NMF = torch.einsum("nd,mfd->nmf", text_ND, video.frames) / temperature
    logits_NMF = logits_NMF.masked_fill(~video.mask, -torch.inf)
    return torch.einsum("nmf,mfd->nmd", logits_NMF.softmax(dim=-1), video.frames)
