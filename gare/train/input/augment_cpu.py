"""RandAugment of one clip on one core, with OpenCV: for the processes that load clips.

F frames, H×W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gare.config import AugmentConfig
from gare.train.input.randaugment import FILL, SLACK, draw_operations, steps_of

#: Weights of Pillow's grey, and one half for rounding; all sums are exact in float32.
_GREY = np.array([[19595, 38470, 7471, 32768]] * 3) / 65536

#: Pillow's SMOOTH filter; it copies the pixels at the border.
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13

#: Warps work on 16 bits, in OpenCV 5 faster than 8: grey levels in steps of 1/64, so that they are rounded
#: only once, with room for the kernel's overshoot on both sides.
_FINE, _FINE_ZERO = 64, 2**14

#: Added before OpenCV rounds, so that it truncates.
_TRUNCATE = SLACK - 0.5

Clip = NDArray[np.uint8]


def augment_clip(frames: Clip, config: AugmentConfig, seed: int) -> Clip:
    """Changes a clip by its seed: random crop, mirror, then RandAugment, all frames alike.

    Tone is exactly Pillow's. Warps interpolate with Pillow's cubic kernel, except for a small term, see
    ``_smoothed``.

    Args:
        frames: (F, H, W, 3) uint8; left as they are.
        config: which changes to make; the default makes none.
        seed: of the clip.

    Returns:
        (F, H, W, 3) uint8; ``frames`` itself if the seed draws no change.
    """
    for step in steps_of(draw_operations(config, seed), *frames.shape[1:3]):
        frames = _PASSES[step.kind](np.ascontiguousarray(frames), step.argument)
    return frames


@cache
def _opencv() -> Any:
    import cv2  # here, because configuration and plans are read without cv2

    # A loader has one core; OpenCV would use all of them.
    cv2.setNumThreads(1)
    return cv2


def _mirror(frames: Clip, _: NDArray[Any]) -> Clip:
    out = np.empty_like(frames)
    _opencv().flip(_rows(frames), 1, dst=_rows(out))
    return out


def _rows(frames: Clip) -> Clip:
    """Views all rows of a clip as one picture (F·H, W, 3)."""
    return frames.reshape(-1, *frames.shape[2:])


# --- tone ---


def _table(frames: Clip, table: NDArray[Any]) -> Clip:
    out = np.empty_like(frames)
    _opencv().LUT(frames.reshape(len(frames), -1), table, dst=out.reshape(len(frames), -1))
    return out


def _apply_tables(frames: Clip, tables: NDArray[Any]) -> Clip:
    """Replaces values by tables (F, 3, 256), or (F, 1, 256) for all channels alike."""
    cv2 = _opencv()
    out = np.empty_like(frames)
    tables = np.ascontiguousarray(tables.astype(np.uint8).swapaxes(1, 2))
    for frame, table, target in zip(frames, tables, out, strict=True):
        cv2.LUT(frame, table[None], dst=target)
    return out


def _histograms(frames: Clip) -> NDArray[np.int64]:
    """Counts the pixels of each value, (F, 3, 256)."""
    cv2 = _opencv()
    return np.array(
        [
            [cv2.calcHist([frame], [channel], None, [256], [0, 256]).ravel() for channel in range(3)]
            for frame in frames
        ]
    ).astype(np.int64)


def _autocontrast(frames: Clip, _: NDArray[Any]) -> Clip:
    present = _histograms(frames) > 0
    low = present.argmax(axis=-1, keepdims=True)
    high = 255 - present[..., ::-1].argmax(axis=-1, keepdims=True)
    scale = 255.0 / np.maximum(high - low, 1)
    values = np.arange(256)
    stretched = np.clip(values * scale + -low * scale, 0, 255)
    return _apply_tables(frames, np.where(high > low, stretched, values))


def _equalize(frames: Clip, _: NDArray[Any]) -> Clip:
    counts = _histograms(frames)
    last = 255 - (counts[..., ::-1] > 0).argmax(axis=-1, keepdims=True)
    step = (counts.sum(axis=-1, keepdims=True) - np.take_along_axis(counts, last, axis=-1)) // 255
    below = np.cumsum(counts, axis=-1) - counts
    spread = np.minimum((step // 2 + below) // np.maximum(step, 1), 255)
    return _apply_tables(frames, np.where(step > 0, spread, np.arange(256)))


def _contrast(frames: Clip, factor: NDArray[Any]) -> Clip:
    num = frames.shape[1] * frames.shape[2]
    totals = np.array(
        [int(_grey(frame.astype(np.float32))[..., 0].sum(dtype=np.float64)) for frame in frames]
    )
    means = ((2 * totals + num) // (2 * num)).astype(np.float32)[:, None, None]
    values = np.arange(256, dtype=np.float32)
    return _apply_tables(frames, np.clip(means + factor * (values - means), 0, 255))


def _grey(frame: NDArray[np.float32]) -> NDArray[np.float32]:
    """Computes Pillow's grey of a frame, in all three channels; whole numbers."""
    grey: NDArray[np.float32] = _opencv().transform(frame, _GREY)
    return np.floor(grey, out=grey)


def _colour(frames: Clip, factor: NDArray[Any]) -> Clip:
    out = np.empty_like(frames)
    for frame, target in zip(frames, out, strict=True):
        values = frame.astype(np.float32)
        _blend(_grey(values), values, factor, target)
    return out


def _sharpness(frames: Clip, factor: NDArray[Any]) -> Clip:
    cv2 = _opencv()
    out = np.empty_like(frames)
    for frame, target in zip(frames, out, strict=True):
        smooth = cv2.filter2D(frame, -1, _SMOOTH).astype(np.float32)
        _blend(smooth, frame.astype(np.float32), factor, target)
        for border in (np.s_[:: max(len(frame) - 1, 1)], np.s_[:, :: max(frame.shape[1] - 1, 1)]):
            target[border] = frame[border]
    return out


