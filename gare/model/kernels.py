"""Triton kernels for the arithmetic between the products of a pair and its score, forward and backward.

They compute what ``gare.model.factorized.video_pairs`` computes where frames are the context and ψ is asked
with the gap: of each pair some forty numbers are read, one or two are written, and nothing else of it is ever
in memory. The plain form is the definition, and tests hold these to it. ``gare.model.fused`` calls them.

A program has one video and a share of the texts, of which it takes BN at a time. Vectors of pairs are columns
of tiles (LP, BN): K rows for attention weights, by head, then one each for LN2's scale, LN3's scale and 1, as
the coefficients w_ij of the basis are.

M videos, N texts, S sampled texts, F frames, H heads, K = H·F attention weights, L = K + 3 basis vectors,
R = F + L rows of products, D embedding width; LP and FP are L and F as powers of two, 16 at least.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _expm1(x, TERMS: tl.constexpr):
    """exp(x) − 1, by its series where the two are close."""
    is_close = tl.abs(x) < 0.5
    close = tl.where(is_close, x, 0.0)
    series = tl.zeros_like(x) + 1
    for step in tl.static_range(TERMS):
        series = 1 + close * series / (TERMS + 1 - step)
    return tl.where(is_close, close * series, tl.exp(x) - 1)


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """A·B of two tiles; in float64, which tests alone use, without tensor cores."""
    if PRECISION == "float64":
        product = tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit
def _matrix(numbers, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A small matrix in a tile, zero beyond."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    return tl.load(numbers + rows * num_columns + columns, mask=inside, other=0.0)


@triton.jit
def _column(numbers, count, ROWS: tl.constexpr):
    """A small vector as a tile (ROWS, 1), zero beyond."""
    rows = tl.arange(0, ROWS)[:, None]
    return tl.load(numbers + rows, mask=rows < count, other=0.0)


@triton.jit
def _store_matrix(numbers, tile, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    tl.store(
        numbers + rows * num_columns + columns, tile, mask=(rows < num_rows) & (columns < num_columns)
    )


@triton.jit
def _store_column(numbers, tile, count, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    tl.store(numbers + rows, tile, mask=rows < count)


@triton.jit
def _row(tile, index, LP: tl.constexpr):
    """One row (1, BN) of a tile."""
    rows = tl.arange(0, LP)[:, None]
    return tl.sum(tl.where(rows == index, tile, 0.0), axis=0)[None, :]


@triton.jit
def _total(tile):
    """Sums over the rows, (1, BN)."""
    return tl.sum(tile, axis=0)[None, :]


@triton.jit
def _scales(change, base, EPS: tl.constexpr):
    """See ``forms.Length.scales``."""
    at_base = 1 / tl.sqrt(base)
    scale = 1 / tl.sqrt(tl.maximum(base + change, EPS))
    both = scale * at_base
    return scale, -change * both * both / (scale + at_base)


@triton.jit
def _scales_backward(change, base, grad_scale, grad_difference, EPS: tl.constexpr):
    """Gradients of ``change`` and ``base`` from those of what ``_scales`` gives."""
    b = 1 / tl.sqrt(base)
    s = 1 / tl.sqrt(tl.maximum(base + change, EPS))
    # The difference is −change·q, q = (sb)²/(s + b), ∂q/∂s = (sb)²(s + 2b)/(s(s + b)²).
    part = s * b / (s + b)
    grad_q = -grad_difference * change
    grad_s = grad_scale + grad_q * part * part * (s + 2 * b) / s
    grad_b = grad_q * part * part * (b + 2 * s) / b
    grad_sum = tl.where(base + change >= EPS, -0.5 * s * s * s * grad_s, 0.0)
    return grad_sum - grad_difference * part * s * b, grad_sum - 0.5 * b * b * b * grad_b


@triton.jit
def _uneven(logits, even, F: tl.constexpr, H: tl.constexpr, LP: tl.constexpr, TERMS: tl.constexpr):
    """See ``factorized._uneven``; zero beyond the attention weights."""
    rows = tl.arange(0, LP)[:, None]
    result = tl.zeros_like(logits)
    for head in tl.static_range(H):
        here = (rows >= head * F) & (rows < head * F + F)
        highest = tl.max(tl.where(here, logits, float("-inf")), axis=0)[None, :]
        above = _expm1(tl.where(here, logits - highest, 0.0), TERMS)
        mean = _total(even * tl.where(here, above, 0.0))
        result = tl.where(here, (above - mean) * even / (1 + mean), result)
    return result


@triton.jit
def _pooling(products, share, TEMPERATURE: tl.constexpr):
    """See ``factorized.pooling_weights``."""
    logits = tl.where(share > 0, products / TEMPERATURE, float("-inf"))
    above = tl.exp(logits - tl.max(logits, axis=0)[None, :])
    return above / _total(above)


@triton.jit
def _load_rows(numbers, first, stride, count, texts, inside, ROWS: tl.constexpr):
    """Numbers of ``count`` rows for some texts (ROWS, BN), zero beyond."""
    rows = tl.arange(0, ROWS)[:, None]
    places = (first + rows * stride).to(tl.int64) + texts[None, :]
    return tl.load(numbers + places, mask=(rows < count) & inside[None, :], other=0.0)


@triton.jit
def _load_asked(asked, video, texts, inside, N, F: tl.constexpr, H: tl.constexpr, LP: tl.constexpr):
    """Products of contexts with turned texts, (F, H, N) a video, by head (LP, BN)."""
    rows = tl.arange(0, LP)[:, None]
    places = _asked_places(video, rows, texts, N, F, H)
    return tl.load(asked + places, mask=(rows < H * F) & inside[None, :], other=0.0)


@triton.jit
def _asked_places(video, rows, texts, N, F: tl.constexpr, H: tl.constexpr):
    return ((video * F + rows % F).to(tl.int64) * H + rows // F) * N + texts[None, :]


@triton.jit
def _gap(frame_products, share, numbers, mean, centred_square, WIDTH: tl.constexpr, NORM_EPS: tl.constexpr):
    """LN1's scale of the query, and the squared length of the gap without its mean before rounding is cut."""
    own_mean, own_square = tl.load(numbers), tl.load(numbers + 1)
    shared = _total(share * frame_products) - WIDTH * own_mean * mean
    square = own_square + centred_square - 2 * shared
    return 1 / tl.sqrt(tl.maximum(square, 0.0) / WIDTH + NORM_EPS), square


