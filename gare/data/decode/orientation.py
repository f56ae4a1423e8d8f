"""Turning stored pictures upright, according to their display matrices."""

from __future__ import annotations

from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray


class Orientation(NamedTuple):
    """A rotation or mirroring that makes stored pictures upright: transpose first, then the flips."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    def apply(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Returns the upright picture, (H, W, 3), contiguous."""
        if self.transpose:
            rgb = rgb.transpose(1, 0, 2)
        return np.ascontiguousarray(rgb[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1])


#: Orientations by rotation, in quarter turns counterclockwise.
_QUARTER_TURNS = (
    Orientation(),
    Orientation(transpose=True, flip_y=True),
    Orientation(flip_x=True, flip_y=True),
    Orientation(transpose=True, flip_x=True),
)


def orientation_of(frame: av.VideoFrame) -> Orientation | None:
    """Reads the orientation that makes a picture upright; None if it states none."""
    try:
        side_data = list(getattr(frame, "side_data", ()))
    except ValueError:  # PyAV does not know all kinds of side data: EXIF of photos, views of spatial videos
        return _QUARTER_TURNS[round(frame.rotation / 90) % 4]
    for item in side_data:
        if item.type.name == "DISPLAYMATRIX":
            return _orientation(np.frombuffer(bytes(item), dtype="<i4"))
    return None


def _orientation(matrix: NDArray[np.int32]) -> Orientation:
    """Rounds a matrix to the nearest right angle, mirrored or not: x' = a·x + c·y, y' = b·x + d·y."""
    a, b, c, d = (int(matrix[place]) for place in (0, 1, 3, 4))
    if abs(a) >= abs(b):
        return Orientation(False, a < 0, d < 0)
    return Orientation(True, c < 0, b < 0)
