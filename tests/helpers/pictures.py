"""Measurements of a picture: its pixels, and how many of them have a colour."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor


def pixels_of(png: bytes) -> npt.NDArray[np.uint8]:
    """Returns the pixels (H, W, 3) of a picture."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def count_colour(pixels: npt.NDArray[np.uint8], colour: str | tuple[int, ...]) -> int:
    """Returns how many pixels have exactly this colour, given as (R, G, B) or #rrggbb."""
    rgb = ImageColor.getrgb(colour) if isinstance(colour, str) else colour
    return int((pixels == np.array(rgb[:3])).all(axis=-1).sum())
