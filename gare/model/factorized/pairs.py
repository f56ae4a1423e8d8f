"""The exact pair score from a few numbers per pair, without building the increments.

Every Δ_ij is a combination w_ij of an owner's basis (see basis.py), so lengths and dot products of increments
are small sums and quadratic forms of w_ij. No N×M×D tensor is built, with one exception: where the words of a
text are the context, the basis and the pooled frames belong to different sides, and the products of Δ_ij with
p_ij need both vectors. Blocks of pairs are small there.

N texts, M videos, F frames, O owners, X others (owners are videos and others texts, or the reverse),
K attention weights, L basis vectors, D embedding width. Owners come first and others last in memory, so that
small matrices multiply as one batched product and sums over K run along whole vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gare.model.factorized.basis import Basis
from gare.model.factorized.pair_products import context_products, video_products
from gare.model.factorized.prepared import Embeddings, PreparedText, PreparedVideo
from gare.model.factorized.quadratic_forms import NORM_EPS, SHORTEST, quadratic_form
from gare.model.increment import IncrementRadius

#: Lengths below this count as this, as in PyTorch's cosine_similarity.
COSINE_EPS = 1e-8


@dataclass(frozen=True)
class PairNumbers:
    """Numbers of a block of pairs, (O, X) each unless stated otherwise.

    Attributes:
        scores: s_ij.
        text_pooled: ⟨t_i, p_ij⟩.
        pooled_square: ‖p_ij‖².
        norms: ‖Δ_ij‖, or None for the baseline.
        text_delta: ⟨t_i, Δ_ij⟩, or None for the baseline.
        delta_pooled: ⟨Δ_ij, p_ij⟩, or None for the baseline.
        weights: (O, L, X) w_ij, or None for the baseline.
        pooling: (O, F, X) or, where texts are the owners, (X, F, O): the weights of the pooling.
    """

    scores: Tensor
    text_pooled: Tensor
    pooled_square: Tensor
    norms: Tensor | None
    text_delta: Tensor | None
    delta_pooled: Tensor | None
    weights: Tensor | None
    pooling: Tensor


def increment_coefficients(
    basis: Basis,
    logits_OCHX: Tensor,
    gap_dot_OX: Tensor | None,
    others: Embeddings,
    log_radius_OX: Tensor | None = None,
) -> Tensor:
    """Computes the coefficients w_ij (O, L, X) of the increments in their basis.

    Args:
        basis: of the owners.
        logits_OCHX: attention logits, before the query's LN1 scale and without the owners' part.
        gap_dot_OX: products of the owners' embeddings with the others', or None if the query does not contain
            the owner's embedding.
        others: the others' embeddings.
        log_radius_OX: log R_ij if ψ's query is the text itself.

    Source: docs/design/factorized.md, points 1 to 4.
    """
    width = others.vectors.shape[1]
    products_OKX = logits_OCHX.transpose(1, 2).flatten(1, 2)
    square_OX = others.centred_square
    if gap_dot_OX is not None:
        shared_OX = gap_dot_OX - width * basis.own_mean.unsqueeze(1) * others.mean
        square_OX = (basis.own_square.unsqueeze(1) + square_OX - 2 * shared_OX).clamp(min=0)
    scale_OX = (square_OX / width + NORM_EPS).rsqrt()
    logits_OKX = (products_OKX + basis.own_logits.unsqueeze(2)) * scale_OX.unsqueeze(-2)
    logits_OKX = logits_OKX + basis.offset.unsqueeze(2)
    uneven_OKX = _uneven(logits_OKX, basis)
    scale_O1X, change_O1X = basis.attended.scales(uneven_OKX)
    hidden = torch.cat([uneven_OKX * scale_O1X, change_O1X], dim=1)
    scale_O1X, change_O1X = basis.hidden.scales(hidden)
    weights = torch.cat([hidden * scale_O1X, change_O1X], dim=1)
    if basis.aimed is not None and log_radius_OX is not None:
        # Δ_ij = R_ij·unit(v̄_j − t*_ij), where the weights so far are those of t*_ij.
        scale_O1X, change_O1X = basis.aimed.scales(weights, SHORTEST**2)
        unit = torch.cat([weights * scale_O1X, change_O1X, torch.ones_like(change_O1X)], dim=1)
        return unit * log_radius_OX.unsqueeze(1).exp()
    return torch.cat([weights, torch.ones_like(change_O1X)], dim=1)


def _uneven(logits_OKX: Tensor, basis: Basis) -> Tensor:
    """Computes softmax over each head's positions minus even attention, exact also where they are close."""
    by_head = torch.unflatten(logits_OKX, 1, (basis.heads, -1))
    even = torch.unflatten(basis.even, 1, (basis.heads, -1)).unsqueeze(3)
    above = (by_head - by_head.detach().amax(dim=2, keepdim=True)).expm1()
    mean = (even * above).sum(dim=2, keepdim=True)
    return ((above - mean) * even / (1 + mean)).flatten(1, 2)


