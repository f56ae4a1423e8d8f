"""Scenes of generated videos: objects with their appearance and motion, as numbers.

Positions and radii are fractions of the side of the centre square of the frame (side: the short side of
the frame), x to the right and y downwards, so that everything named in a caption survives a centre crop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

#: Object colours, well apart from each other (sRGB).
OBJECT_COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 28, 32),
    "orange": (255, 138, 0),
    "yellow": (250, 228, 28),
    "green": (34, 184, 52),
    "blue": (36, 84, 240),
    "purple": (138, 36, 190),
    "pink": (255, 128, 196),
    "white": (250, 250, 250),
}

#: Background colours (sRGB).
BACKGROUND_COLORS: dict[str, tuple[int, int, int]] = {
    "black": (14, 14, 14),
    "gray": (128, 128, 128),
    "brown": (112, 66, 30),
    "navy": (12, 20, 92),
    "beige": (236, 218, 172),
    "teal": (0, 112, 116),
    "lavender": (196, 176, 240),
}

#: Object colours that a person could miss on a background.
CLASHES: dict[str, frozenset[str]] = {
    "navy": frozenset({"blue", "purple"}),
    "beige": frozenset({"white", "yellow"}),
    "teal": frozenset({"green"}),
    "lavender": frozenset({"pink", "purple", "white"}),
    "brown": frozenset({"red"}),
}

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
MOVES = ("left", "right", "up", "down", "orbit", "grow", "shrink")
MOTIONS = (*MOVES, "still")
TEXTURES = ("plain", "gradient", "clouds", "grain")

#: (width, height) in pixels: landscape, square and portrait, all even as yuv420p needs.
FRAME_SIZES = (
    (96, 72),
    (128, 96),
    (160, 120),
    (128, 72),
    (160, 90),
    (96, 96),
    (112, 112),
    (72, 96),
    (96, 128),
    (90, 120),
)
FRAME_RATES = (10, 12, 15, 20, 24, 25, 30)
SHORTEST_S, LONGEST_S = 2.0, 6.0

_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_FADE_S = 0.2
_PLACEMENT_TRIES = 24


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape and its motion.

    Attributes:
        color: key of OBJECT_COLORS.
        shape: one of SHAPES.
        size: "small", "large", or "changing" if the motion is "grow" or "shrink".
        motion: one of MOTIONS.
        start_xy: centre before the motion, or of the loop if the motion is "orbit".
        end_xy: centre after the motion.
        start_radius: half the extent before the motion.
        end_radius: half the extent after the motion.
        visible_s: (from, to) in seconds in which the object is visible.
        active_s: (from, to) in seconds of its motion.
        orbit: (radius, phase in radians, signed turns) of the loop; unused by other motions.
        tilt: rotation of the shape, radians.
        tint: brightness factor on the named colour, near 1.
    """

    color: str
    shape: str
    size: str
    motion: str
    start_xy: tuple[float, float]
    end_xy: tuple[float, float]
    start_radius: float
    end_radius: float
    visible_s: tuple[float, float]
    active_s: tuple[float, float]
    orbit: tuple[float, float, float] = (0.0, 0.0, 0.0)
    tilt: float = 0.0
    tint: float = 1.0

    def state(self, time_s: float) -> tuple[float, float, float, float]:
        """Returns the object at a time: (x, y, radius, opacity), opacity in [0, 1]."""
        begin, end = self.active_s
        done = min(max((time_s - begin) / (end - begin), 0.0), 1.0)
        x = self.start_xy[0] + done * (self.end_xy[0] - self.start_xy[0])
        y = self.start_xy[1] + done * (self.end_xy[1] - self.start_xy[1])
        if self.motion == "orbit":
            loop_radius, phase, turns = self.orbit
            angle = phase + 2 * math.pi * turns * done
            x += loop_radius * math.cos(angle)
            y += loop_radius * math.sin(angle)
        radius = self.start_radius + done * (self.end_radius - self.start_radius)
        seen_from, seen_to = self.visible_s
        opacity = 1.0
        if seen_from > 0:
            opacity = min(max((time_s - seen_from) / _FADE_S, 0.0), 1.0)
        if time_s > seen_to - _FADE_S and math.isfinite(seen_to):
            opacity = min(opacity, max((seen_to - time_s) / _FADE_S, 0.0))
        return x, y, radius, opacity


