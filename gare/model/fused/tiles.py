"""Triton functions on the tiles of the fused kernels: small matrices, norms, softmaxes, and whole pairs.

The vectors of a pair are columns of tiles: attention weights, by head, of (LP, BN), and values by frame of
(FP, BN). Sizes are those of ``kernels``. ``video`` is int64, so that memory offsets do not overflow.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp_minus_one(x, TERMS: tl.constexpr):
    """Computes exp(x) − 1, by its series where exp(x) is close to 1."""
    is_close = tl.abs(x) < 0.5
    close = tl.where(is_close, x, 0.0)
    series = tl.zeros_like(x) + 1
    for step in tl.static_range(TERMS):
        series = 1 + close * series / (TERMS + 1 - step)
    return tl.where(is_close, close * series, tl.exp(x) - 1)


@triton.jit
def multiply(a, b, PRECISION: tl.constexpr):
    """Computes A·B of two tiles; in float64, which only tests use, without tensor cores."""
    if PRECISION == "float64":
        product = tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit
def load_matrix(numbers, num_rows, num_columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Loads part of a matrix, whose rows are ``stride`` numbers apart, into a tile; zero beyond."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    return tl.load(numbers + rows * stride + columns, mask=inside, other=0.0)


@triton.jit
def load_column(numbers, count, ROWS: tl.constexpr):
    """Loads a small vector as a tile (ROWS, 1), zero beyond."""
    rows = tl.arange(0, ROWS)[:, None]
    return tl.load(numbers + rows, mask=rows < count, other=0.0)


@triton.jit
def store_matrix(numbers, tile, num_rows, num_columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Stores a tile as a part of a matrix whose rows are ``stride`` numbers apart."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    tl.store(numbers + rows * stride + columns, tile, mask=(rows < num_rows) & (columns < num_columns))


@triton.jit
def store_symmetric(numbers, inner, border, corner, count, more, stride, LP: tl.constexpr, EP: tl.constexpr):
    """Stores a symmetric matrix of ``count`` rows and ``more`` after them, from its three different parts."""
    store_matrix(numbers, inner, count, count, stride, LP, LP)
    store_matrix(numbers + count, border, count, more, stride, LP, EP)
    store_matrix(numbers + count * stride, tl.trans(border), more, count, stride, EP, LP)
    store_matrix(numbers + count * stride + count, corner, more, more, stride, EP, EP)


@triton.jit
def store_column(numbers, tile, count, ROWS: tl.constexpr):
    """Stores a tile (ROWS, 1) as a small vector."""
    rows = tl.arange(0, ROWS)[:, None]
    tl.store(numbers + rows, tile, mask=rows < count)


@triton.jit
def row_of(tile, index, ROWS: tl.constexpr):
    """Returns one row (1, BN) of a tile."""
    rows = tl.arange(0, ROWS)[:, None]
    return tl.sum(tl.where(rows == index, tile, 0.0), axis=0)[None, :]


@triton.jit
def three_rows(first, second, third, EP: tl.constexpr):
    """Builds a tile (EP, BN) of three rows, zero beyond."""
    rows = tl.arange(0, EP)[:, None]
    tile = tl.where(rows == 0, first, tl.where(rows == 1, second, third))
    return tl.where(rows < 3, tile, 0.0)


@triton.jit
def sum_of_rows(tile):
    """Sums over the rows, (1, BN)."""
    return tl.sum(tile, axis=0)[None, :]


@triton.jit
def norm_scales(change, base, EPS: tl.constexpr):
    """Computes ``quadratic_forms.Length.scales``."""
    at_base = 1 / tl.sqrt(base)
    scale = 1 / tl.sqrt(at_least(base + change, EPS))
    both = scale * at_base
    return scale, -change * both * both / (scale + at_base)


@triton.jit
def norm_scales_backward(change, base, grad_scale, grad_difference, EPS: tl.constexpr):
    """Computes gradients of ``change`` and ``base`` from those of the results of ``norm_scales``."""
    b = 1 / tl.sqrt(base)
    s = 1 / tl.sqrt(at_least(base + change, EPS))
    # The difference is −change·q, q = (sb)²/(s + b), ∂q/∂s = (sb)²(s + 2b)/(s(s + b)²).
    part = s * b / (s + b)
    grad_q = -grad_difference * change
    grad_s = grad_scale + grad_q * part * part * (s + 2 * b) / s
    grad_b = grad_q * part * part * (b + 2 * s) / b
    grad_sum = tl.where(base + change >= EPS, -0.5 * s * s * s * grad_s, 0.0)
    return grad_sum - grad_difference * part * s * b, grad_sum - 0.5 * b * b * b * grad_b


@triton.jit
def uneven_attention(logits, even, F: tl.constexpr, H: tl.constexpr, LP: tl.constexpr, TERMS: tl.constexpr):
    """Computes ``pairs._uneven`` of the factorised form; zero beyond the attention weights."""
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
    """Computes ``pairs.pooling_weights`` of the factorised form."""
    logits = tl.where(share > 0, products / TEMPERATURE, float("-inf"))
    above = tl.exp(logits - tl.max(logits, axis=0)[None, :])
    return above / sum_of_rows(above)


@triton.jit
def load_rows(numbers, first, stride, count, texts, inside, ROWS: tl.constexpr):
    """Loads ``count`` rows of numbers for some texts, (ROWS, BN), zero beyond."""
    rows = tl.arange(0, ROWS)[:, None]
    places = first + rows * stride + texts[None, :]
    return tl.load(numbers + places, mask=(rows < count) & inside[None, :], other=0.0)


@triton.jit
def logit_places(video, rows, texts, N, F: tl.constexpr, H: tl.constexpr):
    """Returns offsets of products of contexts with turned texts, (F, H, N) per video, for rows by head."""
    return ((video * F + rows % F) * H + rows // F) * N + texts[None, :]


@triton.jit
def query_gap(
    frame_products, share, numbers, mean, centred_square, WIDTH: tl.constexpr, NORM_EPS: tl.constexpr
):
    """Returns LN1's scale of the query, and the centred gap's squared length, not yet clamped at 0."""
    own_mean, own_square = tl.load(numbers), tl.load(numbers + 1)
    shared = sum_of_rows(share * frame_products) - WIDTH * own_mean * mean
    square = own_square + centred_square - 2 * shared
    return 1 / tl.sqrt(at_least(square, 0.0) / WIDTH + NORM_EPS), square


@triton.jit
def root(square, LEAST: tl.constexpr):
    """Returns the square root of a number, which is first clamped at ``LEAST``."""
    return tl.sqrt(at_least(square, LEAST))


@triton.jit
def at_least(x, LEAST: tl.constexpr):
    """Returns the larger of the two; NaN stays NaN, so that non-finite values are noticed."""
    return tl.where(x < LEAST, LEAST, x)


@triton.jit
def block_moments(values, texts, start, inside, count):
    """Returns the mean (…, 1) over the texts of a block, and the values minus it, zero beyond the texts.

    Computed relative to the first text: equal increments must leave no rounding error, since the σ of that
    error would have a huge gradient.
    """
    origin = tl.sum(tl.where(texts[None, :] == start, values, 0.0), axis=1)[:, None]
    apart = tl.where(inside[None, :], values - origin, 0.0)
    shift = tl.sum(apart, axis=1)[:, None] / count
    return origin + shift, tl.where(inside[None, :], apart - shift, 0.0)


@triton.jit
def numbers_of_a_video(F: tl.constexpr, H: tl.constexpr):
    """Counts a video's numbers, in the order of ``blocks.small_numbers``."""
    K: tl.constexpr = H * F
    return 3 * K + F + 4 + K * K + K + (K + 1) * (K + 1) + K + 1 + (K + 3) * (K + 3) + (F + K + 3) * F


