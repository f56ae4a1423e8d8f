"""GARE: encode captions and clips, score every pair.

N texts, M videos, F frames, W words, D embedding width.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from gare.config import ModelConfig
from gare.errors import ConfigError
from gare.model.adapters import Adapters
from gare.model.basis import BasisMaps, build_basis, turn
from gare.model.clip import ClipTowers, NoTowers, tower_frames, tower_text
from gare.model.direct import Pairs, direct_deltas, direct_pairs
from gare.model.factorized import Rule
from gare.model.features import TextFeatures, VideoFeatures, clip_mask
from gare.model.increment import Increment, IncrementRadius
from gare.model.pooling import pool, unit_mean
from gare.model.prepared import Embeddings, PreparedText, PreparedVideo
from gare.model.streaming import stream_direct, stream_factorized
from gare.model.temporal import TemporalTransformer

logger = logging.getLogger(__name__)


class GARE(nn.Module):
    """CLIP towers, temporal transformer and the pair score with its increment.

    Args:
        config: sizes and switches; ``increment: false`` is the baseline s_ij = cos(t_i, p_ij).
        towers: whether to build CLIP; a model that learns from stored features does without.

    Source: arXiv 2505.12499, direct form.
    """

    def __init__(self, config: ModelConfig, *, towers: bool = True) -> None:
        super().__init__()
        self.config = config
        width = config.clip.embed_dim
        self.towers: ClipTowers | NoTowers = ClipTowers(config.clip) if towers else NoTowers()
        self.temporal = (
            TemporalTransformer(
                width, config.temporal_layers, config.num_temporal_heads, config.clip.max_positions
            )
            if config.temporal == "transformer"
            else None
        )
        self.start_temporal()
        self.increment = (
            Increment(width, config.increment_heads, config.increment_dropout, config.increment_layers)
            if config.increment
            else None
        )
        self._said: set[str] = set()
        self.radius = (
            IncrementRadius(config.max_frames) if config.increment and config.query == "text" else None
        )
        self.adapters = Adapters(width) if config.adapters else None

    def start_temporal(self) -> str:
        """Starts the temporal transformer from the text tower, where there are both.

        Returns:
            As ``TemporalTransformer.start_from_text_tower``.
        """
        if self.temporal is None or not isinstance(self.towers, ClipTowers):
            return ""
        return self.temporal.start_from_text_tower(self.towers)

    def drop_towers(self) -> None:
        """Leaves of CLIP only the logit scale, for a model that learns from stored features."""
        self.towers = NoTowers(self.logit_scale)

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the scale κ, a scalar parameter."""
        return self.towers.logit_scale

    @property
    def released_padding(self) -> bool:
        """True if padded frames count as in the released code."""
        return self.config.padding == "released"

    @property
    def needs_words(self) -> bool:
        """Whether scores depend on ``TextFeatures.words``."""
        return self.increment is not None and self.config.context == "words"

    def encode_text(self, token_ids: Tensor, token_mask: Tensor) -> TextFeatures:
        """Encodes captions.

        Args:
            token_ids: (N, W) int64, from ``tokenize``.
            token_mask: (N, W) bool or 0/1, true for real tokens; the last of them is the end marker.

        Raises:
            DataError: for a caption without a token.
        """
        return self.text_from_towers(tower_text(self.towers, token_ids, token_mask))

    def encode_video(self, frames: Tensor, frame_mask: Tensor) -> VideoFeatures:
        """Encodes clips; padded frames never enter the image tower, or as grey where padding is released.

        Args:
            frames: (M, F, 3, H, W) float, CLIP-normalised.
            frame_mask: (M, F) bool or 0/1, true for real frames.

        Raises:
            DataError: for a clip without a frame, or with more than the model has positions or radii for;
                where padding is released, for any number but ``max_frames``.
        """
        self._check_clips(frame_mask)
        frames_MFD = tower_frames(self.towers, frames, frame_mask, grey=self.released_padding)
        return self.video_from_towers(frames_MFD, frame_mask)

    def text_from_towers(self, text: TextFeatures) -> TextFeatures:
        """What ``encode_text`` makes of the text tower's output, which a feature store keeps."""
        if self.adapters is None:
            return text
        words = None if text.words is None else self.adapters.text(text.words)
        return TextFeatures(self.adapters.text(text.embedding), words, text.mask)

    def video_from_towers(self, frames: Tensor, frame_mask: Tensor) -> VideoFeatures:
        """What ``encode_video`` makes of the image tower's output, which a feature store keeps.

        Args:
            frames: (M, F, D), zero at padded frames; where padding is released, a grey picture's features.
            frame_mask: (M, F) bool or 0/1, true for real frames.

        Raises:
            DataError: as ``encode_video``.
        """
        mask_MF = self._check_clips(frame_mask)
        frames_MFD = frames if self.adapters is None else self.adapters.video(frames)
        if self.temporal is not None:
            frames_MFD = self.temporal(frames_MFD, mask_MF, keep_padded=self.released_padding)
        return VideoFeatures(frames_MFD, mask_MF)

    def _check_clips(self, frame_mask: Tensor) -> Tensor:
        limit = self.config.max_frames
        if self.released_padding:
            return clip_mask(frame_mask, limit, exactly=True)
        if self.temporal is not None and self.radius is None:
            limit = self.temporal.positions.num_embeddings
        return clip_mask(frame_mask, limit)

    def prepare_video(self, video: VideoFeatures) -> PreparedVideo:
        """The part of the factorised scores that belongs to videos alone, to be kept for any number of texts.

        Where words are the context of ψ, or there is no ψ, this is little more than the frame features.

        Raises:
            ConfigError: for a ψ that has no factorised form.
        """
        if reason := self.why_direct:
            raise ConfigError(
                reason, where="model", accepted="one layer, dropout by context or none, padding masked"
            )
        owners = len(video.mask) if self.context_of == "video" else 0
        with torch.autocast(video.frames.device.type, enabled=False):
            frames_MFD = video.frames.to(torch.promote_types(video.frames.dtype, torch.float32))
            exact = VideoFeatures(frames_MFD, video.mask)
            return self.with_basis(exact, self.basis_maps(), self.draw_dropout(owners))

    def score(
        self,
        text: TextFeatures,
        video: VideoFeatures | PreparedVideo,
        method: Literal["auto", "direct", "factorized"] | None = None,
    ) -> Tensor:
        """Cosine scores (N, M) of all pairs, in blocks that keep to ``config.memory_mb``.

        Args:
            text: N encoded captions.
            video: M encoded clips, or what ``prepare_video`` made of them.
            method: auto takes the factorised form wherever it is exact; None: ``config.method``.

        Raises:
            ConfigError: for an unknown method, or the factorised form where there is none.
        """
        if self.takes_direct(method or self.config.method):
            features = video.features if isinstance(video, PreparedVideo) else video
            return stream_direct(self, text, features)
        return stream_factorized(self, text, video)

    def takes_direct(self, method: str) -> bool:
        """Whether a method means the direct form here; what auto cannot do factorised is said once.

        Raises:
            ConfigError: for an unknown method, or the factorised form where there is none.
        """
        if method not in ("auto", "direct", "factorized"):
            raise ConfigError(f"is {method!r}", where="method", accepted="auto, direct or factorized")
        reason = self.why_direct
        if method == "factorized" and reason:
            raise ConfigError(reason, where="method", accepted="auto or direct")
        if method == "auto" and reason and reason not in self._said:
            logger.warning("%s: the direct form is used", reason)
            self._said.add(reason)
        return method == "direct" or bool(reason)

    @property
    def why_direct(self) -> str:
        """Why only the direct form is exact for this model as it is now; empty where the factorised is."""
        if self.released_padding:
            return "padding released has no factorised form"
        if self.increment is None:
            return ""
        if len(self.increment.layers) > 1:
            return f"increment_layers {len(self.increment.layers)} has no factorised form"
        if self.training and self.config.increment_dropout and self.config.increment_dropout_per == "pair":
            return "dropout of each pair has no factorised form"
        return ""

    @property
    def context_of(self) -> Literal["video", "text", "none"]:
        """The side that ψ attends to, which owns the basis of the increments."""
        if self.increment is None:
            return "none"
        return "video" if self.config.context == "frames" else "text"

    @property
    def rule(self) -> Rule:
        """How numbers of a pair become its score."""
        config = self.config
        return Rule(config.corrected_side, config.pool_temperature, self.radius, pooling=config.pooling)

    @property
    def drops(self) -> bool:
        """Whether ψ's contexts have dropout now."""
        by_context = self.config.increment_dropout_per == "context"
        return (
            self.increment is not None and self.training and self.config.increment_dropout > 0 and by_context
        )

    def draw_dropout(self, owners: int, generator: torch.Generator | None = None) -> Tensor | None:
        """Dropout of ψ for each owner of a context, (owners, D) factors 0 or 1/(1 − p); None where none is.

        Args:
            owners: videos where frames are the context, texts where words are.
            generator: to draw from, on the CPU, so that a seed means the same on any device.
        """
        if not self.drops or self.increment is None:
            return None
        drop = self.config.increment_dropout
        draws = torch.rand(owners, self.config.clip.embed_dim, generator=generator)
        weight = self.increment.mean.weight
        return ((draws >= drop).to(weight.dtype) / (1 - drop)).to(weight.device)

    def basis_maps(self) -> BasisMaps | None:
        """ψ's linear maps combined, to be made once for a step or a stream of blocks."""
        return None if self.increment is None else BasisMaps.of(self.increment, drops=self.drops)

    def asking(self, embedding_XD: Tensor) -> Embeddings:
        """Embeddings of the side that does not own the basis, as ψ is asked with them."""
        if self.increment is None:
            return Embeddings.of(embedding_XD)
        sign = 1 if self.radius is not None else self.config.gap_sign
        if self.radius is None and self.context_of == "video":
            sign = -sign  # the query is η(v̄ − t), and texts ask
        return Embeddings.of(embedding_XD, sign * turn(self.increment, embedding_XD))

    def with_basis(
        self, video: VideoFeatures, maps: BasisMaps | None, keep_MD: Tensor | None
    ) -> PreparedVideo:
        """Videos with the basis that their frames make, where frames are the context.

        Args:
            video: frame features, zero at padding.
            maps: from ``basis_maps``.
            keep_MD: dropout of each video, or None.
        """
        if self.config.pooling == "mean":
            # One unit vector is left of a clip, as if it had a single frame.
            unit_M1D = functional.normalize(unit_mean(video)).unsqueeze(1)
            one = VideoFeatures(unit_M1D, torch.ones_like(video.mask[:, :1]))
            return replace(PreparedVideo.of(one, None), mean=video.mean)
        if self.increment is None or maps is None:
            return PreparedVideo.of(video, None)
        if self.context_of == "text":
            return PreparedVideo.of(video, None, self.asking(video.mean))
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
        )
        return PreparedVideo.of(video, basis)

    def prepare_text(self, text: TextFeatures, maps: BasisMaps, keep_ND: Tensor | None) -> PreparedText:
        """Texts with the basis that their words make, where words are the context.

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

    def pairs(self, text: TextFeatures, video: VideoFeatures, keep_OD: Tensor | None = None) -> Pairs:
        """Scores and increments of all pairs in the direct form, memory N·M·D.

        s_ij = cos(t_i + Δ_ij, p_ij), or cos(t_i, p_ij + Δ_ij) where the video is the corrected side.

        Args:
            text: N encoded captions.
            video: M encoded clips.
            keep_OD: from ``draw_dropout``; None: dropout of each pair, in training.

        Raises:
            ConfigError: for text features without words where they are the context of ψ.
        """
        return direct_pairs(self, text, video, keep_OD)

    def pooled(self, text: TextFeatures, video: VideoFeatures) -> Tensor:
        """Text-conditioned pooling p_ij (N, M, D) of all pairs."""
        return pool(
            text.embedding, video, self.config.pool_temperature, released_padding=self.released_padding
        )

    def deltas(
        self, text: TextFeatures, video: VideoFeatures, keep_OD: Tensor | None = None
    ) -> Tensor | None:
        """The increments Δ_ij (N, M, D) of all pairs, or None for the baseline.

        Query gap: Δ_ij = ψ(η(v̄_j − t_i)). Query text: t*_ij = ψ(t_i), Δ_ij = R_ij·unit(v̄_j − t*_ij).
        ψ attends to the frames of video j, or to the words of text i. Where padding is released, padded
        frames count in v̄_j and are attended to; in R_ij they count 0 always.

        Raises:
            ConfigError: for text features without words where they are the context of ψ.
        """
        return direct_deltas(self, text, video, keep_OD)
