"""Triton functions on the tiles of the fused kernels: small matrices, norms, softmaxes, and all of a pair.

Vectors of pairs are columns of tiles (LP, BN): K rows for attention weights, by head, then one each for LN2's
scale, LN3's scale and 1, as the coefficients w_ij of the basis are. Sizes are those of ``kernels``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp_minus_one(x, TERMS: tl.constexpr):
    """exp(x) − 1, by its series where the two are close."""
    is_close = tl.abs(x) < 0.5
    close = tl.where(is_close, x, 0.0)
    series = tl.zeros_like(x) + 1
    for step in tl.static_range(TERMS):
        series = 1 + close * series / (TERMS + 1 - step)
    return tl.where(is_close, close * series, tl.exp(x) - 1)


@triton.jit
def multiply(a, b, PRECISION: tl.constexpr):
    """A·B of two tiles; in float64, which tests alone use, without tensor cores."""
    if PRECISION == "float64":
        product = tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit
def load_matrix(numbers, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A small matrix in a tile, zero beyond."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    return tl.load(numbers + rows * num_columns + columns, mask=inside, other=0.0)


@triton.jit
def load_column(numbers, count, ROWS: tl.constexpr):
    """A small vector as a tile (ROWS, 1), zero beyond."""
    rows = tl.arange(0, ROWS)[:, None]
    return tl.load(numbers + rows, mask=rows < count, other=0.0)


@triton.jit
def store_matrix(numbers, tile, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Stores a tile as a small matrix."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    tl.store(numbers + rows * num_columns + columns, tile, mask=(rows < num_rows) & (columns < num_columns))


@triton.jit
def store_column(numbers, tile, count, ROWS: tl.constexpr):
    """Stores a tile (ROWS, 1) as a small vector."""
    rows = tl.arange(0, ROWS)[:, None]
    tl.store(numbers + rows, tile, mask=rows < count)


@triton.jit
def row_of(tile, index, LP: tl.constexpr):
    """One row (1, BN) of a tile."""
    rows = tl.arange(0, LP)[:, None]
    return tl.sum(tl.where(rows == index, tile, 0.0), axis=0)[None, :]


@triton.jit
def sum_of_rows(tile):
    """Sums over the rows, (1, BN)."""
    return tl.sum(tile, axis=0)[None, :]


@triton.jit
def norm_scales(change, base, EPS: tl.constexpr):
    """See ``forms.Length.scales``."""
    at_base = 1 / tl.sqrt(base)
    scale = 1 / tl.sqrt(tl.maximum(base + change, EPS))
    both = scale * at_base
    return scale, -change * both * both / (scale + at_base)


@triton.jit
def norm_scales_backward(change, base, grad_scale, grad_difference, EPS: tl.constexpr):
    """Gradients of ``change`` and ``base`` from those of what ``scales`` gives."""
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
def uneven_attention(logits, even, F: tl.constexpr, H: tl.constexpr, LP: tl.constexpr, TERMS: tl.constexpr):
    """See ``factorized.uneven``; zero beyond the attention weights."""
    rows = tl.arange(0, LP)[:, None]
    result = tl.zeros_like(logits)
    for head in tl.static_range(H):
        here = (rows >= head * F) & (rows < head * F + F)
        highest = tl.max(tl.where(here, logits, float("-inf")), axis=0)[None, :]
        above = exp_minus_one(tl.where(here, logits - highest, 0.0), TERMS)
        mean = sum_of_rows(even * tl.where(here, above, 0.0))
        result = tl.where(here, (above - mean) * even / (1 + mean), result)
    return result


@triton.jit
def pooling_weights(products, share, TEMPERATURE: tl.constexpr):
    """See ``factorized.pooling_weights``."""
    logits = tl.where(share > 0, products / TEMPERATURE, float("-inf"))
    above = tl.exp(logits - tl.max(logits, axis=0)[None, :])
    return above / sum_of_rows(above)


@triton.jit
def load_rows(numbers, first, stride, count, texts, inside, ROWS: tl.constexpr):
    """Numbers of ``count`` rows for some texts (ROWS, BN), zero beyond."""
    rows = tl.arange(0, ROWS)[:, None]
    places = (first + rows * stride).to(tl.int64) + texts[None, :]
    return tl.load(numbers + places, mask=(rows < count) & inside[None, :], other=0.0)


@triton.jit
def logit_places(video, rows, texts, N, F: tl.constexpr, H: tl.constexpr):
    """Places of products of contexts with turned texts, (F, H, N) a video, for rows by head."""
    return ((video * F + rows % F).to(tl.int64) * H + rows // F) * N + texts[None, :]


@triton.jit
def query_gap(
    frame_products, share, numbers, mean, centred_square, WIDTH: tl.constexpr, NORM_EPS: tl.constexpr
):
    """LN1's scale of the query, and the squared length of the gap without its mean before rounding is cut."""
    own_mean, own_square = tl.load(numbers), tl.load(numbers + 1)
    shared = sum_of_rows(share * frame_products) - WIDTH * own_mean * mean
    square = own_square + centred_square - 2 * shared
    return 1 / tl.sqrt(tl.maximum(square, 0.0) / WIDTH + NORM_EPS), square


@triton.jit
def root(square, LEAST: tl.constexpr):
    """The square root of a number that is at least so large."""
    return tl.sqrt(tl.maximum(square, LEAST))


