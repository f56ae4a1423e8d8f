"""Triton kernels for the arithmetic between the products of a pair and its score, forward and backward.

They compute the same as ``gare.model.factorized.pairs.video_pairs`` if frames are the context and ψ's query
is the gap: about forty numbers per pair are read, one or two are written, and nothing else of the pair is
ever in memory. The plain form is the definition, and tests compare the kernels with it.
``gare.model.fused.blocks`` calls them.

A program handles one video and a share of the texts, BN texts at a time.

M videos, N texts, S sampled texts, F frames, H heads, K = H·F attention weights, L = K + 3 basis vectors,
R = F + L rows of products, D embedding width; LP and FP are K and F as powers of two, 16 at least, EP is 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gare.model.fused import tiles


@triton.jit
def touch(written):
    """Writes 1, to find out whether kernels run at all."""
    tl.store(written, 1.0)


@triton.jit
def forward(
    # Read.
    products, asked, small, text_mean, text_centred, text_square, slots,
    # Written; outputs that were not requested are never touched.
    scores, norms, plain, sampled, part_mean, part_scatter, part_count,
    N, S, num_videos, texts_per_program,
    WIDTH: tl.constexpr, TEMPERATURE: tl.constexpr, SIDE: tl.constexpr,
    F: tl.constexpr, H: tl.constexpr, LP: tl.constexpr, FP: tl.constexpr, BN: tl.constexpr,
    HAS_NORMS: tl.constexpr, HAS_PLAIN: tl.constexpr, HAS_SAMPLE: tl.constexpr,
    HAS_MOMENTS: tl.constexpr, NORMALISED: tl.constexpr,
    PRECISION: tl.constexpr, TERMS: tl.constexpr, NORM_EPS: tl.constexpr, COSINE_EPS_SQUARE: tl.constexpr,
    TINY: tl.constexpr, SHORTEST: tl.constexpr,
):  # fmt: skip
    """Computes scores, lengths and moments of one video with a share of the texts; see ``fused_pairs``."""
    K: tl.constexpr = H * F
    L: tl.constexpr = K + 3
    EP: tl.constexpr = 16
    video, share_of_texts = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tl.arange(0, LP)[:, None]
    kind: tl.constexpr = scores.dtype.element_ty
    mean, last_mean = tl.zeros([LP, 1], dtype=kind), tl.zeros([EP, 1], dtype=kind)
    scatter = tl.zeros([LP, LP], dtype=kind)
    border, corner = tl.zeros([LP, EP], dtype=kind), tl.zeros([EP, EP], dtype=kind)
    first = share_of_texts * texts_per_program
    end = tl.minimum(first + texts_per_program, N)
    count = tl.zeros([1, 1], dtype=kind)
    for start in range(first, end, BN):
        texts = start + tl.arange(0, BN)
        inside = texts < end
        lengths, attended, norms_of_pairs, increment, with_text, with_pooled = tiles.compute_pairs(
            products, asked, small, text_mean, text_centred, text_square, video, texts, inside, N,
            WIDTH, TEMPERATURE, SIDE, F, H, LP, FP, PRECISION, TERMS, NORM_EPS,
        )  # fmt: skip
        square, text_length, video_length, dot, text_pooled, pooled_square, delta_square = lengths
        weights, second, third, _, _, _ = increment
        score = dot / (
            tiles.root(text_length, COSINE_EPS_SQUARE) * tiles.root(video_length, COSINE_EPS_SQUARE)
        )
        places = video * N + texts[None, :]
        tl.store(
            scores + places, tl.where(score > 1.0, 1.0, tiles.at_least(score, -1.0)), mask=inside[None, :]
        )
        norm = tiles.root(delta_square, TINY)
        if HAS_NORMS:
            tl.store(norms + places, norm, mask=inside[None, :])
        if HAS_PLAIN:
            length = tiles.at_least(tl.sqrt(square * tiles.at_least(pooled_square, 0.0)), SHORTEST)
            tl.store(plain + places, text_pooled / length, mask=inside[None, :])
        if HAS_SAMPLE:
            slot = tl.load(slots + texts, mask=inside, other=-1)[None, :]
            places = (video * L + rows) * S + slot
            tl.store(sampled + places, weights, mask=(rows < K) & (slot >= 0))
            places = (video * L + K) * S + slot
            tl.store(sampled + places, second, mask=slot >= 0)
            tl.store(sampled + places + S, third, mask=slot >= 0)
            tl.store(sampled + places + 2 * S, tl.zeros_like(third) + 1, mask=slot >= 0)
        if HAS_MOMENTS:
            last = tiles.three_rows(second, third, tl.zeros_like(third) + 1, EP)
            if NORMALISED:
                inverse = 1 / tiles.at_least(norm, SHORTEST)
                weights, last = weights * inverse, last * inverse
            # Chan's merge of this block's moments with those before it.
            here = tl.minimum(end - start, BN).to(kind)
            mean_here, apart = tiles.block_moments(weights, texts, start, inside, here)
            last_mean_here, last_apart = tiles.block_moments(last, texts, start, inside, here)
            step, last_step = mean_here - mean, last_mean_here - last_mean
            both = count + here
            share = count * here / both
            scatter += tiles.multiply(apart, tl.trans(apart), PRECISION) + step * tl.trans(step) * share
            border += (
                tiles.multiply(apart, tl.trans(last_apart), PRECISION) + step * tl.trans(last_step) * share
            )
            corner += tiles.multiply(last_apart, tl.trans(last_apart), PRECISION)
            corner += last_step * tl.trans(last_step) * share
            mean += step * (here / both)
            last_mean += last_step * (here / both)
            count = both
    if HAS_MOMENTS:
        place = share_of_texts * num_videos + video
        tiles.store_column(part_mean + place * L, mean, K, LP)
        tiles.store_column(part_mean + place * L + K, last_mean, 3, EP)
        tiles.store_symmetric(part_scatter + place * L * L, scatter, border, corner, K, 3, L, LP, EP)
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
    """Computes gradients of ``forward``'s inputs: products by pair, a video's numbers by share of the texts.

    The gradients of the texts' scalars follow from two outputs (M, N): ``grad_gap``, of the gap's squared
    length, and ``grad_text``, of the text's squared length.
    """
    K: tl.constexpr = H * F
    L: tl.constexpr = K + 3
    EP: tl.constexpr = 16
    video, share_of_texts = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tl.arange(0, LP)[:, None]
    kind: tl.constexpr = grad_products.dtype.element_ty
    numbers = small + video * tiles.numbers_of_a_video(F, H)
    scalars = numbers + 3 * K + F
    by_frames_at = scalars + 4 + K * K + K + (K + 1) * (K + 1) + K + 1 + L * L + F * F
    by_frames = tiles.load_matrix(by_frames_at, K, F, F, LP, FP)
    last_by_frames = tiles.load_matrix(by_frames_at + K * F, 3, F, F, EP, FP)
    grad_own, grad_offset = tl.zeros([LP, 1], dtype=kind), tl.zeros([LP, 1], dtype=kind)
    grad_base2, grad_base3 = tl.zeros([1, 1], dtype=kind), tl.zeros([1, 1], dtype=kind)
    grad_gram2, grad_slope2 = tl.zeros([LP, LP], dtype=kind), tl.zeros([LP, 1], dtype=kind)
    grad_gram3, grad_slope3 = tl.zeros([LP, LP], dtype=kind), tl.zeros([LP, 1], dtype=kind)
    grad_border3, grad_corner3 = tl.zeros([LP, 1], dtype=kind), tl.zeros([1, 1], dtype=kind)
    grad_last_slope3 = tl.zeros([1, 1], dtype=kind)
    grad_gram, grad_border = tl.zeros([LP, LP], dtype=kind), tl.zeros([LP, EP], dtype=kind)
    grad_corner = tl.zeros([EP, EP], dtype=kind)
    grad_frame_gram = tl.zeros([FP, FP], dtype=kind)
    grad_by_frames, grad_last_by_frames = tl.zeros([LP, FP], dtype=kind), tl.zeros([EP, FP], dtype=kind)
    if HAS_MOMENTS:
        centre = tiles.load_column(moments_mean + video * L, K, LP)
        last_centre = tiles.load_column(moments_mean + video * L + K, 3, EP)
        along = tiles.load_column(grad_mean + video * L, K, LP) / N
        last_along = tiles.load_column(grad_mean + video * L + K, 3, EP) / N
        # The scatter is symmetric, but its gradient need not be.
        of_scatter = grad_scatter + video * L * L
        spread = tiles.load_matrix(of_scatter, K, K, L, LP, LP)
        spread += tl.trans(spread)
        spread_border = tiles.load_matrix(of_scatter + K, K, 3, L, LP, EP)
        spread_border += tl.trans(tiles.load_matrix(of_scatter + K * L, 3, K, L, EP, LP))
        spread_corner = tiles.load_matrix(of_scatter + K * L + K, 3, 3, L, EP, EP)
        spread_corner += tl.trans(spread_corner)
    first = share_of_texts * texts_per_program
    end = tl.minimum(first + texts_per_program, N)
    for start in range(first, end, BN):
        texts = start + tl.arange(0, BN)
        inside = texts < end
        lengths, attended, norms_of_pairs, increment, with_text, with_pooled = tiles.compute_pairs(
            products, asked, small, text_mean, text_centred, text_square, video, texts, inside, N,
            WIDTH, TEMPERATURE, SIDE, F, H, LP, FP, PRECISION, TERMS, NORM_EPS,
        )  # fmt: skip
        _, text_length, video_length, dot, _, pooled_square, delta_square = lengths
        logits, scale1, gap_square, uneven, even, pooling, share = attended
        change2, scale2, towards2, hidden, change_of_scale2, change3, scale3, towards3, last_towards3 = (
            norms_of_pairs
        )
        weights, second, third, gram_weights, gram_second, gram_third = increment
        frame_products, delta_products, second_product, third_product = with_text
        frames_pooled, basis_pooled, second_pooled, third_pooled = with_pooled
        last = tiles.three_rows(second, third, tl.zeros_like(third) + 1, EP)
        inverse = 1 / (
            tiles.root(text_length, COSINE_EPS_SQUARE) * tiles.root(video_length, COSINE_EPS_SQUARE)
        )
        score = dot * inverse
        places = video * N + texts[None, :]
        grad_score = tl.load(grad_scores + places, mask=inside[None, :], other=0.0)
        grad_score = tl.where((score >= -1.0) & (score <= 1.0), grad_score, 0.0)
        grad_dot = grad_score * inverse
        grad_text_length = tl.where(
            text_length >= COSINE_EPS_SQUARE,
            -0.5 * grad_score * score / tiles.at_least(text_length, COSINE_EPS_SQUARE),
            0.0,
        )
        grad_video_length = tl.where(
            video_length >= COSINE_EPS_SQUARE,
            -0.5 * grad_score * score / tiles.at_least(video_length, COSINE_EPS_SQUARE),
            0.0,
        )
        if SIDE == "text":
            grad_text_delta, grad_delta_pooled = 2 * grad_text_length, grad_dot
            grad_delta_square = grad_text_length
        else:
            grad_text_delta, grad_delta_pooled = grad_dot, 2 * grad_video_length
            grad_delta_square = grad_video_length
        grad_weights, grad_last = tl.zeros_like(weights), tl.zeros_like(last)
        norm = tiles.root(delta_square, TINY)
        grad_norm = tl.zeros_like(norm)
        if HAS_NORMS:
            grad_norm += tl.load(grad_norms + places, mask=inside[None, :], other=0.0)
        if HAS_SAMPLE:
            slot = tl.load(slots + texts, mask=inside, other=-1)[None, :]
            at = (video * L + rows) * S + slot
            grad_weights += tl.load(grad_sampled + at, mask=(rows < K) & (slot >= 0), other=0.0)
            more = tl.arange(0, EP)[:, None]
            at = (video * L + K + more) * S + slot
            grad_last += tl.load(grad_sampled + at, mask=(more < 3) & (slot >= 0), other=0.0)
        if HAS_MOMENTS:
            inverse = tl.zeros_like(norm) + 1
            if NORMALISED:
                inverse = 1 / tiles.at_least(norm, SHORTEST)
            seen = tl.where(inside[None, :], weights * inverse - centre, 0.0)
            last_seen = tl.where(inside[None, :], last * inverse - last_centre, 0.0)
            grad_seen = along + tiles.multiply(spread, seen, PRECISION)
            grad_seen += tiles.multiply(spread_border, last_seen, PRECISION)
            grad_seen = tl.where(inside[None, :], grad_seen, 0.0)
            grad_last_seen = last_along + tiles.multiply(tl.trans(spread_border), seen, PRECISION)
            grad_last_seen += tiles.multiply(spread_corner, last_seen, PRECISION)
            grad_last_seen = tl.where(inside[None, :], grad_last_seen, 0.0)
            grad_weights += grad_seen * inverse
            grad_last += grad_last_seen * inverse
            if NORMALISED:
                shortened = tiles.sum_of_rows(grad_seen * weights) + tiles.sum_of_rows(grad_last_seen * last)
                grad_norm -= tl.where(norm >= SHORTEST, shortened * inverse * inverse, 0.0)
        grad_delta_square += tl.where(delta_square >= TINY, 0.5 * grad_norm / norm, 0.0)
        grad_delta_square = tl.where(delta_square >= 0, grad_delta_square, 0.0)
        grad_pooled_square = tl.where(pooled_square >= 0, grad_video_length, 0.0)
        # Quadratic forms and products of coefficients and pooling weights.
        grad_weights += grad_text_delta * delta_products + grad_delta_pooled * basis_pooled
        grad_weights += 2 * grad_delta_square * gram_weights
        grad_second = tiles.row_of(grad_last, 0, EP) + 2 * grad_delta_square * gram_second
        grad_second += grad_text_delta * second_product + grad_delta_pooled * second_pooled
        grad_third = tiles.row_of(grad_last, 1, EP) + 2 * grad_delta_square * gram_third
        grad_third += grad_text_delta * third_product + grad_delta_pooled * third_pooled
        grad_pooling = tiles.multiply(tl.trans(by_frames), weights, PRECISION)
        grad_pooling += tiles.multiply(tl.trans(last_by_frames), last, PRECISION)
        grad_pooling = grad_pooling * grad_delta_pooled + grad_dot * frame_products
        grad_pooling += 2 * grad_pooled_square * frames_pooled
        last_across, pooling_across = tl.trans(last), tl.trans(pooling)
        grad_gram += tiles.multiply(grad_delta_square * weights, tl.trans(weights), PRECISION)
        grad_border += tiles.multiply(grad_delta_square * weights, last_across, PRECISION)
        grad_corner += tiles.multiply(grad_delta_square * last, last_across, PRECISION)
        grad_by_frames += tiles.multiply(grad_delta_pooled * weights, pooling_across, PRECISION)
        grad_last_by_frames += tiles.multiply(grad_delta_pooled * last, pooling_across, PRECISION)
        grad_frame_gram += tiles.multiply(grad_pooled_square * pooling, pooling_across, PRECISION)
        # LN3.
        grad_scale = tiles.sum_of_rows(grad_weights * hidden) + grad_second * change_of_scale2
        grad_change, grad_base = tiles.norm_scales_backward(
            change3, tl.load(scalars + 3), grad_scale, grad_third, NORM_EPS
        )
        grad_hidden = grad_weights * scale3 + 2 * grad_change * towards3
        grad_change_of_scale2 = grad_second * scale3 + 2 * grad_change * last_towards3
        grad_gram3 += tiles.multiply(grad_change * hidden, tl.trans(hidden), PRECISION)
        grad_border3 += tl.sum(grad_change * hidden * change_of_scale2, axis=1)[:, None]
        grad_corner3 += tl.sum(grad_change * change_of_scale2 * change_of_scale2, axis=1)[:, None]
        grad_slope3 += tl.sum(2 * grad_change * hidden, axis=1)[:, None]
        grad_last_slope3 += tl.sum(2 * grad_change * change_of_scale2, axis=1)[:, None]
        grad_base3 += tl.sum(tl.where(inside[None, :], grad_base, 0.0), axis=1)[:, None]
        # LN2.
        grad_scale = tiles.sum_of_rows(grad_hidden * uneven)
        grad_change, grad_base = tiles.norm_scales_backward(
            change2, tl.load(scalars + 2), grad_scale, grad_change_of_scale2, NORM_EPS
        )
        grad_uneven = grad_hidden * scale2 + 2 * grad_change * towards2
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
        at = (video * (F + L) + frames) * N + texts[None, :]
        tl.store(grad_products + at, grad_frames, mask=(frames < F) & inside[None, :])
        at = (video * (F + L) + F + rows) * N + texts[None, :]
        tl.store(grad_products + at, grad_text_delta * weights, mask=(rows < K) & inside[None, :])
        more = tl.arange(0, EP)[:, None]
        at = (video * (F + L) + F + K + more) * N + texts[None, :]
        tl.store(grad_products + at, grad_text_delta * last, mask=(more < 3) & inside[None, :])
    part = part_small + (share_of_texts * num_videos + video) * tiles.numbers_of_a_video(F, H)
    tiles.store_column(part, grad_own, K, LP)
    tiles.store_column(part + K, grad_offset, K, LP)
    # Even attention and shares of frames carry no gradient; own mean and square get theirs from grad_gap.
    part += 3 * K + F + 2
    tiles.store_column(part, grad_base2, 1, 1)
    tiles.store_column(part + 1, grad_base3, 1, 1)
    part += 2
    tiles.store_matrix(part, grad_gram2, K, K, K, LP, LP)
    tiles.store_column(part + K * K, grad_slope2, K, LP)
    part += K * K + K
    tiles.store_symmetric(part, grad_gram3, grad_border3, grad_corner3, K, 1, K + 1, LP, 1)
    part += (K + 1) * (K + 1)
    tiles.store_column(part, grad_slope3, K, LP)
    tiles.store_column(part + K, grad_last_slope3, 1, 1)
    part += K + 1
    tiles.store_symmetric(part, grad_gram, grad_border, grad_corner, K, 3, L, LP, EP)
    part += L * L
    tiles.store_matrix(part, grad_frame_gram, F, F, F, FP, FP)
    part += F * F
    tiles.store_matrix(part, grad_by_frames, K, F, F, LP, FP)
    tiles.store_matrix(part + K * F, grad_last_by_frames, 3, F, F, EP, FP)