@dataclass(frozen=True)
class Scene:
    """The description of a whole video before it is rendered.

    Attributes:
        width: pixels, even.
        height: pixels, even.
        fps: frames per second.
        num_frames: frames in the video; it lasts num_frames / fps seconds.
        background: key of BACKGROUND_COLORS.
        texture: one of TEXTURES.
        texture_seed: seed of the texture.
        objects: one to three, all of different colours.
    """

    width: int
    height: int
    fps: int
    num_frames: int
    background: str
    texture: str
    texture_seed: int
    objects: tuple[SceneObject, ...]

    @property
    def duration_s(self) -> float:
        """Length of the video in seconds."""
        return self.num_frames / self.fps


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draws a scene; the same generator state gives the same scene."""
    width, height = FRAME_SIZES[int(rng.integers(len(FRAME_SIZES)))]
    fps = int(rng.choice(FRAME_RATES))
    # One frame of slack at both ends keeps every duration inside the promised range after rounding.
    num_frames = round(rng.uniform(SHORTEST_S + 0.1, LONGEST_S - 0.1) * fps)
    background = _pick(rng, tuple(BACKGROUND_COLORS))
    num_objects = int(rng.choice((1, 2, 3), p=(0.1, 0.75, 0.15)))
    staging = str(rng.choice(("together", "turns", "arrives", "leaves"), p=(0.4, 0.25, 0.2, 0.15)))
    colors = [c for c in OBJECT_COLORS if c not in CLASHES.get(background, ())]
    colors = [str(c) for c in rng.permutation(colors)[:num_objects]]
    timing = _draw_timing(rng, staging if num_objects == 2 else "together", num_frames / fps, num_objects)
    looks = [_draw_look(rng, color, num_objects, staging) for color in colors]
    looks = [
        replace(look, visible_s=seen, active_s=active)
        for look, (seen, active) in zip(looks, timing, strict=True)
    ]
    return Scene(
        width=width,
        height=height,
        fps=fps,
        num_frames=num_frames,
        background=background,
        texture=_pick(rng, TEXTURES),
        texture_seed=int(rng.integers(2**31)),
        objects=_place(rng, looks, num_frames / fps),
    )


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


_Span = tuple[float, float]


def _draw_timing(
    rng: np.random.Generator, staging: str, duration_s: float, num_objects: int
) -> list[tuple[_Span, _Span]]:
    """Draws (visible, active) spans in seconds of each object; the first object's event comes first."""
    always = (0.0, math.inf)
    whole = (0.0, duration_s)
    cut_s = float(rng.uniform(0.4, 0.55)) * duration_s
    if staging == "turns":
        return [(always, (0.0, cut_s * 0.95)), (always, (cut_s, duration_s))]
    if staging == "arrives":
        return [(always, whole), ((cut_s, math.inf), (cut_s, duration_s))]
    if staging == "leaves":
        gone_s = cut_s + 0.1 * duration_s
        return [((0.0, gone_s), (0.0, gone_s)), (always, whole)]
    return [(always, whole)] * num_objects


def _draw_look(rng: np.random.Generator, color: str, num_objects: int, staging: str) -> SceneObject:
    """Draws an object without its place and time."""
    motions: tuple[str, ...] = MOTIONS
    if num_objects == 2 and staging == "turns":
        motions = MOVES
    elif num_objects == 3:
        # Three objects fit into the square only if all of them stay small.
        motions = tuple(m for m in MOTIONS if m not in ("grow", "shrink"))
    motion = _pick(rng, motions)
    size = "small" if num_objects == 3 else _pick(rng, ("small", "large"))
    small, large = float(rng.uniform(0.145, 0.165)), float(rng.uniform(0.225, 0.245))
    start, end = {"small": (small, small), "large": (large, large)}[size]
    if motion in ("grow", "shrink"):
        size = "changing"
        start, end = (small, large) if motion == "grow" else (large, small)
    return SceneObject(
        color=color,
        shape=_pick(rng, SHAPES),
        size=size,
        motion=motion,
        start_xy=(0.5, 0.5),
        end_xy=(0.5, 0.5),
        start_radius=start,
        end_radius=end,
        visible_s=(0.0, math.inf),
        active_s=(0.0, 1.0),
        tilt=float(rng.uniform(-0.12, 0.12)),
        tint=float(rng.uniform(0.94, 1.0)),
    )


def _place(rng: np.random.Generator, looks: list[SceneObject], duration_s: float) -> tuple[SceneObject, ...]:
    """Places the objects on paths inside the centre square that overlap as little as possible."""
    times_s = np.linspace(0, duration_s, 9)
    best: tuple[float, tuple[SceneObject, ...]] | None = None
    for _ in range(_PLACEMENT_TRIES):
        placed = tuple(_draw_path(rng, look) for look in looks)
        covered = _overlap(placed, times_s)
        if best is None or covered < best[0]:
            best = covered, placed
        if covered == 0:
            break
    assert best is not None
    return best[1]


def _draw_path(rng: np.random.Generator, look: SceneObject) -> SceneObject:
    margin = max(look.start_radius, look.end_radius) + 0.01
    room = 1 - 2 * margin
    along, across = (float(u) for u in rng.uniform(size=2))
    if look.motion in _DIRECTIONS:
        step_x, step_y = _DIRECTIONS[look.motion]
        length = min(float(rng.uniform(0.4, 0.6)), room)
        low = margin + along * (room - length)
        ends = (low, low + length) if step_x + step_y > 0 else (low + length, low)
        side = margin + across * room
        start, end = ((e, side) if step_x else (side, e) for e in ends)
        return replace(look, start_xy=start, end_xy=end)
    orbit = (0.0, 0.0, 0.0)
    if look.motion == "orbit":
        loop_radius = min(float(rng.uniform(0.14, 0.2)), room / 2)
        turns = 1.0 if look.active_s[1] - look.active_s[0] < 3 else 2.0
        orbit = (
            loop_radius,
            float(rng.uniform(0, 2 * math.pi)),
            turns * float(rng.choice((-1, 1))),
        )
        margin, room = margin + loop_radius, room - 2 * loop_radius
    place = (margin + along * room, margin + across * room)
    return replace(look, start_xy=place, end_xy=place, orbit=orbit)


def _overlap(objects: tuple[SceneObject, ...], times_s: np.ndarray) -> float:
    """Returns the depth by which the objects, taken as discs, overlap, summed over times."""
    depth = 0.0
    for time_s in times_s:
        states = [o.state(float(time_s)) for o in objects]
        for i, (x, y, radius, opacity) in enumerate(states):
            for other_x, other_y, other_radius, other_opacity in states[:i]:
                if opacity and other_opacity:
                    gap = math.hypot(x - other_x, y - other_y)
                    depth += max(0.0, 0.95 * (radius + other_radius) - gap)
    return depth
