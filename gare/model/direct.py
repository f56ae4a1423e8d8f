"""The direct form of the pair score: every pair computed as the paper writes it, memory N·M·D.

N texts, M videos, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from gare.config import ModelConfig
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.increment import Increment, IncrementRadius, increments_towards
from gare.model.pooling import pool, unit_mean


@dataclass(frozen=True)
class Pairs:
    """Scores and increments of all pairs, as the direct form computes them.

    Attributes:
        scores: (N, M), cosine scores s_ij in [-1, 1].
        delta: (N, M, D), increments Δ_ij, or None for the baseline.
    """

    scores: Tensor
    delta: Tensor | None


def direct_pairs(
    config: ModelConfig,
    increment: Increment | None,
    radius: IncrementRadius | None,
    text: TextFeatures,
    video: VideoFeatures,
    keep_OD: Tensor | None,
) -> Pairs:
    """Computes scores and increments; see ``PairScorer.pairs``."""
    if config.pooling == "mean":
        unit_ND, unit_MD = functional.normalize(text.embedding), functional.normalize(unit_mean(video))
        return Pairs((unit_ND @ unit_MD.T).clamp(-1, 1), None)
    pooled_NMD = direct_pooled(config, text, video)
    text_NMD = text.embedding.unsqueeze(1)
    delta_NMD = direct_deltas(config, increment, radius, text, video, keep_OD)
    if delta_NMD is None:
        pass
    elif config.corrected_side == "text":
        text_NMD = text_NMD + delta_NMD
    else:
        pooled_NMD = pooled_NMD + delta_NMD
    # Only rounding can take scores outside [−1, 1].
    scores_NM = functional.cosine_similarity(text_NMD, pooled_NMD, dim=-1).clamp(-1, 1)
    return Pairs(scores_NM, delta_NMD)


def direct_pooled(config: ModelConfig, text: TextFeatures, video: VideoFeatures) -> Tensor:
    """Pools the frames; see ``PairScorer.pooled``."""
    return pool(text.embedding, video, config.pool_temperature, released_padding=config.padding == "released")


def direct_deltas(
    config: ModelConfig,
    increment: Increment | None,
    radius: IncrementRadius | None,
    text: TextFeatures,
    video: VideoFeatures,
    keep_OD: Tensor | None,
) -> Tensor | None:
    """Computes increments; see ``PairScorer.deltas``."""
    if increment is None:
        return None
    # The released code masks padded frames only in the pooling.
    seen = video.unmasked() if config.padding == "released" else video
    text_NMD = text.embedding.unsqueeze(1)
    if radius is not None:
        query_NMD = text_NMD.expand(-1, len(video.frames), -1)
        radius_NM = radius(text.embedding, video.frames, video.mask)
        start_NMD = increment(query_NMD, seen.frames, seen.mask, keep_OD)
        return increments_towards(seen.mean, start_NMD, radius_NM)
    gap_NMD = config.gap_sign * (seen.mean.unsqueeze(0) - text_NMD)
    if config.context == "frames":
        delta_NMD: Tensor = increment(gap_NMD, seen.frames, seen.mask, keep_OD)
        return delta_NMD
    delta_MND: Tensor = increment(gap_NMD.transpose(0, 1), text.known_words, text.mask, keep_OD)
    return delta_MND.transpose(0, 1)
