"""The parts of the factorised score that depend on one side of the pairs, computed once and kept.

N texts, M videos, F frames, X embeddings, H heads, L basis vectors, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gare.model.factorized.basis import Basis, centred
from gare.model.factorized.lean_video import FrameScales, MappedText, lean_rows
from gare.model.features import VideoFeatures
from gare.tensor_group import ROWS_SECOND, TensorGroup


@dataclass(frozen=True, repr=False)
class Embeddings(TensorGroup):
    """Embeddings of the side that owns no basis, with the statistics that queries need.

    Attributes:
        vectors: (X, D).
        mean: (X,) over D.
        centred_square: (X,) squared length without the mean.
        square: (X,) squared length.
        turned: (H, X, D) ``queries_in_key_space`` of the vectors, with their sign in the query; None if they
            are not used as queries.
        mapped: queries of texts to lean videos, in place of ``turned``, or None.
    """

    vectors: Tensor
    mean: Tensor
    centred_square: Tensor
    square: Tensor
    turned: Tensor | None = field(metadata=ROWS_SECOND)
    mapped: MappedText | None = None

    @classmethod
    def of(
        cls, vectors_XD: Tensor, turned_HXD: Tensor | None = None, mapped: MappedText | None = None
    ) -> Embeddings:
        """Builds embeddings with their statistics."""
        return cls(
            vectors_XD,
            vectors_XD.mean(dim=1),
            centred(vectors_XD).square().sum(dim=1),
            vectors_XD.square().sum(dim=1),
            turned_HXD,
            mapped,
        )


@dataclass(frozen=True, repr=False)
class PreparedVideo(TensorGroup):
    """Videos with the part of the score that depends on them alone.

    Lean videos keep no basis vectors, only a third of the numbers, from which the same products follow (see
    ``pair_products``); they have no dropout.

    Attributes:
        mask: (M, F) bool, true for real frames.
        average: (M, D) v̄; None for lean videos, which compute it on request.
        share: (M, F), 1 over the number of real frames, 0 for padding.
        bias: (M, F), 0 for real frames and −inf for padding.
        rows: (M, F + L, D), vectors that texts are multiplied with: frame features, zero at padding, and
            basis vectors; only the frame features if videos own no basis; for lean videos the rows of
            ``lean_rows``, (M, F + 1, D).
        scales: LN1's means and scales, which turn the rows of lean videos into frame features; None for
            others.
        by_frames: (M, F + L, F), products of frame features and basis vectors with the frame features; None
            where words are the context.
        basis: of the increments, or None for the baseline and where words are the context.
        mean_queries: v̄ as queries, where words are the context, or None.
    """

    mask: Tensor
    average: Tensor | None
    share: Tensor
    bias: Tensor
    rows: Tensor
    scales: FrameScales | None
    by_frames: Tensor | None
    basis: Basis | None
    mean_queries: Embeddings | None

    @classmethod
    def of(
        cls, video: VideoFeatures, basis: Basis | None, mean_queries: Embeddings | None = None
    ) -> PreparedVideo:
        """Lays out videos and, if they own it, their basis for products with texts."""
        frames_MFD, mask_MF = video.frames, video.mask
        share_MF, bias_MF = _share(video), _bias(video)
        rows = frames_MFD
        if basis is not None:
            rows = torch.cat([frames_MFD, basis.vectors], dim=1)
            # Views, so that nothing is held twice.
            frames_MFD, vectors_MLD = torch.split(rows, [frames_MFD.shape[1], basis.vectors.shape[1]], dim=1)
            basis = replace(basis, spanning=vectors_MLD)
        by_frames = None if mean_queries is not None else rows @ frames_MFD.transpose(1, 2)
        return cls(mask_MF, video.mean, share_MF, bias_MF, rows, None, by_frames, basis, mean_queries)

    @classmethod
    def lean(cls, video: VideoFeatures, basis: Basis) -> PreparedVideo:
        """Builds lean videos, which keep the basis's small matrices but no vectors; only without dropout."""
        share_MF, by_frames = _share(video), video.frames.transpose(1, 2)
        rows, scales = lean_rows(video, share_MF)
        by_frames = torch.cat([video.frames @ by_frames, basis.vectors @ by_frames], dim=1)
        basis = replace(basis, context=None, spanning=None)
        return cls(video.mask, None, share_MF, _bias(video), rows, scales, by_frames, basis, None)

    @property
    def features(self) -> VideoFeatures:
        """Frame features, zero at padding; those of lean videos are computed on request."""
        if self.scales is not None:
            return VideoFeatures(self.scales.frames(self.rows), self.mask)
        num_frames = self.mask.shape[1]
        frames_MFD = self.rows if self.rows.shape[1] == num_frames else self.rows[:, :num_frames]
        return VideoFeatures(frames_MFD, self.mask)

    @property
    def mean(self) -> Tensor:
        """(M, D) v̄."""
        return self.features.mean if self.average is None else self.average


def _share(video: VideoFeatures) -> Tensor:
    return video.mask / video.mask.sum(dim=1, keepdim=True).to(video.frames.dtype)


def _bias(video: VideoFeatures) -> Tensor:
    return torch.zeros_like(video.frames[..., 0]).masked_fill(~video.mask, -torch.inf)


@dataclass(frozen=True, repr=False)
class PreparedText(TensorGroup):
    """Texts whose words are the context of ψ.

    Attributes:
        embeddings: of the texts.
        basis: of their words.
        products: (N, L), products of the texts with their basis vectors.
    """

    embeddings: Embeddings
    basis: Basis
    products: Tensor
