"""Products of pairs, from which scores follow; only this module depends on the form of prepared videos.

N texts, M videos, F frames, H heads, K = H·F attention weights, L basis vectors, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gare.model.factorized.basis import Basis
from gare.model.factorized.prepared import Embeddings, PreparedVideo

#: Up to this many texts, lean videos are read once for all three products: reading them is the bottleneck.
FEW_TEXTS = 64


@dataclass(frozen=True)
class VideoProducts:
    """Products of M videos with N texts.

    Attributes:
        parts: (M, …, N) each, products with the frames and with the basis vectors: all in one tensor, or
            first those with the frames and then those with the basis vectors, in order.
        num_frames: F.
        logits: (M, F, H, N), attention logits before the query's LN1 scale; None without a basis.
    """

    parts: tuple[Tensor, ...]
    num_frames: int
    logits: Tensor | None

    @property
    def whole(self) -> Tensor:
        """All products in one tensor, (M, F + L, N)."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, dim=1)

    @property
    def with_frames(self) -> Tensor:
        """Products with the frames, (M, F, N)."""
        return torch.split(self.parts[0], self._sizes, dim=1)[0]

    @property
    def with_vectors(self) -> tuple[Tensor, ...]:
        """Products with the basis vectors, parts of (M, L, N); none without a basis."""
        if len(self.parts) > 1:
            return self.parts[1:]
        return torch.split(self.parts[0], self._sizes, dim=1)[1:]

    @property
    def _sizes(self) -> list[int]:
        vectors = self.parts[0].shape[1] - self.num_frames
        return [self.num_frames, vectors] if vectors else [self.num_frames]


def multiply_transposed(a_XD: Tensor, b_YD: Tensor) -> Tensor:
    """Computes A·Bᵀ (X, Y)."""
    return a_XD @ b_YD.T


def context_products(
    basis: Basis, others: Embeddings, multiply: Callable[[Tensor, Tensor], Tensor] = multiply_transposed
) -> Tensor:
    """Computes attention logits (O, C, H, X) of owners with others, before the query's LN1 scale."""
    assert basis.context is not None
    assert others.turned is not None
    num_owners, num_positions, _ = basis.context.shape
    products = multiply(basis.context.flatten(0, 1), others.turned.flatten(0, 1))
    return products.view(num_owners, num_positions, basis.heads, -1)


def video_products(
    texts: Embeddings,
    video: PreparedVideo,
    multiply: Callable[[Tensor, Tensor], Tensor] = multiply_transposed,
) -> VideoProducts:
    """Multiplies videos, in either prepared form, with texts.

    Args:
        texts: N of them, mapped if the videos are lean.
        video: M of them.
        multiply: computes A·Bᵀ.
    """
    if video.scales is not None:
        return _lean_products(texts, video, multiply)
    num_videos, num_rows, _ = video.rows.shape
    rows = multiply(video.rows.flatten(0, 1), texts.vectors).view(num_videos, num_rows, -1)
    logits = None if video.basis is None else context_products(video.basis, texts, multiply)
    return VideoProducts((rows,), video.mask.shape[1], logits)


def _lean_products(
    texts: Embeddings, video: PreparedVideo, multiply: Callable[[Tensor, Tensor], Tensor]
) -> VideoProducts:
    """Source: ⟨x, v_f⟩ = μ_f Σx + sd_f ⟨x, n_f⟩, and the order of vectors in ``build_basis``."""
    scales, basis, mapped = video.scales, video.basis, texts.mapped
    assert scales is not None
    assert basis is not None
    assert mapped is not None, "lean videos are asked with texts that are mapped"
    num_videos, num_rows, width = video.rows.shape
    num_texts, heads = len(texts), basis.heads
    rows, sides = video.rows.flatten(0, 1), [texts.vectors.unsqueeze(0), mapped.turned, mapped.along]
    shape = (num_videos, num_rows, -1, num_texts)
    if num_texts <= FEW_TEXTS:
        found = torch.split(
            multiply(rows, torch.cat(sides).flatten(0, 1)).view(shape), [1, heads, heads], dim=2
        )
    else:
        found = tuple(multiply(rows, side.flatten(0, 1)).view(shape) for side in sides)
    (own, mean_own), (logits, _), (along, mean_along) = (
        torch.split(one, [num_rows - 1, 1], dim=1) for one in found
    )
    sums = torch.stack([mean_own.flatten(1), (width * texts.mean).expand(num_videos, -1)], dim=1)
    with_mean = torch.stack([scales.scale, scales.mean], dim=2) @ sums
    with_frames = torch.addcmul(with_mean, own.squeeze(2), scales.scale.unsqueeze(2))
    # As build_basis does: even attention with LN2's mean scale, then with LN3's.
    first_N, base_N, even_N = mapped.constants.unbind(dim=1)
    first = mean_along.sum(dim=2).squeeze(1) + first_N
    base = torch.addcmul(base_N, basis.attended.at_base.rsqrt().unsqueeze(1), first)
    even = torch.addcmul(even_N, basis.hidden.at_base.rsqrt().unsqueeze(1), base)
    along = along.transpose(1, 2).flatten(1, 2)
    last = [first, base, even]
    if basis.aimed is not None:
        distance = (video.share.unsqueeze(1) @ with_frames).squeeze(1) - even
        along, last = -along, [-first, -base, distance]
        last.append(basis.aimed.at_base.rsqrt().unsqueeze(1) * distance)
    return VideoProducts((with_frames, along, torch.stack(last, dim=1)), num_rows - 1, logits)