@triton.jit
def _weights(uneven, numbers2, numbers3, base2, base3, K: tl.constexpr, LP: tl.constexpr,
             PRECISION: tl.constexpr, NORM_EPS: tl.constexpr):  # fmt: skip
    """Coefficients w, the hidden ones before LN3, and of both LayerNorms the change, scale and product.

    ``numbers2`` and ``numbers3`` begin with the Gram matrix of a ``Length``, its slope follows.
    """
    rows = tl.arange(0, LP)[:, None]
    product2 = _product(_matrix(numbers2, K, K, LP, LP), uneven, PRECISION)
    slope2 = _column(numbers2 + K * K, K, LP)
    change2 = _total(uneven * (product2 + 2 * slope2))
    scale2, difference2 = _scales(change2, base2, NORM_EPS)
    hidden = tl.where(rows == K, difference2, uneven * scale2)
    product3 = _product(_matrix(numbers3, K + 1, K + 1, LP, LP), hidden, PRECISION)
    slope3 = _column(numbers3 + (K + 1) * (K + 1), K + 1, LP)
    change3 = _total(hidden * (product3 + 2 * slope3))
    scale3, difference3 = _scales(change3, base3, NORM_EPS)
    weights = tl.where(rows == K + 1, difference3, hidden * scale3)
    weights = tl.where(rows == K + 2, 1.0, weights)
    return weights, hidden, change2, scale2, product2 + slope2, change3, scale3, product3 + slope3


