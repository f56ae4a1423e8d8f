"""Scores of pairs from features: the increment's settings, its dropout, and the path that computes a block.

N texts, M videos, F frames, O owners of a basis, X others, D embedding width.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from gare.config import ModelConfig
from gare.errors import ConfigError
from gare.model.budget import Budget
from gare.model.direct import Pairs, direct_deltas, direct_pairs, direct_pooled
from gare.model.factorized.basis import BasisMaps, build_basis, queries_in_key_space
from gare.model.factorized.lean_video import map_text
from gare.model.factorized.pairs import PairNumbers, ScoringRule, pair_numbers
from gare.model.factorized.prepared import Embeddings, PreparedText, PreparedVideo
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.fused.blocks import FusedPairs, FusedRequest, fused_pairs
from gare.model.fused.tile_sizes import why_unavailable
from gare.model.increment import Increment, IncrementRadius
from gare.model.pooling import unit_mean

logger = logging.getLogger(__name__)

#: Number of pairs of a step up to which the direct form is faster on a GPU than the factorised form in plain
#: operations. On an H200 in float32 (F 12, D 512) it takes 7.6 and 21 ms at 128 and 256 pairs, and the
#: factorised form's launches take 30.
DIRECT_STEP_PAIRS = 256
#: Vectors of width D, about, that the direct form holds at once for each pair.
DIRECT_VECTORS = 12

#: Forms of the score: from every Δ_ij as a vector, or from a few numbers per pair.
ScorePath = Literal["direct", "factorized"]


class PairScorer:
    """Scorer of text-video pairs: computes scores, increments and coefficients from features.

    It holds no parameters: it refers to ψ and its radius, which are modules of the model and are saved there.
    If the whole model is copied or pickled, the copy's scorer refers to the copy's ψ. The model's ``train``
    and ``eval`` take effect here through ψ.

    Args:
        config: sizes and switches.
        increment: ψ, or None for the baseline.
        radius: of increments if ψ's query is the text, else None.

    Source: arXiv 2505.12499, direct form.
    """

    def __init__(
        self, config: ModelConfig, increment: Increment | None, radius: IncrementRadius | None
    ) -> None:
        self.config = config
        self.increment = increment
        self.radius = radius
        self._said: set[str] = set()

    @property
    def training(self) -> bool:
        """True if ψ is in training; the baseline has nothing that training changes."""
        return self.increment is not None and self.increment.training

    @property
    def released_padding(self) -> bool:
        """True if padded frames count as in the released code."""
        return self.config.padding == "released"

    @property
    def needs_words(self) -> bool:
        """True if scores depend on ``TextFeatures.words``."""
        return self.context_of == "text"

    @property
    def context_of(self) -> Literal["video", "text", "none"]:
        """The side that ψ attends to, which owns the basis of the increments."""
        if self.increment is None:
            return "none"
        return "video" if self.config.context == "frames" else "text"

    @property
    def rule(self) -> ScoringRule:
        """The rule that turns numbers of a pair into its score."""
        config = self.config
        return ScoringRule(
            config.corrected_side, config.pool_temperature, self.radius, pooling=config.pooling
        )

    def path(self, method: str | None = None) -> ScorePath:
        """Chooses the form that computes pairs; logs once why auto cannot use the factorised form.

        Args:
            method: auto takes the factorised form wherever it is exact; None means ``config.method``.

        Raises:
            ConfigError: for an unknown method, or factorized for a model that has no factorised form.
        """
        method = method or self.config.method
        if method not in ("auto", "direct", "factorized"):
            raise ConfigError(f"is {method!r}", where="method", accepted="auto, direct or factorized")
        reason = self.why_direct
        if method == "factorized" and reason:
            raise ConfigError(reason, where="method", accepted="auto or direct")
        if method == "auto" and reason:
            self._say_once(f"{reason}: the direct form is used")
        return "direct" if method == "direct" or reason else "factorized"

    def path_of_step(self, frames: Tensor, reason: str = "") -> ScorePath:
        """Chooses the form of a training step's pairs: where both are exact, auto takes the faster one.

        Args:
            frames: (N, F, D) of the global batch.
            reason: why the loss cannot use the fused kernels; empty if it can.
        """
        path = self.path()
        may_choose = self.config.method == "auto" and self.increment is not None and frames.is_cuda
        if path == "direct" or not may_choose or frames.shape[0] > DIRECT_STEP_PAIRS:
            return path
        needed = DIRECT_VECTORS * frames.dtype.itemsize * frames.shape[0] ** 2 * frames.shape[2]
        if needed > Budget.of(self.config.memory_mb, frames.device).total:
            return path
        if self.takes_kernel(frames.shape[1], frames.dtype, frames.device, reason):
            return "factorized"
        faster = f"the direct form is used, which is faster up to {DIRECT_STEP_PAIRS} pairs"
        self._say_once(faster, logging.INFO)
        return "direct"

    def _say_once(self, message: str, level: int = logging.WARNING) -> None:
        if message not in self._said:
            logger.log(level, "%s", message)
            self._said.add(message)

    @property
    def why_direct(self) -> str:
        """The reason why only the direct form is exact at present; empty if the factorised form is too."""
        if self.released_padding:
            return "padding released has no factorised form"
        if self.increment is None:
            return ""
        if len(self.increment.layers) > 1:
            return f"increment_layers {len(self.increment.layers)} has no factorised form"
        if self.training and self.config.increment_dropout and self.config.increment_dropout_per == "pair":
            return "dropout of each pair has no factorised form"
        return ""

    def pair_numbers(
        self,
        owners: PreparedVideo | PreparedText,
        others: Embeddings | PreparedVideo,
        *,
        unit_radius: bool = False,
    ) -> PairNumbers:
        """Computes a block of pairs in the factorised form, (O, X); no block is computed elsewhere.

        Args:
            owners: of the basis; videos for the baseline.
            others: texts, or videos where texts are the owners.
            unit_radius: whether increments that have a radius are taken with length 1 instead.
        """
        rule = replace(self.rule, unit=True) if unit_radius else self.rule
        return pair_numbers(rule, owners, others)

    def pair_scores(self, owners: PreparedVideo | PreparedText, others: Embeddings | PreparedVideo) -> Tensor:
        """Computes the scores of a block, (O, X), for callers that need only the scores."""
        if isinstance(owners, PreparedVideo) and isinstance(others, Embeddings):
            num_frames = owners.mask.shape[1]
            if self.takes_kernel(num_frames, owners.dtype, owners.device):
                return self.fused_pairs(owners, others, FusedRequest()).scores
        return self.pair_numbers(owners, others).scores

    def fused_pairs(self, owners: PreparedVideo, others: Embeddings, request: FusedRequest) -> FusedPairs:
        """Computes a block of pairs by the fused kernels; only if ``takes_kernel``."""
        return fused_pairs(self.rule, others, owners, request, precision=self.config.products)

    def takes_kernel(
        self, num_frames: int, dtype: torch.dtype, device: torch.device, reason: str = ""
    ) -> bool:
        """Returns True if the fused kernels compute blocks of pairs; otherwise logs the reason once.

        Args:
            num_frames: of a video.
            dtype: of the features.
            device: of the features.
            reason: why the caller cannot use the kernels; empty if it can.

        Raises:
            ConfigError: for ``model.kernel`` triton if the kernels cannot be used.
        """
        kernel = self.config.kernel
        if kernel == "plain" or (kernel == "auto" and device.type != "cuda"):
            return False
        weights = num_frames * self.config.increment_heads
        reason = reason or self._why_not_fused() or why_unavailable(weights, dtype, device)
        if reason and kernel == "triton":
            raise ConfigError(
                f"cannot be had: {reason}", where="model.kernel triton", accepted="auto or plain"
            )
        how = f"plain operations, since {reason}" if reason else "fused Triton kernels"
        self._say_once(f"pairs on {device.type} are computed by {how}", logging.INFO)
        return not reason

    def _why_not_fused(self) -> str:
        if self.context_of == "none":
            return "a model without increments has no kernel"
        if self.context_of == "text":
            return "context words has no kernel"
        if self.radius is not None:
            return "query text has no kernel"
        return ""

    @property
    def has_dropout(self) -> bool:
        """True if ψ's contexts have dropout now."""
        by_context = self.config.increment_dropout_per == "context"
        return (
            self.increment is not None and self.training and self.config.increment_dropout > 0 and by_context
        )

    def draw_dropout(self, owners: int, generator: torch.Generator | None = None) -> Tensor | None:
        """Draws ψ's dropout for owners of a context: (owners, D) factors 0 or 1/(1 − p); None without it.

        Args:
            owners: number of videos if frames are the context, of texts if words are.
            generator: to draw from, on the CPU, so that a seed means the same on any device.
        """
        if not self.has_dropout or self.increment is None:
            return None
        drop = self.config.increment_dropout
        draws = torch.rand(owners, self.config.clip.embed_dim, generator=generator)
        weight = self.increment.mean.weight
        return ((draws >= drop).to(weight.dtype) / (1 - drop)).to(weight.device)

    def basis_maps(self) -> BasisMaps | None:
        """Combines ψ's linear maps, once for a step or a stream of blocks."""
        return None if self.increment is None else BasisMaps.of(self.increment, has_dropout=self.has_dropout)

    def query_embeddings(self, embedding_XD: Tensor, *, lean: bool = False) -> Embeddings:
        """Prepares embeddings of the side that does not own the basis as queries of ψ.

        Args:
            embedding_XD: X embeddings.
            lean: whether the queries are for lean videos.
        """
        if self.increment is None:
            return Embeddings.of(embedding_XD)
        sign = 1 if self.radius is not None else self.config.gap_sign
        if self.radius is None and self.context_of == "video":
            sign = -sign  # the query is η(v̄ − t), and texts are the queries
        turned_HXD = sign * queries_in_key_space(self.increment, embedding_XD)
        if lean:
            return Embeddings.of(embedding_XD, None, map_text(self.increment, embedding_XD, turned_HXD))
        return Embeddings.of(embedding_XD, turned_HXD)

    def with_basis(
        self,
        video: VideoFeatures,
        maps: BasisMaps | None,
        keep_MD: Tensor | None,
        *,
        lean: bool = False,
        with_dropped: bool = False,
    ) -> PreparedVideo:
        """Prepares videos, with the basis of their frames if frames are the context.

        Args:
            video: frame features, zero at padding.
            maps: from ``basis_maps``.
            keep_MD: dropout of each video, or None.
            lean: whether videos keep the inputs of their basis in place of it; impossible with dropout.
            with_dropped: whether the basis must hold what dropout acts on.
        """
        if self.config.pooling == "mean":
            # A clip becomes one unit vector, as if it had a single frame.
            unit_M1D = functional.normalize(unit_mean(video)).unsqueeze(1)
            one = VideoFeatures(unit_M1D, torch.ones_like(video.mask[:, :1]))
            return replace(PreparedVideo.of(one, None), average=video.mean)
        if self.increment is None or maps is None:
            return PreparedVideo.of(video, None)
        if self.context_of == "text":
            return PreparedVideo.of(video, None, self.query_embeddings(video.mean))
        asks_text = self.radius is not None
        basis = build_basis(
            self.increment,
            maps,
            video.frames,
            video.mask,
            video.mean,
            own_sign=0 if asks_text else self.config.gap_sign,
            goal_OD=video.mean if asks_text else None,
            keep_OD=keep_MD,
            with_dropped=with_dropped,
        )
        return PreparedVideo.lean(video, basis) if lean else PreparedVideo.of(video, basis)

    def prepare_text(self, text: TextFeatures, maps: BasisMaps, keep_ND: Tensor | None) -> PreparedText:
        """Prepares texts, with the basis of their words, for a ψ whose context is words.

        Raises:
            ConfigError: for text features without words.
        """
        assert self.increment is not None
        basis = build_basis(
            self.increment,
            maps,
            text.known_words,
            text.mask,
            text.embedding,
            own_sign=-self.config.gap_sign,
            keep_OD=keep_ND,
        )
        products_NL = (basis.vectors @ text.embedding.unsqueeze(2)).squeeze(2)
        return PreparedText(Embeddings.of(text.embedding), basis, products_NL)

    def prepare_video(self, video: VideoFeatures, *, lean: bool = False) -> PreparedVideo:
        """Computes the part of factorised scores that depends on videos alone, for any number of texts.

        Where words are the context of ψ, or there is no ψ, this is little more than the frame features.

        Args:
            video: M encoded clips.
            lean: whether to keep a third of the numbers, from which the same scores follow. Queries of a few
                texts read less and are faster; a thousand texts or more take a tenth longer, since ψ's maps
                are applied to each of them.

        Raises:
            ConfigError: for a ψ that has no factorised form, or for lean videos with dropout.
        """
        if reason := self.why_direct:
            raise ConfigError(
                reason, where="model", accepted="one layer, dropout by context or none, padding masked"
            )
        if lean and self.has_dropout:
            raise ConfigError("lean videos have no dropout", where="prepare_video", accepted="model.eval()")
        owners = len(video.mask) if self.context_of == "video" else 0
        with torch.autocast(video.frames.device.type, enabled=False):
            exact = video.cast(torch.promote_types(video.frames.dtype, torch.float32))
            return self.with_basis(exact, self.basis_maps(), self.draw_dropout(owners), lean=lean)

    def pairs(self, text: TextFeatures, video: VideoFeatures, keep_OD: Tensor | None = None) -> Pairs:
        """Computes scores and increments of all pairs in the direct form, memory N·M·D.

        s_ij = cos(t_i + Δ_ij, p_ij), or cos(t_i, p_ij + Δ_ij) where the video is the corrected side.

        Args:
            text: N encoded captions.
            video: M encoded clips.
            keep_OD: from ``draw_dropout``; None, in training, for dropout drawn for each pair.

        Raises:
            ConfigError: for text features without words where they are the context of ψ.
        """
        return direct_pairs(self.config, self.increment, self.radius, text, video, keep_OD)

    def pooled(self, text: TextFeatures, video: VideoFeatures) -> Tensor:
        """Computes the text-conditioned pooling p_ij (N, M, D) of all pairs."""
        return direct_pooled(self.config, text, video)

    def deltas(
        self, text: TextFeatures, video: VideoFeatures, keep_OD: Tensor | None = None
    ) -> Tensor | None:
        """Computes the increments Δ_ij (N, M, D) of all pairs, or returns None for the baseline.

        Query gap: Δ_ij = ψ(η(v̄_j − t_i)). Query text: t*_ij = ψ(t_i), Δ_ij = R_ij·unit(v̄_j − t*_ij). ψ
        attends to the frames of video j, or to the words of text i. Where padding is released, padded frames
        count in v̄_j and are attended to; in R_ij they always count 0.

        Raises:
            ConfigError: for text features without words where they are the context of ψ.
        """
        return direct_deltas(self.config, self.increment, self.radius, text, video, keep_OD)
