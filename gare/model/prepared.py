"""What either side of the pairs brings to the factorised form, computed once and kept.

N texts, M videos, F frames, X embeddings, H heads, L basis vectors, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import Tensor

from gare.model.basis import Basis, centred
from gare.model.features import VideoFeatures


@dataclass(frozen=True)
class Embeddings:
    """Vectors of the side that owns no basis, with what its queries need of them.

    Attributes:
        vectors: (X, D).
        mean: (X,) over D.
        centred_square: (X,) squared length without the mean.
        square: (X,) squared length.
        turned: (H, X, D) what ``turn`` makes of them, with the sign that they have in the query; None where
            no one asks.
    """

    vectors: Tensor
    mean: Tensor
    centred_square: Tensor
    square: Tensor
    turned: Tensor | None

    @classmethod
    def of(cls, vectors_XD: Tensor, turned_HXD: Tensor | None = None) -> Embeddings:
        """With their statistics."""
        return cls(
            vectors_XD,
            vectors_XD.mean(dim=1),
            centred(vectors_XD).square().sum(dim=1),
            vectors_XD.square().sum(dim=1),
            turned_HXD,
        )

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: slice | Tensor) -> Embeddings:
        turned = None if self.turned is None else self.turned[:, rows]
        return Embeddings(
            self.vectors[rows], self.mean[rows], self.centred_square[rows], self.square[rows], turned
        )

    def split(self, size: int) -> Iterator[Embeddings]:
        """Consecutive parts of ``size`` vectors, whose gradients are joined once and not added up."""
        turned: Iterable[Tensor | None] = repeat(None, -(-len(self) // size))
        if self.turned is not None:
            turned = torch.split(self.turned, size, dim=1)
        tensors = (self.vectors, self.mean, self.centred_square, self.square)
        parts = zip(*(torch.split(tensor, size) for tensor in tensors), turned, strict=True)
        return (Embeddings(*part) for part in parts)


@dataclass(frozen=True)
class PreparedVideo:
    """The part of the score that belongs to videos alone.

    Attributes:
        features: frame features, zero at padding.
        mean: (M, D) v̄.
        share: (M, F), 1 over the number of real frames, 0 for padding.
        bias: (M, F), 0 for real frames and −inf for padding.
        rows: (M, F + L, D), what texts are multiplied with: frame features and basis vectors; the frame
            features alone where videos own no basis.
        by_frames: (M, F + L, F), products of the rows with the frame features; None where words are the
            context.
        basis: of the increments, or None for the baseline and where words are the context.
        asking: v̄ as the side that asks, where words are the context, or None.
    """

    features: VideoFeatures
    mean: Tensor
    share: Tensor
    bias: Tensor
    rows: Tensor
    by_frames: Tensor | None
    basis: Basis | None
    asking: Embeddings | None

    @classmethod
    def of(cls, video: VideoFeatures, basis: Basis | None, asking: Embeddings | None = None) -> PreparedVideo:
        """Videos and, where they own it, their basis, laid out for products with texts."""
        frames_MFD, mask_MF = video.frames, video.mask
        bias_MF = torch.zeros_like(frames_MFD[..., 0]).masked_fill(~mask_MF, -torch.inf)
        share_MF = mask_MF / mask_MF.sum(dim=1, keepdim=True).to(frames_MFD.dtype)
        rows = frames_MFD
        if basis is not None:
            rows = torch.cat([frames_MFD, basis.vectors], dim=1)
            # Views, so that nothing is held twice.
            frames_MFD, vectors_MLD = torch.split(rows, [frames_MFD.shape[1], basis.vectors.shape[1]], dim=1)
            basis = replace(basis, vectors=vectors_MLD)
        by_frames = None if asking is not None else rows @ frames_MFD.transpose(1, 2)
        features = VideoFeatures(frames_MFD, mask_MF)
        return cls(features, video.mean, share_MF, bias_MF, rows, by_frames, basis, asking)

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def dtype(self) -> torch.dtype:
        """The kind of all numbers."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """The device that they are on."""
        return self.rows.device

    def __getitem__(self, videos: slice | Tensor) -> PreparedVideo:
        return PreparedVideo(
            *(None if value is None else value[videos] for value in vars(self).values())  # type: ignore[arg-type]
        )

    def split(self, size: int) -> Iterator[PreparedVideo]:
        """Consecutive parts of ``size`` videos, whose gradients are joined once and not added up."""
        count = -(-len(self) // size)
        parts = (repeat(None, count) if value is None else value.split(size) for value in vars(self).values())
        return (PreparedVideo(*part) for part in zip(*parts, strict=True))


@dataclass(frozen=True)
class PreparedText:
    """Texts whose words are the context of ψ.

    Attributes:
        embeddings: of the texts.
        basis: that their words make.
        products: (N, L), products of the texts with their basis vectors.
    """

    embeddings: Embeddings
    basis: Basis
    products: Tensor

    def __len__(self) -> int:
        return len(self.products)

    @property
    def dtype(self) -> torch.dtype:
        """The kind of all numbers."""
        return self.products.dtype

    @property
    def device(self) -> torch.device:
        """The device that they are on."""
        return self.products.device

    def __getitem__(self, texts: slice | Tensor) -> PreparedText:
        return PreparedText(self.embeddings[texts], self.basis[texts], self.products[texts])

    def split(self, size: int) -> Iterator[PreparedText]:
        """Consecutive parts of ``size`` texts, whose gradients are joined once and not added up."""
        parts = zip(*(value.split(size) for value in vars(self).values()), strict=True)
        return (PreparedText(*part) for part in parts)
