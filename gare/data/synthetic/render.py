"""Rendering of scenes: anti-aliased shapes from signed distances, each drawn only inside its bounding box."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from gare.data.synthetic.scene import BACKGROUND_COLORS, OBJECT_COLORS, Scene, SceneObject

Floats = npt.NDArray[np.float32]
Frame = npt.NDArray[np.uint8]


def render_frame(scene: Scene, time_s: float) -> Frame:
    """Draws the scene as it is at a time.

    Returns:
        (height, width, 3) uint8, RGB.
    """
    canvas = _background(scene).copy()
    side = min(scene.width, scene.height)
    left, top = (scene.width - side) / 2, (scene.height - side) / 2
    states = [(thing, *thing.state(time_s)) for thing in scene.objects]
    # Small objects last: a large shape that passes must not hide them.
    for thing, x, y, radius, opacity in sorted(states, key=lambda state: -state[3]):
        if opacity > 0:
            _draw(canvas, thing, left + x * side, top + y * side, radius * side, opacity)
    return canvas


@lru_cache(maxsize=2)
def _background(scene: Scene) -> Frame:
    """Returns (height, width, 3): the named colour with a texture that leaves it recognisable."""
    rng = np.random.default_rng(scene.texture_seed)
    height, width = scene.height, scene.width
    shade: Floats = np.zeros((height, width), np.float32)
    if scene.texture == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        shade = (14 * (math.cos(angle) * x + math.sin(angle) * y)).astype(np.float32)
    elif scene.texture == "clouds":
        coarse = rng.normal(0, 9, (7, 7))
        shade = _stretch(coarse, height, width)
    elif scene.texture == "grain":
        shade = rng.normal(0, 5, (height, width)).astype(np.float32)
    base = np.asarray(BACKGROUND_COLORS[scene.background], np.float32) + rng.uniform(-5, 5, 3)
    return np.clip(base + shade[..., None], 0, 255).astype(np.uint8)


def _stretch(coarse: npt.NDArray[np.float64], height: int, width: int) -> Floats:
    """Enlarges a small square grid to (height, width), bilinearly."""
    last = coarse.shape[0] - 1
    rows, columns = np.linspace(0, last, height), np.linspace(0, last, width)
    grid = np.arange(last + 1)
    wide = np.stack([np.interp(columns, grid, line) for line in coarse])
    return np.stack([np.interp(rows, grid, line) for line in wide.T], axis=1).astype(np.float32)


def _draw(canvas: Frame, thing: SceneObject, x: float, y: float, radius: float, opacity: float) -> None:
    """Blends one object into the canvas; x, y and radius in pixels."""
    reach = radius * 1.25 + 2
    height, width = canvas.shape[:2]
    x_from, x_to = max(int(x - reach), 0), min(int(x + reach) + 1, width)
    y_from, y_to = max(int(y - reach), 0), min(int(y + reach) + 1, height)
    cover = _cover(thing.shape, thing.tilt, radius, (x_from - x, x_to - x_from), (y_from - y, y_to - y_from))
    if opacity < 1:
        cover = cover * np.float32(opacity)
    # Channel by channel: numpy is several times slower on rows of three.
    for channel, value in enumerate(OBJECT_COLORS[thing.color]):
        box = canvas[y_from:y_to, x_from:x_to, channel]
        box[...] = box + cover * (np.float32(value * thing.tint) - box) + np.float32(0.5)


# Many objects rest for a part of the video; their shape is then computed once.
@lru_cache(maxsize=8)
def _cover(
    shape: str, tilt: float, radius: float, columns: tuple[float, int], rows: tuple[float, int]
) -> Floats:
    """Returns the share of each pixel of a box that a shape covers, in [0, 1].

    Args:
        shape: one of SHAPES.
        tilt: rotation, radians.
        radius: pixels.
        columns: (left edge of the box relative to the centre of the shape, width), pixels.
        rows: (upper edge of the box relative to the centre of the shape, height), pixels.
    """
    across = np.arange(columns[1], dtype=np.float32) + np.float32(columns[0] + 0.5)
    down = (np.arange(rows[1], dtype=np.float32) + np.float32(rows[0] + 0.5))[:, None]
    cosine, sine = np.float32(math.cos(tilt)), np.float32(math.sin(tilt))
    distance = _DISTANCES[shape](across * cosine + down * sine, down * cosine - across * sine, radius)
    return np.asarray(np.clip(np.float32(0.5) - distance, 0, 1), np.float32)


# Signed distances in pixels, negative inside, exact near the edge, which is all that anti-aliasing needs.


def _circle(x: Floats, y: Floats, radius: float) -> Floats:
    return np.sqrt(x * x + y * y) - np.float32(0.95 * radius)


def _square(x: Floats, y: Floats, radius: float) -> Floats:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.85 * radius)


def _triangle(x: Floats, y: Floats, radius: float) -> Floats:
    # Equilateral, apex up, lowered so that its centroid is at the centre.
    slope = np.float32(math.sqrt(3) / 2)
    return np.maximum(np.abs(x) * slope - y * np.float32(0.5), y) - np.float32(0.56 * radius)


def _star(x: Floats, y: Floats, radius: float) -> Floats:
    # Fold the plane into half a point: an outer corner at angle 0, an inner one at 36 degrees.
    sector = math.pi / 5
    angle = np.arctan2(x, -y)
    angle = np.abs(np.mod(angle + np.float32(sector), np.float32(2 * sector)) - np.float32(sector))
    length = np.sqrt(x * x + y * y)
    outer, inner = 1.1 * radius, 0.5 * radius
    edge_x, edge_y = inner * math.cos(sector) - outer, inner * math.sin(sector)
    norm = math.hypot(edge_x, edge_y)
    along, away = length * np.cos(angle) - np.float32(outer), length * np.sin(angle)
    return np.asarray(along * np.float32(edge_y / norm) - away * np.float32(edge_x / norm), np.float32)


def _ring(x: Floats, y: Floats, radius: float) -> Floats:
    return np.asarray(
        np.abs(np.sqrt(x * x + y * y) - np.float32(0.73 * radius)) - np.float32(0.24 * radius), np.float32
    )


def _cross(x: Floats, y: Floats, radius: float) -> Floats:
    x, y = np.abs(x), np.abs(y)
    long, short = np.float32(radius), np.float32(0.34 * radius)
    return np.asarray(
        np.minimum(np.maximum(x - long, y - short), np.maximum(x - short, y - long)), np.float32
    )


_DISTANCES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