def pooling_weights(products: Tensor, bias: Tensor, temperature: float) -> Tensor:
    """Computes the softmax over frames, the last dimension but one, of ⟨t_i, v_jf⟩/τ_pool; padding gets 0."""
    return (products / temperature + bias).softmax(dim=-2)


def _root(square: Tensor, at_least: float) -> Tensor:
    return square.clamp(min=at_least**2).sqrt()


def corrected_cosine(
    side: str,
    text_square: Tensor,
    text_pooled: Tensor,
    pooled_square: Tensor,
    text_delta: Tensor | None,
    delta_pooled: Tensor | None,
    delta_square: Tensor | None,
) -> Tensor:
    """Computes cos(t + Δ, p), or cos(t, p + Δ) if the side is video, from products; within [−1, 1]."""
    if text_delta is not None and delta_pooled is not None and delta_square is not None:
        text_square, pooled_square = corrected_square(
            side, text_square, pooled_square, text_delta, delta_pooled, delta_square
        )
        text_pooled = text_pooled + (delta_pooled if side == "text" else text_delta)
    lengths = _root(text_square, COSINE_EPS) * _root(pooled_square, COSINE_EPS)
    return (text_pooled / lengths).clamp(-1, 1)


@dataclass(frozen=True)
class ScoringRule:
    """Parameters and switches that turn numbers of a pair into its score.

    Attributes:
        corrected_side: text or video.
        pool_temperature: τ_pool.
        radius: of increments that point from ψ's output to the video, else None.
        unit: whether such increments are taken with length 1 instead.
        pooling: text_conditioned or mean.
    """

    corrected_side: str
    pool_temperature: float
    radius: IncrementRadius | None
    unit: bool = False
    pooling: str = "text_conditioned"


def corrected_square(
    side: str,
    text_square: Tensor,
    pooled_square: Tensor,
    text_delta: Tensor,
    delta_pooled: Tensor,
    delta_square: Tensor,
) -> tuple[Tensor, Tensor]:
    """Computes ‖t + Δ‖² and ‖p‖², or ‖t‖² and ‖p + Δ‖² if the side is video."""
    if side == "text":
        return text_square + 2 * text_delta + delta_square, pooled_square
    return text_square, pooled_square + 2 * delta_pooled + delta_square


def video_pairs(rule: ScoringRule, texts: Embeddings, video: PreparedVideo) -> PairNumbers:
    """Computes pairs of M videos that own the basis, or of the baseline, with N texts: numbers (M, N).

    Source: docs/design/factorized.md, points 1 to 5 and 7.
    """
    assert video.by_frames is not None
    if rule.pooling == "mean":
        return mean_pairs(texts, video)
    products = video_products(texts, video)
    frame_products, num_frames = products.with_frames, products.num_frames
    pooling_MFN = pooling_weights(frame_products, video.bias.unsqueeze(2), rule.pool_temperature)
    text_pooled = (pooling_MFN * frame_products).sum(dim=1)
    frame_gram, delta_by_frames = torch.split(
        video.by_frames, [num_frames, video.by_frames.shape[1] - num_frames], dim=1
    )
    pooled_square = quadratic_form(frame_gram, pooling_MFN).clamp(min=0)
    if video.basis is None or products.logits is None:
        scores = corrected_cosine("text", texts.square, text_pooled, pooled_square, None, None, None)
        return PairNumbers(scores, text_pooled, pooled_square, None, None, None, None, pooling_MFN)
    if rule.radius is None:
        gap_dot = (video.share.unsqueeze(1) @ frame_products).squeeze(1)
        weights = increment_coefficients(video.basis, products.logits, gap_dot, texts)
    else:
        log_radius = rule.radius.log_from_products(frame_products, video.mask)
        if rule.unit:
            log_radius = torch.zeros_like(log_radius)
        weights = increment_coefficients(video.basis, products.logits, None, texts, log_radius)
    text_delta = _dot(weights, products.with_vectors)
    delta_square = quadratic_form(video.basis.gram, weights).clamp(min=0)
    delta_pooled = (weights * (delta_by_frames @ pooling_MFN)).sum(dim=1)
    scores = corrected_cosine(
        rule.corrected_side, texts.square, text_pooled, pooled_square, text_delta, delta_pooled, delta_square
    )
    norms = _length(delta_square)
    return PairNumbers(
        scores, text_pooled, pooled_square, norms, text_delta, delta_pooled, weights, pooling_MFN
    )


