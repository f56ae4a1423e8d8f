"""The pair score by fused kernels: as exact as the plain form, with only products of a pair in memory.

M videos, N texts, S sampled texts, F frames, H heads, K = H·F attention weights, L basis vectors, R = F + L
rows of products, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gare.model.factorized.basis import Basis
from gare.model.factorized.pair_products import video_products
from gare.model.factorized.pairs import COSINE_EPS, ScoringRule
from gare.model.factorized.prepared import Embeddings, PreparedVideo
from gare.model.factorized.quadratic_forms import NORM_EPS, SHORTEST
from gare.model.fused import tile_sizes
from gare.model.fused.tile_sizes import on_device_of, tile_rows
from gare.model.products import product


class FusedPairs(NamedTuple):
    """Results of the kernel for M videos with N texts; None for those that were not requested.

    Attributes:
        scores: (M, N).
        norms: (M, N) lengths of the increments.
        plain: (M, N) scores without increments, without gradient.
        sampled: (M, L, S) coefficients of the sampled texts.
        mean: (M, L) of the coefficients over the texts.
        scatter: (M, L, L) of the coefficients about their mean.
    """

    scores: Tensor
    norms: Tensor | None
    plain: Tensor | None
    sampled: Tensor | None
    mean: Tensor | None
    scatter: Tensor | None


@dataclass(frozen=True)
class FusedRequest:
    """Request of the kernel's results besides the scores.

    Attributes:
        norms: whether to return the lengths of the increments.
        plain: whether to return scores without increments.
        sample: texts to return coefficients of: indices, ``all``, or None.
        moments: whether to return the moments of the coefficients over the texts.
        normalised: whether the moments are of increments scaled to length 1.
    """

    norms: bool = False
    plain: bool = False
    sample: Tensor | str | None = None
    moments: bool = False
    normalised: bool = False


def fused_pairs(
    rule: ScoringRule,
    texts: Embeddings,
    video: PreparedVideo,
    request: FusedRequest,
    *,
    precision: str = "exact",
) -> FusedPairs:
    """Computes the pairs of M videos, which own the basis, with N texts.

    Args:
        rule: of a model whose query is the gap.
        texts: N of them, one or more, turned; mapped if the videos are lean.
        video: M of them, one or more.
        request: the results wanted.
        precision: of the products: exact, tf32 or bf16.

    Source: docs/design/factorized.md, points 1 to 7; the kernels recompute in the backward what they need.
    """
    basis = video.basis
    assert basis is not None
    num_videos, num_frames, num_texts = len(video), video.mask.shape[1], len(texts)
    found_products = video_products(texts, video, partial(product, precision=precision))
    products, logits = found_products.whole, found_products.logits
    assert logits is not None
    slots, num_sampled = None, 0
    if isinstance(request.sample, Tensor):
        num_sampled = len(request.sample)
        slots = torch.full((num_texts,), -1, dtype=torch.int32, device=products.device)
        slots[request.sample] = torch.arange(num_sampled, dtype=torch.int32, device=products.device)
    elif request.sample:
        num_sampled = num_texts
        slots = torch.arange(num_texts, dtype=torch.int32, device=products.device)
    shape = _Shape(
        num_videos, num_texts, num_sampled, texts.vectors.shape[1], num_frames, basis.heads, rule, request
    )
    found = _Pairs.apply(  # type: ignore[no-untyped-call]
        products,
        logits.contiguous(),
        small_numbers(video, basis),
        texts.mean,
        texts.centred_square,
        texts.square,
        slots,
        shape,
    )
    return FusedPairs(*found)


def small_numbers(video: PreparedVideo, basis: Basis) -> Tensor:
    """Returns (M, …): all numbers of a video that its pairs share, in the order that the kernels expect."""
    parts = [basis.own_logits, basis.offset, basis.even, video.share, basis.own_mean, basis.own_square]
    parts += [basis.attended.at_base, basis.hidden.at_base]
    for length in (basis.attended, basis.hidden):
        parts += [length.gram, length.slope]
    assert video.by_frames is not None
    parts += [basis.gram, video.by_frames]
    num_videos = len(video)
    return torch.cat([part.reshape(num_videos, -1) for part in parts], dim=1)


@dataclass(frozen=True)
class _Shape:
    """Sizes and switches of one call, for which kernels are compiled and started."""

    num_videos: int
    num_texts: int
    num_sampled: int
    width: int
    num_frames: int
    heads: int
    rule: ScoringRule
    request: FusedRequest

    @property
    def num_vectors(self) -> int:
        """L, the number of basis vectors."""
        return self.heads * self.num_frames + 3

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """Returns the compile-time arguments of both kernels."""
        return constants_of(
            self.rule, self.request, self.width, self.num_frames, self.heads, dtype, self.num_sampled > 0
        )

    def texts_per_program(self, device: torch.device) -> int:
        """Returns the texts of a program, in whole blocks, that give all processors of the device work."""
        block = tile_sizes.tiles_of(self.heads * self.num_frames).texts
        blocks = -(-self.num_texts // block)
        programs = 1
        if device.type == "cuda":
            wanted = 8 * torch.cuda.get_device_properties(device).multi_processor_count
            programs = min(blocks, max(1, wanted // self.num_videos))
        return -(-blocks // programs) * block


def constants_of(
    rule: ScoringRule,
    request: FusedRequest,
    width: int,
    num_frames: int,
    heads: int,
    dtype: torch.dtype,
    has_sample: bool,
) -> dict[str, Any]:
    """Returns the compile-time arguments of both kernels."""
    weights = heads * num_frames
    tiles = tile_sizes.tiles_of(weights)
    double = dtype == torch.float64
    return {
        "WIDTH": width,
        "TEMPERATURE": rule.pool_temperature,
        "SIDE": rule.corrected_side,
        "F": num_frames,
        "H": heads,
        "LP": tile_rows(weights),
        "FP": tile_rows(num_frames),
        "BN": tiles.texts,
        "HAS_NORMS": request.norms,
        "HAS_SAMPLE": has_sample,
        "HAS_MOMENTS": request.moments,
        "NORMALISED": request.normalised,
        "PRECISION": "float64" if double else "ieee",
        "TERMS": 16 if double else 9,
        "NORM_EPS": NORM_EPS,
        "COSINE_EPS_SQUARE": COSINE_EPS**2,
        "TINY": torch.finfo(dtype).tiny,
        "SHORTEST": SHORTEST,
        "num_warps": tiles.warps,
    }


class _Pairs(torch.autograd.Function):
    """Both kernels as one operation."""

    @staticmethod
    def forward(
        ctx: Any,
        products: Tensor,
        logits: Tensor,
        small: Tensor,
        text_mean: Tensor,
        text_centred: Tensor,
        text_square: Tensor,
        slots: Tensor | None,
        shape: _Shape,
    ) -> tuple[Tensor | None, ...]:
        from gare.model.fused import kernels

        read = (products, logits, small, text_mean, text_centred, text_square, slots)
        request, videos, texts = shape.request, shape.num_videos, shape.num_texts
        scores = products.new_empty(videos, texts)
        norms = torch.empty_like(scores) if request.norms else None
        plain = torch.empty_like(scores) if request.plain else None
        vectors = shape.num_vectors
        sampled = products.new_empty(videos, vectors, shape.num_sampled) if slots is not None else None
        per_program = shape.texts_per_program(products.device)
        parts = -(-texts // per_program)
        part_mean = part_scatter = part_count = None
        if request.moments:
            part_mean = products.new_empty(parts, videos, vectors)
            part_scatter = products.new_empty(parts, videos, vectors, vectors)
            part_count = products.new_empty(parts, videos)
        with on_device_of(products):
            kernels.forward[(videos, parts)](
                *read,
                scores,
                norms,
                plain,
                sampled,
                part_mean,
                part_scatter,
                part_count,
                texts,
                shape.num_sampled,
                videos,
                per_program,
                HAS_PLAIN=request.plain,
                **shape.constants(products.dtype),
            )
        mean = scatter = None
        if part_mean is not None and part_scatter is not None and part_count is not None:
            mean, scatter = merge_moments(part_mean, part_scatter, part_count[:, 0])
        ctx.shape, ctx.per_program, ctx.parts = shape, per_program, parts
        ctx.save_for_backward(*read, mean)
        ctx.set_materialize_grads(False)
        if plain is not None:
            ctx.mark_non_differentiable(plain)
        return scores, norms, plain, sampled, mean, scatter

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_scores: Tensor | None,
        grad_norms: Tensor | None,
        grad_plain: Tensor | None,
        grad_sampled: Tensor | None,
        grad_mean: Tensor | None,
        grad_scatter: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        from gare.model.fused import kernels

        del grad_plain
        *read, mean = ctx.saved_tensors
        products, logits, small, text_mean, *_ = read
        shape: _Shape = ctx.shape
        videos, texts, vectors = shape.num_videos, shape.num_texts, shape.num_vectors
        if grad_scores is None:
            grad_scores = products.new_zeros(videos, texts)
        has_moments = grad_mean is not None or grad_scatter is not None
        if has_moments:
            grad_mean = products.new_zeros(videos, vectors) if grad_mean is None else grad_mean
            if grad_scatter is None:
                grad_scatter = products.new_zeros(videos, vectors, vectors)
        grads = (grad_scores, grad_norms, grad_sampled, grad_mean, grad_scatter)
        given = [None if grad is None else grad.contiguous() for grad in grads]
        constants = shape.constants(products.dtype)
        constants |= {
            "HAS_NORMS": grad_norms is not None,
            "HAS_SAMPLE": grad_sampled is not None,
            "HAS_MOMENTS": has_moments,
        }
        grad_products, grad_logits = torch.empty_like(products), torch.empty_like(logits)
        part_small = small.new_zeros(ctx.parts, *small.shape)
        grad_gap, grad_text = products.new_empty(videos, texts), products.new_empty(videos, texts)
        with on_device_of(products):
            kernels.backward[(videos, ctx.parts)](
                *read,
                mean,
                *given,
                grad_products,
                grad_logits,
                part_small,
                grad_gap,
                grad_text,
                texts,
                shape.num_sampled,
                videos,
                ctx.per_program,
                **constants,
            )
        grad_small = part_small.sum(dim=0)
        # ‖P gap‖² = own² + centred² − 2(⟨t, v̄⟩ − D·own mean·mean).
        scalars = 3 * shape.heads * shape.num_frames + shape.num_frames
        grad_small[:, scalars] = 2 * shape.width * (grad_gap @ text_mean)
        grad_small[:, scalars + 1] = grad_gap.sum(dim=1)
        grad_text_mean = 2 * shape.width * (small[:, scalars] @ grad_gap)
        return (
            grad_products,
            grad_logits,
            grad_small,
            grad_text_mean,
            grad_gap.sum(dim=0),
            grad_text.sum(dim=0),
            None,
            None,
        )


def merge_moments(mean: Tensor, scatter: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Merges the moments of parts into those of the whole sets, by Chan's formula.

    Args:
        mean: (P, M, L) of each part.
        scatter: (P, M, L, L) about the mean.
        count: (P,) members of each part.
    """
    if len(mean) == 1:
        return mean[0], scatter[0]
    share = (count / count.sum()).view(-1, 1, 1)
    # Relative to the first part: a plain mean of equal numbers may round to another number.
    whole = mean[0] + ((mean - mean[0]) * share).sum(dim=0)
    apart = ((mean - whole) * count.sqrt().view(-1, 1, 1)).transpose(0, 1)
    return whole, scatter.sum(dim=0) + apart.transpose(1, 2) @ apart
