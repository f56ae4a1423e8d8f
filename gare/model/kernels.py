"""Triton kernels for the arithmetic between the products of a pair and its score, forward and backward.

They compute what ``gare.model.factorized.video_pairs`` computes where frames are the context and ψ is asked
with the gap: of each pair some forty numbers are read, one or two are written, and nothing else of it is ever
in memory. The plain form is the definition, and tests hold these to it. ``gare.model.fused`` calls them.

A program has one video and a share of the texts, of which it takes BN at a time.

M videos, N texts, S sampled texts, F frames, H heads, K = H·F attention weights, L = K + 3 basis vectors,
R = F + L rows of products, D embedding width; LP and FP are L and F as powers of two, 16 at least.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gare.model import tiles


@triton.jit
def forward(
    # Read.
    products, asked, small, text_mean, text_centred, text_square, slots,
    # Written; those that are not wanted are never touched.
    scores, norms, plain, sampled, part_mean, part_scatter, part_count,
    N, S, num_videos, texts_per_program,
    WIDTH: tl.constexpr, TEMPERATURE: tl.constexpr, SIDE: tl.constexpr,
    F: tl.constexpr, H: tl.constexpr, LP: tl.constexpr, FP: tl.constexpr, BN: tl.constexpr,
    HAS_NORMS: tl.constexpr, HAS_PLAIN: tl.constexpr, HAS_SAMPLE: tl.constexpr,
    HAS_MOMENTS: tl.constexpr, NORMALISED: tl.constexpr,
    PRECISION: tl.constexpr, TERMS: tl.constexpr, NORM_EPS: tl.constexpr, COSINE_EPS_SQUARE: tl.constexpr,
    TINY: tl.constexpr, SHORTEST: tl.constexpr,
):  # fmt: skip
    """Scores, lengths and moments of one video with a share of the texts; see ``fused.fused_pairs``."""
    K: tl.constexpr = H * F
    L: tl.constexpr = K + 3
    video, share_of_texts = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, LP)[:, None]
    own, offset, even, share, scalars, numbers2, numbers3, gram, frame_gram, by_frames = tiles.load_video(
        small, video, F, H, LP, FP
    )
    mean = tl.zeros([LP, 1], dtype=gram.dtype)
    scatter = tl.zeros([LP, LP], dtype=gram.dtype)
    first = share_of_texts * texts_per_program
    last = tl.minimum(first + texts_per_program, N)
    count = tl.zeros([1, 1], dtype=gram.dtype)
    for start in range(first, last, BN):
        texts = start + tl.arange(0, BN)
        inside = texts < last
        (
            frame_products, delta_products, logits, scale1, gap_square, uneven, change2, scale2, towards2,
            hidden, change3, scale3, towards3, weights, pooling, text_pooled, frames_pooled, pooled_square,
            gram_weights, delta_square, basis_pooled, square, text_length, video_length, dot,
        ) = tiles.compute_pairs(
            products, asked, text_mean, text_centred, text_square, video, texts, inside, N,
            own, offset, even, share, scalars, numbers2, numbers3, gram, frame_gram, by_frames,
            WIDTH, TEMPERATURE, SIDE, F, H, LP, FP, PRECISION, TERMS, NORM_EPS,
        )  # fmt: skip
        score = dot / (
            tiles.root(text_length, COSINE_EPS_SQUARE) * tiles.root(video_length, COSINE_EPS_SQUARE)
        )
        places = video.to(tl.int64) * N + texts[None, :]
        tl.store(scores + places, tl.minimum(tl.maximum(score, -1.0), 1.0), mask=inside[None, :])
        norm = tiles.root(delta_square, TINY)
        if HAS_NORMS:
            tl.store(norms + places, norm, mask=inside[None, :])
        if HAS_PLAIN:
            length = tl.maximum(tl.sqrt(square * tl.maximum(pooled_square, 0.0)), SHORTEST)
            tl.store(plain + places, text_pooled / length, mask=inside[None, :])
        if HAS_SAMPLE:
            slot = tl.load(slots + texts, mask=inside, other=-1)[None, :]
            places = (video * L + rows).to(tl.int64) * S + slot
            tl.store(sampled + places, weights, mask=(rows < L) & (slot >= 0))
        if HAS_MOMENTS:
            if NORMALISED:
                weights = weights / tl.maximum(norm, SHORTEST)
            # Chan's merge of this block's moments with those before it.
            weights = tl.where(inside[None, :], weights, 0.0)
            here = tl.minimum(last - start, BN).to(gram.dtype)
            # About the first text: of equal increments no rounding must be left, whose σ has a huge gradient.
            origin = tl.sum(tl.where(texts[None, :] == start, weights, 0.0), axis=1)[:, None]
            apart = tl.where(inside[None, :], weights - origin, 0.0)
            shift = tl.sum(apart, axis=1)[:, None] / here
            mean_here = origin + shift
            apart = tl.where(inside[None, :], apart - shift, 0.0)
            step = mean_here - mean
            both = count + here
            scatter += tiles.multiply(apart, tl.trans(apart), PRECISION)
            scatter += step * tl.trans(step) * (count * here / both)
            mean += step * (here / both)
            count = both
    if HAS_MOMENTS:
        place = (share_of_texts * num_videos + video).to(tl.int64)
        tiles.store_column(part_mean + place * L, mean, L, LP)
        tiles.store_matrix(part_scatter + place * L * L, scatter, L, L, LP, LP)
        tiles.store_column(part_count + place, count, 1, 1)


@triton.jit
def backward(
    products, asked, small, text_mean, text_centred, text_square, slots,
    moments_mean,
    grad_scores, grad_norms, grad_sampled, grad_mean, grad_scatter,
    # Written.
    grad_products, grad_asked, part_small, grad_gap, grad_text,
    N, S, num_videos, texts_per_program,
    WIDTH: tl.constexpr, TEMPERATURE: tl.constexpr, SIDE: tl.constexpr,
    F: tl.constexpr, H: tl.constexpr, LP: tl.constexpr, FP: tl.constexpr, BN: tl.constexpr,
    HAS_NORMS: tl.constexpr, HAS_SAMPLE: tl.constexpr, HAS_MOMENTS: tl.constexpr, NORMALISED: tl.constexpr,
    PRECISION: tl.constexpr, TERMS: tl.constexpr, NORM_EPS: tl.constexpr, COSINE_EPS_SQUARE: tl.constexpr,
    TINY: tl.constexpr, SHORTEST: tl.constexpr,
):  # fmt: skip
    """Gradients of what ``forward`` reads: of products by pair, of a video's numbers by share of the texts.

    Those of the texts' scalars follow from ``grad_gap``, of the gap's squared length, and ``grad_text``, of
    the text's, which are (M, N).
    """
    K: tl.constexpr = H * F
    L: tl.constexpr = K + 3
    video, share_of_texts = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, LP)[:, None]
    own, offset, even, share, scalars, numbers2, numbers3, gram, frame_gram, by_frames = tiles.load_video(
        small, video, F, H, LP, FP
    )
    base2, base3 = tl.load(scalars + 2), tl.load(scalars + 3)
    grad_own, grad_offset = tl.zeros([LP, 1], dtype=gram.dtype), tl.zeros([LP, 1], dtype=gram.dtype)
    grad_gram2, grad_slope2 = tl.zeros([LP, LP], dtype=gram.dtype), tl.zeros([LP, 1], dtype=gram.dtype)
    grad_gram3, grad_slope3 = tl.zeros([LP, LP], dtype=gram.dtype), tl.zeros([LP, 1], dtype=gram.dtype)
    grad_gram = tl.zeros([LP, LP], dtype=gram.dtype)
    grad_frame_gram = tl.zeros([FP, FP], dtype=gram.dtype)
    grad_by_frames = tl.zeros([LP, FP], dtype=gram.dtype)
    grad_base2, grad_base3 = tl.zeros([1, 1], dtype=gram.dtype), tl.zeros([1, 1], dtype=gram.dtype)
    if HAS_MOMENTS:
        centre = tiles.load_column(moments_mean + video * L, L, LP)
        along = tiles.load_column(grad_mean + video * L, L, LP) / N
        # Scatter is symmetric, its gradient need not be.
        spread = tiles.load_matrix(grad_scatter + video.to(tl.int64) * L * L, L, L, LP, LP)
        spread += tl.trans(spread)
    first = share_of_texts * texts_per_program
    last = tl.minimum(first + texts_per_program, N)
    for start in range(first, last, BN):
        texts = start + tl.arange(0, BN)
        inside = texts < last
        (
            frame_products, delta_products, logits, scale1, gap_square, uneven, change2, scale2, towards2,
            hidden, change3, scale3, towards3, weights, pooling, text_pooled, frames_pooled, pooled_square,
            gram_weights, delta_square, basis_pooled, square, text_length, video_length, dot,
        ) = tiles.compute_pairs(
            products, asked, text_mean, text_centred, text_square, video, texts, inside, N,
            own, offset, even, share, scalars, numbers2, numbers3, gram, frame_gram, by_frames,
            WIDTH, TEMPERATURE, SIDE, F, H, LP, FP, PRECISION, TERMS, NORM_EPS,
        )  # fmt: skip
        inverse = 1 / (
            tiles.root(text_length, COSINE_EPS_SQUARE) * tiles.root(video_length, COSINE_EPS_SQUARE)
        )
        score = dot * inverse
        places = video.to(tl.int64) * N + texts[None, :]
        grad_score = tl.load(grad_scores + places, mask=inside[None, :], other=0.0)
        grad_score = tl.where((score >= -1.0) & (score <= 1.0), grad_score, 0.0)
        grad_dot = grad_score * inverse
        grad_text_length = tl.where(
            text_length >= COSINE_EPS_SQUARE,
            -0.5 * grad_score * score / tl.maximum(text_length, COSINE_EPS_SQUARE),
            0.0,
        )
        grad_video_length = tl.where(
            video_length >= COSINE_EPS_SQUARE,
            -0.5 * grad_score * score / tl.maximum(video_length, COSINE_EPS_SQUARE),
            0.0,
        )
        if SIDE == "text":
            grad_text_delta, grad_delta_pooled = 2 * grad_text_length, grad_dot
            grad_delta_square = grad_text_length
        else:
            grad_text_delta, grad_delta_pooled = grad_dot, 2 * grad_video_length
            grad_delta_square = grad_video_length
        grad_weights = tl.zeros_like(weights)
        norm = tiles.root(delta_square, TINY)
        grad_norm = tl.zeros_like(norm)
        if HAS_NORMS:
            grad_norm += tl.load(grad_norms + places, mask=inside[None, :], other=0.0)
        if HAS_SAMPLE:
            slot = tl.load(slots + texts, mask=inside, other=-1)[None, :]
            at = (video * L + rows).to(tl.int64) * S + slot
            grad_weights += tl.load(grad_sampled + at, mask=(rows < L) & (slot >= 0), other=0.0)
        if HAS_MOMENTS:
            if NORMALISED:
                length = tl.maximum(norm, SHORTEST)
                seen = tl.where(inside[None, :], weights / length - centre, 0.0)
                grad_seen = tl.where(inside[None, :], along + tiles.multiply(spread, seen, PRECISION), 0.0)
                grad_weights += grad_seen / length
                shortened = tiles.sum_of_rows(grad_seen * weights) / (length * length)
                grad_norm -= tl.where(norm >= SHORTEST, shortened, 0.0)
            else:
                seen = tl.where(inside[None, :], weights - centre, 0.0)
                grad_weights += tl.where(
                    inside[None, :], along + tiles.multiply(spread, seen, PRECISION), 0.0
                )
        grad_delta_square += tl.where(delta_square >= TINY, 0.5 * grad_norm / norm, 0.0)
        grad_delta_square = tl.where(delta_square >= 0, grad_delta_square, 0.0)
        grad_pooled_square = tl.where(pooled_square >= 0, grad_video_length, 0.0)
        # Quadratic forms and products of coefficients and pooling weights.
        grad_weights += grad_text_delta * delta_products + grad_delta_pooled * basis_pooled
        grad_weights += 2 * grad_delta_square * gram_weights
        grad_pooling = grad_dot * frame_products + 2 * grad_pooled_square * frames_pooled
        grad_pooling += grad_delta_pooled * tiles.multiply(tl.trans(by_frames), weights, PRECISION)
        grad_gram += tiles.multiply(grad_delta_square * weights, tl.trans(weights), PRECISION)
        grad_by_frames += tiles.multiply(grad_delta_pooled * weights, tl.trans(pooling), PRECISION)
        grad_frame_gram += tiles.multiply(grad_pooled_square * pooling, tl.trans(pooling), PRECISION)
        # LN3.
        hidden_rows = rows <= K
        grad_hidden = tl.where(hidden_rows, grad_weights * scale3, 0.0)
        grad_scale = tiles.sum_of_rows(tl.where(hidden_rows, grad_weights * hidden, 0.0))
        grad_change, grad_base = tiles.norm_scales_backward(
            change3, base3, grad_scale, tiles.row_of(grad_weights, K + 1, LP), NORM_EPS
        )
        grad_hidden += 2 * grad_change * towards3
        grad_gram3 += tiles.multiply(grad_change * hidden, tl.trans(hidden), PRECISION)
        grad_slope3 += tl.sum(2 * grad_change * hidden, axis=1)[:, None]
        grad_base3 += tl.sum(tl.where(inside[None, :], grad_base, 0.0), axis=1)[:, None]
        # LN2.
        grad_uneven = tl.where(rows < K, grad_hidden * scale2, 0.0)
        grad_scale = tiles.sum_of_rows(grad_hidden * uneven)
        grad_change, grad_base = tiles.norm_scales_backward(
            change2, base2, grad_scale, tiles.row_of(grad_hidden, K, LP), NORM_EPS
        )
        grad_uneven += 2 * grad_change * towards2
        grad_gram2 += tiles.multiply(grad_change * uneven, tl.trans(uneven), PRECISION)
        grad_slope2 += tl.sum(2 * grad_change * uneven, axis=1)[:, None]
        grad_base2 += tl.sum(tl.where(inside[None, :], grad_base, 0.0), axis=1)[:, None]
        # The softmaxes of attention, and LN1's scale of the query.
        attention = uneven + even
        grad_logits = tl.zeros_like(attention)
        for head in tl.static_range(H):
            here = (rows >= head * F) & (rows < head * F + F)
            common = tiles.sum_of_rows(tl.where(here, attention * grad_uneven, 0.0))
            grad_logits = tl.where(here, attention * (grad_uneven - common), grad_logits)
        grad_asked_KN = grad_logits * scale1
        tl.store(
            grad_asked + tiles.logit_places(video, rows, texts, N, F, H),
            grad_asked_KN,
            mask=(rows < K) & inside[None, :],
        )
        grad_own += tl.sum(grad_asked_KN, axis=1)[:, None]
        grad_offset += tl.sum(grad_logits, axis=1)[:, None]
        grad_scale = tiles.sum_of_rows(grad_logits * logits)
        grad_square = tl.where(gap_square >= 0, -0.5 * scale1 * scale1 * scale1 * grad_scale / WIDTH, 0.0)
        tl.store(grad_gap + places, grad_square, mask=inside[None, :])
        tl.store(grad_text + places, grad_text_length, mask=inside[None, :])
        # The products.
        common = tiles.sum_of_rows(pooling * grad_pooling)
        grad_frames = grad_dot * pooling + pooling * (grad_pooling - common) / TEMPERATURE
        grad_frames -= 2 * share * grad_square
        frames = tl.arange(0, FP)[:, None]
        at = (video * (F + L) + frames).to(tl.int64) * N + texts[None, :]
        tl.store(grad_products + at, grad_frames, mask=(frames < F) & inside[None, :])
        at = (video * (F + L) + F + rows).to(tl.int64) * N + texts[None, :]
        tl.store(grad_products + at, grad_text_delta * weights, mask=(rows < L) & inside[None, :])
    part = part_small + (share_of_texts * num_videos + video).to(tl.int64) * tiles.numbers_of_a_video(F, H)
    tiles.store_column(part, grad_own, K, LP)
    tiles.store_column(part + K, grad_offset, K, LP)
    # Even attention and shares of frames carry no gradient; own mean and square get theirs from grad_gap.
    part += 3 * K + F + 2
    tiles.store_column(part, grad_base2, 1, 1)
    tiles.store_column(part + 1, grad_base3, 1, 1)
    part += 2
    tiles.store_matrix(part, grad_gram2, K, K, LP, LP)
    tiles.store_column(part + K * K, grad_slope2, K, LP)
    part += K * K + K
    tiles.store_matrix(part, grad_gram3, K + 1, K + 1, LP, LP)
    tiles.store_column(part + (K + 1) * (K + 1), grad_slope3, K + 1, LP)
    part += (K + 1) * (K + 1) + K + 1
    tiles.store_matrix(part, grad_gram, L, L, LP, LP)
    tiles.store_matrix(part + L * L, grad_frame_gram, F, F, FP, FP)
    tiles.store_matrix(part + L * L + F * F, grad_by_frames, L, F, LP, FP)
