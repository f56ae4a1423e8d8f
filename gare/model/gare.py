"""The GARE model: encodes captions and clips, and scores every pair.

N texts, M videos, F frames, W words, D embedding width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from gare.config import ModelConfig
from gare.model.encoders.adapters import Adapters
from gare.model.encoders.clip import ClipTowers, NoTowers, tower_frames, tower_text
from gare.model.encoders.temporal import TemporalTransformer
from gare.model.factorized.prepared import PreparedVideo
from gare.model.features import TextFeatures, VideoFeatures, clip_mask
from gare.model.increment import Increment, IncrementRadius
from gare.model.scorer import PairScorer
from gare.model.streaming import stream_scores


class GARE(nn.Module):
    """The model: CLIP towers, temporal transformer and ψ, and the scorer of their features.

    Args:
        config: sizes and switches; ``increment: false`` is the baseline s_ij = cos(t_i, p_ij).
        towers: whether to build CLIP; a model that learns from stored features needs none.

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
        self.radius = (
            IncrementRadius(config.max_frames) if config.increment and config.query == "text" else None
        )
        self.adapters = Adapters(width) if config.adapters else None
        # Not a module: ψ and its radius would be in the state dict twice.
        self.scorer = PairScorer(config, self.increment, self.radius)

    def start_temporal(self) -> str:
        """Starts the temporal transformer from the text tower, if the model has both.

        Returns:
            As ``TemporalTransformer.start_from_text_tower``.
        """
        if self.temporal is None or not isinstance(self.towers, ClipTowers):
            return ""
        return self.temporal.start_from_text_tower(self.towers)

    def take_compute_settings(self, config: ModelConfig) -> None:
        """Takes over the settings of how pairs are computed: method, kernel, products and memory.

        Args:
            config: of another run or machine; its other settings are ignored.
        """
        self.config = self.scorer.config = self.config.computed_as(config)

    def drop_towers(self, *, imported: bool = False) -> None:
        """Removes CLIP except for the logit scale, for a model that learns from stored features.

        Args:
            imported: whether the features are imported, so that there are no towers at all.
        """
        self.towers = NoTowers(self.logit_scale, imported=imported)

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the scale κ, a scalar parameter."""
        return self.towers.logit_scale

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
        """Encodes clips; padded frames never enter the image tower, or as grey ones if padding is released.

        Args:
            frames: (M, F, 3, H, W) float, CLIP-normalised.
            frame_mask: (M, F) bool or 0/1, true for real frames.

        Raises:
            DataError: for a clip without a frame, or with more frames than the model has positions or radii
                for; if padding is released, for any number of frames other than ``max_frames``.
        """
        self._check_clips(frame_mask)
        frames_MFD = tower_frames(self.towers, frames, frame_mask, grey=self.scorer.released_padding)
        return self.video_from_towers(frames_MFD, frame_mask)

    def text_from_towers(self, text: TextFeatures) -> TextFeatures:
        """Encodes texts from the text tower's output, which a feature store keeps."""
        if self.adapters is None:
            return text
        words = None if text.words is None else self.adapters.text(text.words)
        return TextFeatures(self.adapters.text(text.embedding), words, text.mask)

    def video_from_towers(self, frames: Tensor, frame_mask: Tensor) -> VideoFeatures:
        """Encodes videos from the image tower's output, which a feature store keeps.

        Args:
            frames: (M, F, D), zero at padded frames; where padding is released, a grey picture's features.
            frame_mask: (M, F) bool or 0/1, true for real frames.

        Raises:
            DataError: as ``encode_video``.
        """
        mask_MF = self._check_clips(frame_mask)
        frames_MFD = frames if self.adapters is None else self.adapters.video(frames)
        if self.temporal is not None:
            frames_MFD = self.temporal(frames_MFD, mask_MF, keep_padded=self.scorer.released_padding)
        return VideoFeatures(frames_MFD, mask_MF)

    def _check_clips(self, frame_mask: Tensor) -> Tensor:
        limit = self.config.max_frames
        if self.scorer.released_padding:
            return clip_mask(frame_mask, limit, exactly=True)
        if self.temporal is not None and self.radius is None:
            limit = self.temporal.positions.num_embeddings
        return clip_mask(frame_mask, limit)

    def prepare_video(self, video: VideoFeatures, *, lean: bool = False) -> PreparedVideo:
        """Prepares videos for any number of texts; see ``PairScorer.prepare_video``.

        Args:
            video: M encoded clips.
            lean: whether to keep only a third of the numbers, for large galleries and queries of a few texts.

        Raises:
            ConfigError: for a ψ that has no factorised form, or for lean videos with dropout.
        """
        return self.scorer.prepare_video(video, lean=lean)

    def score(
        self,
        text: TextFeatures,
        video: VideoFeatures | PreparedVideo,
        method: Literal["auto", "direct", "factorized"] | None = None,
    ) -> Tensor:
        """Scores all pairs, (N, M) cosines; see ``stream_scores``.

        Args:
            text: N encoded captions.
            video: M encoded clips, or the result of ``prepare_video``.
            method: auto takes the factorised form wherever it is exact; None means ``config.method``.

        Raises:
            ConfigError: for an unknown method, or factorized for a model that has no factorised form.
        """
        return stream_scores(self.scorer, text, video, method)