@triton.jit
def _root(square, LEAST: tl.constexpr):
    return tl.sqrt(tl.maximum(square, LEAST))


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
    numbers = small + video.to(tl.int64) * (
        3 * K + F + 4 + K * K + K + (K + 1) * (K + 1) + K + 1 + L * L + (F + L) * F
    )
    own, offset, even = _column(numbers, K, LP), _column(numbers + K, K, LP), _column(numbers + 2 * K, K, LP)
    numbers += 3 * K
    share = _column(numbers, F, FP)
    scalars = numbers + F
    base2, base3 = tl.load(scalars + 2), tl.load(scalars + 3)
    numbers2 = scalars + 4
    numbers3 = numbers2 + K * K + K
    numbers4 = numbers3 + (K + 1) * (K + 1) + K + 1
    gram = _matrix(numbers4, L, L, LP, LP)
    frame_gram = _matrix(numbers4 + L * L, F, F, FP, FP)
    by_frames = _matrix(numbers4 + L * L + F * F, L, F, LP, FP)
    mean = tl.zeros([LP, 1], dtype=gram.dtype)
    scatter = tl.zeros([LP, LP], dtype=gram.dtype)
    first = share_of_texts * texts_per_program
    last = tl.minimum(first + texts_per_program, N)
    count = tl.zeros([1, 1], dtype=gram.dtype)
    for start in range(first, last, BN):
        texts = start + tl.arange(0, BN)
        inside = texts < last
        square_1N = tl.load(text_square + texts, mask=inside, other=1.0)[None, :]
        mean_1N = tl.load(text_mean + texts, mask=inside, other=0.0)[None, :]
        centred_1N = tl.load(text_centred + texts, mask=inside, other=1.0)[None, :]
        frame_products = _load_rows(products, video * (F + L) * N, N, F, texts, inside, FP)
        delta_products = _load_rows(products, (video * (F + L) + F) * N, N, L, texts, inside, LP)
        asked_KN = _load_asked(asked, video, texts, inside, N, F, H, LP)
        scale1, _ = _gap(frame_products, share, scalars, mean_1N, centred_1N, WIDTH, NORM_EPS)
        uneven = _uneven((asked_KN + own) * scale1 + offset, even, F, H, LP, TERMS)
        weights, _, _, _, _, _, _, _ = _weights(
            uneven, numbers2, numbers3, base2, base3, K, LP, PRECISION, NORM_EPS
        )
        pooling = _pooling(frame_products, share, TEMPERATURE)
        text_pooled = _total(pooling * frame_products)
        pooled_square = tl.maximum(_total(pooling * _product(frame_gram, pooling, PRECISION)), 0.0)
        text_delta = _total(weights * delta_products)
        delta_square = tl.maximum(_total(weights * _product(gram, weights, PRECISION)), 0.0)
        delta_pooled = _total(weights * _product(by_frames, pooling, PRECISION))
        if SIDE == "text":
            text_length = square_1N + 2 * text_delta + delta_square
            video_length = pooled_square
            dot = text_pooled + delta_pooled
        else:
            text_length = square_1N
            video_length = pooled_square + 2 * delta_pooled + delta_square
            dot = text_pooled + text_delta
        score = dot / (_root(text_length, COSINE_EPS_SQUARE) * _root(video_length, COSINE_EPS_SQUARE))
        places = video.to(tl.int64) * N + texts[None, :]
        tl.store(scores + places, tl.minimum(tl.maximum(score, -1.0), 1.0), mask=inside[None, :])
        norm = _root(delta_square, TINY)
        if HAS_NORMS:
            tl.store(norms + places, norm, mask=inside[None, :])
        if HAS_PLAIN:
            length = tl.maximum(tl.sqrt(square_1N * pooled_square), SHORTEST)
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
            mean_here = tl.sum(weights, axis=1)[:, None] / here
            apart = tl.where(inside[None, :], weights - mean_here, 0.0)
            step = mean_here - mean
            both = count + here
            scatter += _product(apart, tl.trans(apart), PRECISION)
            scatter += step * tl.trans(step) * (count * here / both)
            mean += step * (here / both)
            count = both
    if HAS_MOMENTS:
        place = (share_of_texts * num_videos + video).to(tl.int64)
        _store_column(part_mean + place * L, mean, L, LP)
        _store_matrix(part_scatter + place * L * L, scatter, L, L, LP, LP)
        _store_column(part_count + place, count, 1, 1)


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
    SMALL: tl.constexpr = (
        3 * K + F + 4 + K * K + K + (K + 1) * (K + 1) + K + 1 + L * L + (F + L) * F
    )
    video, share_of_texts = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, LP)[:, None]
    numbers = small + video.to(tl.int64) * SMALL
    own, offset, even = _column(numbers, K, LP), _column(numbers + K, K, LP), _column(numbers + 2 * K, K, LP)
    numbers += 3 * K
    share = _column(numbers, F, FP)
    scalars = numbers + F
    base2, base3 = tl.load(scalars + 2), tl.load(scalars + 3)
    numbers2 = scalars + 4
    numbers3 = numbers2 + K * K + K
    numbers4 = numbers3 + (K + 1) * (K + 1) + K + 1
    gram = _matrix(numbers4, L, L, LP, LP)
    frame_gram = _matrix(numbers4 + L * L, F, F, FP, FP)
    by_frames = _matrix(numbers4 + L * L + F * F, L, F, LP, FP)
    grad_own, grad_offset = tl.zeros([LP, 1], dtype=gram.dtype), tl.zeros([LP, 1], dtype=gram.dtype)
    grad_gram2, grad_slope2 = tl.zeros([LP, LP], dtype=gram.dtype), tl.zeros([LP, 1], dtype=gram.dtype)
    grad_gram3, grad_slope3 = tl.zeros([LP, LP], dtype=gram.dtype), tl.zeros([LP, 1], dtype=gram.dtype)
    grad_gram = tl.zeros([LP, LP], dtype=gram.dtype)
    grad_frame_gram = tl.zeros([FP, FP], dtype=gram.dtype)
    grad_by_frames = tl.zeros([LP, FP], dtype=gram.dtype)
    grad_base2, grad_base3 = tl.zeros([1, 1], dtype=gram.dtype), tl.zeros([1, 1], dtype=gram.dtype)
    if HAS_MOMENTS:
        centre = _column(moments_mean + video * L, L, LP)
        along = _column(grad_mean + video * L, L, LP) / N
        # Scatter is symmetric, its gradient need not be.
        spread = _matrix(grad_scatter + video.to(tl.int64) * L * L, L, L, LP, LP)
        spread += tl.trans(spread)
    first = share_of_texts * texts_per_program
    last = tl.minimum(first + texts_per_program, N)
    for start in range(first, last, BN):
        texts = start + tl.arange(0, BN)
        inside = texts < last
        square_1N = tl.load(text_square + texts, mask=inside, other=1.0)[None, :]
        mean_1N = tl.load(text_mean + texts, mask=inside, other=0.0)[None, :]
        centred_1N = tl.load(text_centred + texts, mask=inside, other=1.0)[None, :]
        frame_products = _load_rows(products, video * (F + L) * N, N, F, texts, inside, FP)
        delta_products = _load_rows(products, (video * (F + L) + F) * N, N, L, texts, inside, LP)
        asked_KN = _load_asked(asked, video, texts, inside, N, F, H, LP)
        scale1, gap_square = _gap(frame_products, share, scalars, mean_1N, centred_1N, WIDTH, NORM_EPS)
        uneven = _uneven((asked_KN + own) * scale1 + offset, even, F, H, LP, TERMS)
        weights, hidden, change2, scale2, towards2, change3, scale3, towards3 = _weights(
            uneven, numbers2, numbers3, base2, base3, K, LP, PRECISION, NORM_EPS
        )
        pooling = _pooling(frame_products, share, TEMPERATURE)
        text_pooled = _total(pooling * frame_products)
        frames_pooled = _product(frame_gram, pooling, PRECISION)
        pooled_square_raw = _total(pooling * frames_pooled)
        pooled_square = tl.maximum(pooled_square_raw, 0.0)
        text_delta = _total(weights * delta_products)
        gram_weights = _product(gram, weights, PRECISION)
        delta_square_raw = _total(weights * gram_weights)
        delta_square = tl.maximum(delta_square_raw, 0.0)
        basis_pooled = _product(by_frames, pooling, PRECISION)
        delta_pooled = _total(weights * basis_pooled)
        if SIDE == "text":
            text_length = square_1N + 2 * text_delta + delta_square
            video_length = pooled_square
            dot = text_pooled + delta_pooled
        else:
            text_length = square_1N
            video_length = pooled_square + 2 * delta_pooled + delta_square
            dot = text_pooled + text_delta
        inverse = 1 / (_root(text_length, COSINE_EPS_SQUARE) * _root(video_length, COSINE_EPS_SQUARE))
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
        norm = _root(delta_square, TINY)
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
                grad_seen = tl.where(inside[None, :], along + _product(spread, seen, PRECISION), 0.0)
                grad_weights += grad_seen / length
                shortened = _total(grad_seen * weights) / (length * length)
                grad_norm -= tl.where(norm >= SHORTEST, shortened, 0.0)
            else:
                seen = tl.where(inside[None, :], weights - centre, 0.0)
                grad_weights += tl.where(inside[None, :], along + _product(spread, seen, PRECISION), 0.0)
        grad_delta_square += tl.where(delta_square >= TINY, 0.5 * grad_norm / norm, 0.0)
        grad_delta_square = tl.where(delta_square_raw >= 0, grad_delta_square, 0.0)
        grad_pooled_square = tl.where(pooled_square_raw >= 0, grad_video_length, 0.0)
        # Quadratic forms and products of coefficients and pooling weights.
        grad_weights += grad_text_delta * delta_products + grad_delta_pooled * basis_pooled
        grad_weights += 2 * grad_delta_square * gram_weights
        grad_pooling = grad_dot * frame_products + 2 * grad_pooled_square * frames_pooled
        grad_pooling += grad_delta_pooled * _product(tl.trans(by_frames), weights, PRECISION)
        grad_gram += _product(grad_delta_square * weights, tl.trans(weights), PRECISION)
        grad_by_frames += _product(grad_delta_pooled * weights, tl.trans(pooling), PRECISION)
        grad_frame_gram += _product(grad_pooled_square * pooling, tl.trans(pooling), PRECISION)
        # LN3.
        hidden_rows = rows <= K
        grad_hidden = tl.where(hidden_rows, grad_weights * scale3, 0.0)
        grad_scale = _total(tl.where(hidden_rows, grad_weights * hidden, 0.0))
        grad_change, grad_base = _scales_backward(
            change3, base3, grad_scale, _row(grad_weights, K + 1, LP), NORM_EPS
        )
        grad_hidden += 2 * grad_change * towards3
        grad_gram3 += _product(grad_change * hidden, tl.trans(hidden), PRECISION)
        grad_slope3 += tl.sum(2 * grad_change * hidden, axis=1)[:, None]
        grad_base3 += tl.sum(tl.where(inside[None, :], grad_base, 0.0), axis=1)[:, None]
        # LN2.
        grad_uneven = tl.where(rows < K, grad_hidden * scale2, 0.0)
        grad_scale = _total(grad_hidden * uneven)
        grad_change, grad_base = _scales_backward(
            change2, base2, grad_scale, _row(grad_hidden, K, LP), NORM_EPS
        )
        grad_uneven += 2 * grad_change * towards2
        grad_gram2 += _product(grad_change * uneven, tl.trans(uneven), PRECISION)
        grad_slope2 += tl.sum(2 * grad_change * uneven, axis=1)[:, None]
        grad_base2 += tl.sum(tl.where(inside[None, :], grad_base, 0.0), axis=1)[:, None]
        # The softmaxes of attention, and LN1's scale of the query.
        attention = uneven + even
        grad_logits = tl.zeros_like(attention)
        for head in tl.static_range(H):
            here = (rows >= head * F) & (rows < head * F + F)
            common = _total(tl.where(here, attention * grad_uneven, 0.0))
            grad_logits = tl.where(here, attention * (grad_uneven - common), grad_logits)
        grad_asked_KN = grad_logits * scale1
        tl.store(
            grad_asked + _asked_places(video, rows, texts, N, F, H),
            grad_asked_KN,
            mask=(rows < K) & inside[None, :],
        )
        grad_own += tl.sum(grad_asked_KN, axis=1)[:, None]
        grad_offset += tl.sum(grad_logits, axis=1)[:, None]
        grad_scale = _total(grad_logits * (asked_KN + own))
        grad_square = tl.where(gap_square >= 0, -0.5 * scale1 * scale1 * scale1 * grad_scale / WIDTH, 0.0)
        tl.store(grad_gap + places, grad_square, mask=inside[None, :])
        tl.store(grad_text + places, grad_text_length, mask=inside[None, :])
        # The products.
        common = _total(pooling * grad_pooling)
        grad_frames = grad_dot * pooling + pooling * (grad_pooling - common) / TEMPERATURE
        grad_frames -= 2 * share * grad_square
        frames = tl.arange(0, FP)[:, None]
        at = (video * (F + L) + frames).to(tl.int64) * N + texts[None, :]
        tl.store(grad_products + at, grad_frames, mask=(frames < F) & inside[None, :])
        at = (video * (F + L) + F + rows).to(tl.int64) * N + texts[None, :]
        tl.store(grad_products + at, grad_text_delta * weights, mask=(rows < L) & inside[None, :])
    part = part_small + (share_of_texts * num_videos + video).to(tl.int64) * SMALL
    _store_column(part, grad_own, K, LP)
    _store_column(part + K, grad_offset, K, LP)
    # Even attention and shares of frames carry no gradient; own mean and square get theirs from grad_gap.
    part += 3 * K + F + 2
    _store_column(part, grad_base2, 1, 1)
    _store_column(part + 1, grad_base3, 1, 1)
    part += 2
    _store_matrix(part, grad_gram2, K, K, LP, LP)
    _store_column(part + K * K, grad_slope2, K, LP)
    part += K * K + K
    _store_matrix(part, grad_gram3, K + 1, K + 1, LP, LP)
    _store_column(part + (K + 1) * (K + 1), grad_slope3, K + 1, LP)
    part += (K + 1) * (K + 1) + K + 1
    _store_matrix(part, grad_gram, L, L, LP, LP)
    _store_matrix(part + L * L, grad_frame_gram, F, F, FP, FP)
    _store_matrix(part + L * L + F * F, grad_by_frames, L, F, LP, FP)