@triton.jit
def load_video(small, video, F: tl.constexpr, H: tl.constexpr, LP: tl.constexpr, FP: tl.constexpr):
    """The numbers of a video, in the order of ``fused.small_numbers``, and where those of the norms begin."""
    K: tl.constexpr = H * F
    L: tl.constexpr = K + 3
    numbers = small + video.to(tl.int64) * numbers_of_a_video(F, H)
    own, offset, even = (
        load_column(numbers, K, LP),
        load_column(numbers + K, K, LP),
        load_column(numbers + 2 * K, K, LP),
    )
    numbers += 3 * K
    share = load_column(numbers, F, FP)
    scalars = numbers + F
    numbers2 = scalars + 4
    numbers3 = numbers2 + K * K + K
    numbers = numbers3 + (K + 1) * (K + 1) + K + 1
    gram = load_matrix(numbers, L, L, LP, LP)
    frame_gram = load_matrix(numbers + L * L, F, F, FP, FP)
    by_frames = load_matrix(numbers + L * L + F * F, L, F, LP, FP)
    return own, offset, even, share, scalars, numbers2, numbers3, gram, frame_gram, by_frames


@triton.jit
def numbers_of_a_video(F: tl.constexpr, H: tl.constexpr):
    """How many numbers a video has."""
    K: tl.constexpr = H * F
    return 3 * K + F + 4 + K * K + K + (K + 1) * (K + 1) + K + 1 + (K + 3) * (K + 3) + (F + K + 3) * F


@triton.jit
def compute_pairs(
    products, asked, text_mean, text_centred, text_square, video, texts, inside, N,
    own, offset, even, share, scalars, numbers2, numbers3, gram, frame_gram, by_frames,
    WIDTH: tl.constexpr, TEMPERATURE: tl.constexpr, SIDE: tl.constexpr,
    F: tl.constexpr, H: tl.constexpr, LP: tl.constexpr, FP: tl.constexpr,
    PRECISION: tl.constexpr, TERMS: tl.constexpr, NORM_EPS: tl.constexpr,
):  # fmt: skip
    """All that is known of a video's pairs with some texts; what a kernel does not use is not computed."""
    K: tl.constexpr = H * F
    L: tl.constexpr = K + 3
    rows = tl.arange(0, LP)[:, None]
    square = tl.load(text_square + texts, mask=inside, other=1.0)[None, :]
    mean = tl.load(text_mean + texts, mask=inside, other=0.0)[None, :]
    centred = tl.load(text_centred + texts, mask=inside, other=1.0)[None, :]
    frame_products = load_rows(products, video * (F + L) * N, N, F, texts, inside, FP)
    delta_products = load_rows(products, (video * (F + L) + F) * N, N, L, texts, inside, LP)
    places = logit_places(video, rows, texts, N, F, H)
    logits = own + tl.load(asked + places, mask=(rows < K) & inside[None, :], other=0.0)
    scale1, gap_square = query_gap(frame_products, share, scalars, mean, centred, WIDTH, NORM_EPS)
    uneven = uneven_attention(logits * scale1 + offset, even, F, H, LP, TERMS)
    # The norms: LN2, then LN3.
    slope2 = load_column(numbers2 + K * K, K, LP)
    towards2 = multiply(load_matrix(numbers2, K, K, LP, LP), uneven, PRECISION) + slope2
    change2 = sum_of_rows(uneven * (towards2 + slope2))
    scale2, difference2 = norm_scales(change2, tl.load(scalars + 2), NORM_EPS)
    hidden = tl.where(rows == K, difference2, uneven * scale2)
    slope3 = load_column(numbers3 + (K + 1) * (K + 1), K + 1, LP)
    towards3 = multiply(load_matrix(numbers3, K + 1, K + 1, LP, LP), hidden, PRECISION) + slope3
    change3 = sum_of_rows(hidden * (towards3 + slope3))
    scale3, difference3 = norm_scales(change3, tl.load(scalars + 3), NORM_EPS)
    weights = tl.where(rows == K + 1, difference3, hidden * scale3)
    weights = tl.where(rows == K + 2, 1.0, weights)
    # Lengths and products.
    pooling = pooling_weights(frame_products, share, TEMPERATURE)
    text_pooled = sum_of_rows(pooling * frame_products)
    frames_pooled = multiply(frame_gram, pooling, PRECISION)
    pooled_square = sum_of_rows(pooling * frames_pooled)
    text_delta = sum_of_rows(weights * delta_products)
    gram_weights = multiply(gram, weights, PRECISION)
    delta_square = sum_of_rows(weights * gram_weights)
    basis_pooled = multiply(by_frames, pooling, PRECISION)
    delta_pooled = sum_of_rows(weights * basis_pooled)
    if SIDE == "text":
        text_length = square + 2 * text_delta + tl.maximum(delta_square, 0.0)
        video_length = tl.maximum(pooled_square, 0.0)
        dot = text_pooled + delta_pooled
    else:
        text_length = square
        video_length = tl.maximum(pooled_square, 0.0) + 2 * delta_pooled + tl.maximum(delta_square, 0.0)
        dot = text_pooled + text_delta
    return (
        frame_products, delta_products, logits, scale1, gap_square, uneven, change2, scale2, towards2,
        hidden, change3, scale3, towards3, weights, pooling, text_pooled, frames_pooled, pooled_square,
        gram_weights, delta_square, basis_pooled, square, text_length, video_length, dot,
    )  # fmt: skip