def _blend(
    base: NDArray[np.float32], values: NDArray[np.float32], factor: NDArray[Any], target: Clip
) -> None:
    """Does Pillow's Image.blend: base + factor · (values − base), truncated. Overwrites ``values``."""
    values -= base
    values *= factor
    values += base
    np.clip(values, 0, 255, out=values)
    np.copyto(target, values, casting="unsafe")


# --- geometry ---


def _warp(frames: Clip, path: NDArray[Any]) -> Clip:
    if _along_rows(path):
        return _shift_rows(frames, path[:, 0])
    if _along_rows(path[:, ::-1, [1, 0, 2]]):
        return _transposed(_shift_rows(_transposed(frames), path[:, 1, [1, 0, 2]]))
    cv2 = _opencv()
    height, width = frames.shape[1:3]
    x, y = np.arange(width) + 0.5, (np.arange(height) + 0.5)[:, None]
    outside = np.zeros((height, width), dtype=bool)
    for (xx, xy, x0), (yx, yy, y0) in path:
        source_x, source_y = xx * x + xy * y + x0, yx * x + yy * y + y0
        outside |= (source_x < 0) | (source_x >= width) | (source_y < 0) | (source_y >= height)
    # OpenCV's centre of the first pixel is (0, 0).
    matrix = path[-1].copy()
    matrix[:, 2] += matrix[:, :2].sum(axis=1) / 2 - 0.5
    smooth_x, smooth_y = _smoothed(source_x - 0.5), _smoothed(source_y - 0.5)
    size, border = (width, height), cv2.BORDER_REPLICATE
    fill, mask = np.full_like(frames[0], FILL), outside.astype(np.uint8)
    fine, cubic, linear = (np.empty(fill.shape, dtype=np.uint16) for _ in range(3))
    out = np.empty_like(frames)
    for frame, target in zip(frames, out, strict=True):
        np.multiply(frame, _FINE, out=fine, dtype=np.uint16)
        fine += _FINE_ZERO
        cv2.warpAffine(fine, matrix, size, cubic, cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP, border)
        cv2.remap(fine, smooth_x, smooth_y, cv2.INTER_LINEAR, linear, border)
        zero = _TRUNCATE - _FINE_ZERO / _FINE
        cv2.addWeighted(cubic, 4 / 3 / _FINE, linear, -1 / 3 / _FINE, zero, target, cv2.CV_8U)
        cv2.copyTo(fill, mask, target)
    return out


def _smoothed(coordinates: NDArray[np.float64]) -> NDArray[np.float32]:
    """Moves coordinates so that linear interpolation there equals the cubic kernel with a = 0.

    OpenCV's cubic has a = −0.75 and Pillow's a = −1. The kernel is linear in a, and with a = 0 it is linear
    interpolation whose fraction t is replaced by 3t² − 2t³; so k(−1) = 4/3·k(−0.75) − 1/3·k(0) along one
    axis. Along both, 4/9 of the product of the axes' differences k(−0.75) − k(0) is left out, weights of up
    to 0.005.
    """
    below = np.floor(coordinates)
    t = coordinates - below
    return (below + t * t * (3 - 2 * t)).astype(np.float32)


def _along_rows(path: NDArray[Any]) -> bool:
    """True if all maps move pixels along their rows and do not stretch."""
    return bool((path[:, 0, 0] == 1).all() and (path[:, 1] == (0, 1, 0)).all())


def _transposed(frames: Clip) -> Clip:
    num, height, width = frames.shape[:3]
    out = np.empty((num, width, height, 3), dtype=np.uint8)
    for frame, target in zip(frames, out, strict=True):
        _opencv().transpose(frame, dst=target)
    return out


def _shift_rows(frames: Clip, path: NDArray[Any]) -> Clip:
    """Moves each row by its own distance: one filter of five values per row, the same for all frames.

    Args:
        frames: (F, H, W, 3).
        path: (K, 3), the first rows of the maps.
    """
    cv2 = _opencv()
    num, height, width = frames.shape[:3]
    shifts = path[:, 1:2] * (np.arange(height) + 0.5) + path[:, 2:]
    # Whole pixels, and a remainder in [−0.5, 0.5).
    whole = np.floor(shifts + 0.5).astype(int)
    first, last = np.maximum(-whole.min(axis=0), 0), np.minimum(width - whole.max(axis=0), width)
    weights = _cubic(np.arange(-2, 3) - (shifts[-1] - whole[-1])[:, None]).astype(np.float32)
    out = np.full_like(frames, FILL)
    rows, border = np.empty((num, width, 3), dtype=np.uint8), cv2.BORDER_REPLICATE
    for y in range(height):
        start, stop, shift = first[y], last[y], whole[-1, y]
        if start < stop:
            cv2.filter2D(frames[:, y], -1, weights[y : y + 1], rows, (-1, -1), _TRUNCATE, border)
            out[:, y, start:stop] = rows[:, start + shift : stop + shift]
    return out


def _cubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Computes Pillow's cubic kernel, a = −1, at distances in pixels."""
    x = np.abs(distance)
    return np.where(x <= 1, (x - 2) * x * x + 1, np.where(x < 2, ((5 - x) * x - 8) * x + 4, 0))


_PASSES: dict[str, Callable[[Clip, NDArray[Any]], Clip]] = {
    "mirror": _mirror,
    "warp": _warp,
    "table": _table,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "contrast": _contrast,
    "colour": _colour,
    "sharpness": _sharpness,
}