@triton.jit
def compute_pairs(
    products, asked, small, text_mean, text_centred, text_square, video, texts, inside, N,
    WIDTH: tl.constexpr, TEMPERATURE: tl.constexpr, SIDE: tl.constexpr,
    F: tl.constexpr, H: tl.constexpr, LP: tl.constexpr, FP: tl.constexpr,
    PRECISION: tl.constexpr, TERMS: tl.constexpr, NORM_EPS: tl.constexpr,
):  # fmt: skip
    """Computes all numbers of a video's pairs with some texts; those that a kernel does not use cost nothing.

    Tiles have the K attention weights as rows. The values for LN2's scale, LN3's scale and even attention are
    single rows beside them.
    """
    K: tl.constexpr = H * F
    L: tl.constexpr = K + 3
    rows = tl.arange(0, LP)[:, None]
    numbers = small + video * numbers_of_a_video(F, H)
    own, offset = load_column(numbers, K, LP), load_column(numbers + K, K, LP)
    even = load_column(numbers + 2 * K, K, LP)
    share = load_column(numbers + 3 * K, F, FP)
    scalars = numbers + 3 * K + F
    square = tl.load(text_square + texts, mask=inside, other=1.0)[None, :]
    mean = tl.load(text_mean + texts, mask=inside, other=0.0)[None, :]
    centred = tl.load(text_centred + texts, mask=inside, other=1.0)[None, :]
    first = video * (F + L) * N
    frame_products = load_rows(products, first, N, F, texts, inside, FP)
    delta_products = load_rows(products, first + F * N, N, K, texts, inside, LP)
    second_product = load_rows(products, first + (F + K) * N, N, 1, texts, inside, 1)
    third_product = load_rows(products, first + (F + K + 1) * N, N, 1, texts, inside, 1)
    even_product = load_rows(products, first + (F + K + 2) * N, N, 1, texts, inside, 1)
    places = logit_places(video, rows, texts, N, F, H)
    logits = own + tl.load(asked + places, mask=(rows < K) & inside[None, :], other=0.0)
    scale1, gap_square = query_gap(frame_products, share, scalars, mean, centred, WIDTH, NORM_EPS)
    uneven = uneven_attention(logits * scale1 + offset, even, F, H, LP, TERMS)
    # LN2.
    numbers = scalars + 4
    slope = load_column(numbers + K * K, K, LP)
    towards2 = multiply(load_matrix(numbers, K, K, K, LP, LP), uneven, PRECISION) + slope
    change2 = sum_of_rows(uneven * (towards2 + slope))
    scale2, change_of_scale2 = norm_scales(change2, tl.load(scalars + 2), NORM_EPS)
    hidden = uneven * scale2
    # LN3, whose Gram matrix has one more row.
    numbers += K * K + K
    border = load_column(numbers + K * (K + 1), K, LP)
    corner = tl.load(numbers + K * (K + 1) + K)
    slopes = numbers + (K + 1) * (K + 1)
    slope, last_slope = load_column(slopes, K, LP), tl.load(slopes + K)
    towards3 = multiply(load_matrix(numbers, K, K, K + 1, LP, LP), hidden, PRECISION)
    towards3 += border * change_of_scale2 + slope
    last_towards3 = sum_of_rows(border * hidden) + corner * change_of_scale2 + last_slope
    change3 = sum_of_rows(hidden * (towards3 + slope)) + change_of_scale2 * (last_towards3 + last_slope)
    scale3, third = norm_scales(change3, tl.load(scalars + 3), NORM_EPS)
    weights, second = hidden * scale3, change_of_scale2 * scale3
    # The increment: its length, and products with the text and the pooled video.
    numbers = slopes + K + 1
    with_second = load_column(numbers + K * L, K, LP)
    with_third = load_column(numbers + (K + 1) * L, K, LP)
    with_even = load_column(numbers + (K + 2) * L, K, LP)
    corner = numbers + K * L + K
    gram_weights = multiply(load_matrix(numbers, K, K, L, LP, LP), weights, PRECISION)
    gram_weights += with_second * second + with_third * third + with_even
    gram_second = sum_of_rows(with_second * weights)
    gram_second += tl.load(corner) * second + tl.load(corner + 1) * third + tl.load(corner + 2)
    gram_third = sum_of_rows(with_third * weights)
    gram_third += tl.load(corner + L) * second + tl.load(corner + L + 1) * third + tl.load(corner + L + 2)
    gram_even = sum_of_rows(with_even * weights)
    corner += 2 * L
    gram_even += tl.load(corner) * second + tl.load(corner + 1) * third + tl.load(corner + 2)
    delta_square = sum_of_rows(weights * gram_weights) + second * gram_second + third * gram_third + gram_even
    text_delta = sum_of_rows(weights * delta_products)
    text_delta += second * second_product + third * third_product + even_product
    pooling = pooling_weights(frame_products, share, TEMPERATURE)
    text_pooled = sum_of_rows(pooling * frame_products)
    numbers += L * L
    frames_pooled = multiply(load_matrix(numbers, F, F, F, FP, FP), pooling, PRECISION)
    pooled_square = sum_of_rows(pooling * frames_pooled)
    numbers += F * F
    basis_pooled = multiply(load_matrix(numbers, K, F, F, LP, FP), pooling, PRECISION)
    numbers += K * F
    second_pooled = sum_of_rows(load_column(numbers, F, FP) * pooling)
    third_pooled = sum_of_rows(load_column(numbers + F, F, FP) * pooling)
    even_pooled = sum_of_rows(load_column(numbers + 2 * F, F, FP) * pooling)
    delta_pooled = sum_of_rows(weights * basis_pooled) + second * second_pooled
    delta_pooled += third * third_pooled + even_pooled
    if SIDE == "text":
        text_length = square + 2 * text_delta + at_least(delta_square, 0.0)
        video_length = at_least(pooled_square, 0.0)
        dot = text_pooled + delta_pooled
    else:
        text_length = square
        video_length = at_least(pooled_square, 0.0) + 2 * delta_pooled + at_least(delta_square, 0.0)
        dot = text_pooled + text_delta
    lengths = (square, text_length, video_length, dot, text_pooled, pooled_square, delta_square)
    attention = (logits, scale1, gap_square, uneven, even, pooling, share)
    norms = (change2, scale2, towards2, hidden, change_of_scale2, change3, scale3, towards3, last_towards3)
    increment = (weights, second, third, gram_weights, gram_second, gram_third)
    with_text = (frame_products, delta_products, second_product, third_product)
    with_pooled = (frames_pooled, basis_pooled, second_pooled, third_pooled)
    return lengths, attention, norms, increment, with_text, with_pooled
