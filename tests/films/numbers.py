"""Numbers as pictures: black and white blocks that lossy coding does not blur into other numbers."""

from __future__ import annotations

import itertools
from typing import cast

import numpy as np
from numpy.typing import NDArray

#: Blocks along each side: 10 bits of the number and 15 check bits.
SIDE = 5
_NUM_BITS, _CHECK_BITS = 10, 15
#: Numbers must be below this.
LIMIT = 1 << _NUM_BITS
#: Luma below which a block is black and above which it is white; between them it is unreadable.
_BLACK, _WHITE = 100, 156


def _bits(number: int) -> NDArray[np.bool_]:
    check = (number * 0x9E3779B1 >> 9) % (1 << _CHECK_BITS) ^ 0x2B5A
    code = number << _CHECK_BITS | check
    return np.array([code >> place & 1 for place in range(SIDE * SIDE)], dtype=np.bool_)


def draw(number: int, width: int, height: int) -> NDArray[np.uint8]:
    """Draws a number into the central square of a grey picture.

    Args:
        number: from 0, below ``LIMIT``.
        width: pixels.
        height: pixels.

    Returns:
        Grey RGB picture (height, width, 3).
    """
    size = min(width, height)
    where = np.arange(size) * SIDE // size
    square = np.where(_bits(number).reshape(SIDE, SIDE), 224, 32)[where][:, where]
    grey = np.full((height, width), 96, np.uint8)
    top, left = (height - size) // 2, (width - size) // 2
    grey[top : top + size, left : left + size] = square
    return np.repeat(grey[:, :, None], 3, axis=2)


def read(rgb: NDArray[np.uint8]) -> int | None:
    """Reads the number from the central square of a picture (H, W, 3); None if it shows none."""
    size = min(rgb.shape[:2])
    top, left = (rgb.shape[0] - size) // 2, (rgb.shape[1] - size) // 2
    luma = rgb[top : top + size, left : left + size].mean(axis=2)
    edges = np.arange(SIDE + 1) * size / SIDE
    rim = size / SIDE / 4  # neighbouring blocks bleed into a block's edges
    inner = [slice(int(low + rim), int(high - rim) + 1) for low, high in itertools.pairwise(edges)]
    blocks = np.array([luma[rows, columns].mean() for rows in inner for columns in inner])
    if ((blocks >= _BLACK) & (blocks <= _WHITE)).any():
        return None
    seen = blocks > _WHITE
    number = int(sum(int(bit) << place for place, bit in enumerate(seen))) >> _CHECK_BITS
    return number if cast(bool, (seen == _bits(number)).all()) else None