def _dot(weights_MLN: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    """Computes Σ_k w_k x_k (M, N) of numbers x that come in parts."""
    some = torch.split(weights_MLN, [part.shape[1] for part in parts], dim=1)
    first, *rest = ((one * part).sum(dim=1) for one, part in zip(some, parts, strict=True))
    return sum(rest, start=first)


def mean_pairs(texts: Embeddings, video: PreparedVideo) -> PairNumbers:
    """Computes pairs of M videos, each a single unit vector, with N texts: numbers (M, N), by one product."""
    text_pooled = video.rows.squeeze(1) @ texts.vectors.T
    scores = (text_pooled / _root(texts.square, COSINE_EPS)).clamp(-1, 1)
    ones = torch.ones_like(text_pooled[:1, :1]).expand_as(text_pooled)
    return PairNumbers(scores, text_pooled, ones, None, None, None, None, ones.unsqueeze(1))


def text_pairs(rule: ScoringRule, text: PreparedText, video: PreparedVideo) -> PairNumbers:
    """Computes pairs of N texts that own the basis with M videos: numbers (N, M), memory N·M·D.

    Source: docs/design/factorized.md, point 7.
    """
    basis, texts = text.basis, text.embeddings
    num_videos, num_frames, _ = video.rows.shape
    assert video.mean_queries is not None
    logits = context_products(basis, video.mean_queries)
    weights = increment_coefficients(basis, logits, texts.vectors @ video.mean.T, video.mean_queries)
    text_delta = (weights * text.products.unsqueeze(2)).sum(dim=1)
    delta_square = quadratic_form(basis.gram, weights).clamp(min=0)
    frame_products = (video.rows.flatten(0, 1) @ texts.vectors.T).view(num_videos, num_frames, -1)
    pooling_MFN = pooling_weights(frame_products, video.bias.unsqueeze(2), rule.pool_temperature)
    text_pooled = (pooling_MFN * frame_products).sum(dim=1).T
    pooled_MND = pooling_MFN.transpose(1, 2) @ video.features.frames
    pooled_square = torch.linalg.vector_norm(pooled_MND, dim=2).square().T
    # ⟨Δ_ij, p_ij⟩ from p_ij and the basis: the increment itself would be one more vector per pair.
    delta_pooled = (weights * (basis.vectors @ pooled_MND.permute(1, 2, 0))).sum(dim=1)
    scores = corrected_cosine(
        rule.corrected_side,
        texts.square.unsqueeze(1),
        text_pooled,
        pooled_square,
        text_delta,
        delta_pooled,
        delta_square,
    )
    norms = _length(delta_square)
    return PairNumbers(
        scores, text_pooled, pooled_square, norms, text_delta, delta_pooled, weights, pooling_MFN
    )


def _length(square: Tensor) -> Tensor:
    return _root(square, math.sqrt(torch.finfo(square.dtype).tiny))


def pair_numbers(
    rule: ScoringRule, owners: PreparedVideo | PreparedText, others: Embeddings | PreparedVideo
) -> PairNumbers:
    """Computes pairs of owners with others, (O, X): videos with texts, or basis-owning texts with videos."""
    if isinstance(owners, PreparedText):
        assert isinstance(others, PreparedVideo)
        return text_pairs(rule, owners, others)
    assert isinstance(others, Embeddings)
    return video_pairs(rule, others, owners)
