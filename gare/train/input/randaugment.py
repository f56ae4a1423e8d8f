"""RandAugment's policy: operations drawn from a clip's seed, and the steps that carry them out.

``augment_cpu`` and ``augment_batch`` carry out the steps.

Coordinates are Pillow's: x to the right, y down, in pixels, and the centre of the first pixel at (0.5, 0.5).
Warps are maps from the coordinates of the result to those of its source.

Source: RandAugment, arXiv 1909.13719, in the form of the paper's released code, 'rand-m7-n4-mstd0.5-inc1'.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gare.config import AugmentConfig

#: The policy's name among a run's settings; a different name means different frames.
POLICY = "rand-increasing, timm"

#: The operations of RandAugment, drawn uniformly. 'Increasing': a higher level is always a stronger change.
OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "ColorIncreasing",
    "ContrastIncreasing",
    "BrightnessIncreasing",
    "SharpnessIncreasing",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)

#: The highest level.
MAX_LEVEL = 10.0

#: Arguments at the highest level.
MAX_ROTATION_DEG = 30.0
MAX_SHEAR = 0.3
MAX_TRANSLATION = 0.45  # share of the picture's width or height
MAX_POSTERIZED_BITS = 4
MAX_SOLARIZED = 256
MAX_SOLARIZE_ADD = 110
MAX_ENHANCEMENT = 0.9

#: Grey of pixels that a warp brings in from outside the picture.
FILL = 128

#: Added to interpolated values before they are truncated, as Pillow truncates them. It is larger than the
#: rounding errors of coordinates and sums, so that a pixel that is only moved keeps its value.
SLACK = 1 / 64

#: The kinds of step; the comment says what the argument holds.
StepKind = Literal[
    "mirror",  # nothing
    "warp",  # (K, 2, 3) float64: see Step
    "table",  # (256,) uint8: the new value of each value
    "autocontrast",  # nothing
    "equalize",  # nothing
    "contrast",  # () float32: the factor
    "colour",  # () float32: the factor
    "sharpness",  # () float32: the factor
]


@dataclass(frozen=True)
class Operation:
    """A change of a clip, whatever its size.

    Attributes:
        name: one of OPERATIONS, or Crop or Flip.
        arguments: of Crop: left, top and side, as shares of the picture's; of Rotate: degrees,
            counterclockwise; of the shears: pixels per pixel; of the translations: share of the picture's
            side; of PosterizeIncreasing: bits that are kept; of SolarizeIncreasing: lowest value that is
            inverted; of SolarizeAdd: the summand; of the four enhancements: the factor; else none.
    """

    name: str
    arguments: tuple[float, ...] = ()


@dataclass(frozen=True)
class Step:
    """A pass over the pixels of a clip.

    Attributes:
        kind: decides what is computed.
        argument: see StepKind. A warp is K affine maps (2, 3) of the result's coordinates: the last one leads
            to the source, the others to the places between consecutive operations. A pixel is FILL if any of
            its K places is outside the frame, as if the operations were done one by one.
    """

    kind: StepKind
    argument: NDArray[np.generic]


_NOTHING = np.zeros(0)


def draw_operations(config: AugmentConfig, seed: int) -> tuple[Operation, ...]:
    """Draws a clip's operations: a random crop, a mirror, then RandAugment's.

    ``config.operations`` are drawn with replacement; each is carried out with ``config.probability``, at a
    level drawn from a normal distribution (``magnitude``, ``noise``) and clamped to 0…10, with a random sign
    where it has one.

    Args:
        config: what may be drawn; the default draws nothing.
        seed: of the clip, 0 or more. The same seed gives the same operations; no other random state is read
            or changed.
    """
    rng = np.random.default_rng(seed)
    # Always the same number of draws, so that changing one key leaves the draws of the others as they are.
    share, left, top, flip = rng.random(4).tolist()
    drawn: list[Operation] = []
    if config.crop_scale < 1:
        side = math.sqrt(config.crop_scale + (1 - config.crop_scale) * share)
        drawn.append(Operation("Crop", (left * (1 - side), top * (1 - side), side)))
    if flip < config.flip:
        drawn.append(Operation("Flip"))
    num = config.operations
    choices = rng.integers(len(OPERATIONS), size=num)
    carried_out = rng.random(num) < config.probability
    levels = np.clip(config.magnitude + config.noise * rng.standard_normal(num), 0, MAX_LEVEL)
    signs = np.where(rng.random(num) < 0.5, -1.0, 1.0)
    for choice, wanted, level, sign in zip(choices, carried_out, levels, signs, strict=True):
        if wanted:
            name = OPERATIONS[choice]
            drawn.append(Operation(name, _arguments(name, float(level) / MAX_LEVEL, float(sign))))
    return tuple(drawn)


def _arguments(name: str, share: float, sign: float) -> tuple[float, ...]:
    """Computes the arguments of an operation at a share of the highest level."""
    match name:
        case "Rotate":
            return (sign * share * MAX_ROTATION_DEG,)
        case "ShearX" | "ShearY":
            return (sign * share * MAX_SHEAR,)
        case "TranslateXRel" | "TranslateYRel":
            return (sign * share * MAX_TRANSLATION,)
        case "PosterizeIncreasing":
            return (MAX_POSTERIZED_BITS - int(share * MAX_POSTERIZED_BITS),)
        case "SolarizeIncreasing":
            return (MAX_SOLARIZED - int(share * MAX_SOLARIZED),)
        case "SolarizeAdd":
            return (int(share * MAX_SOLARIZE_ADD),)
        case "ColorIncreasing" | "ContrastIncreasing" | "BrightnessIncreasing" | "SharpnessIncreasing":
            return (1 + sign * share * MAX_ENHANCEMENT,)
    return ()


def steps_of(operations: Iterable[Operation], height: int, width: int) -> tuple[Step, ...]:
    """Turns operations into as few passes over the pixels as they need.

    Consecutive geometric operations become one warp, which interpolates once; consecutive tables become one.

    Args:
        operations: in the order in which they change the clip.
        height: of the frames, px.
        width: of the frames, px.

    Returns:
        The steps; empty without operations.
    """
    steps: list[Step] = []
    maps: list[NDArray[np.float64]] = []
    only_mirrors = True
    for operation in operations:
        matrix = _map_of(operation, height, width)
        if matrix is not None:
            maps.append(matrix)
            only_mirrors &= operation.name == "Flip"
            continue
        steps += _geometric(maps, only_mirrors)
        maps, only_mirrors = [], True
        step = _tone(operation)
        if step.kind == "table" and steps and steps[-1].kind == "table":
            step = Step("table", step.argument[steps.pop().argument])
        steps.append(step)
    return tuple(steps + _geometric(maps, only_mirrors))


def _geometric(maps: Sequence[NDArray[np.float64]], only_mirrors: bool) -> list[Step]:
    if not maps:
        return []
    if only_mirrors:
        return [Step("mirror", _NOTHING)] * (len(maps) % 2)
    # From the result back through the last operation, then the one before it, to the source.
    path = [maps[-1]]
    for matrix in reversed(maps[:-1]):
        path.append(matrix @ path[-1])
    return [Step("warp", np.stack(path)[:, :2])]


def _map_of(operation: Operation, height: int, width: int) -> NDArray[np.float64] | None:
    """Returns the map (3, 3) from an operation's result to its source; None if it moves no pixel."""
    match operation.name, operation.arguments:
        case "Crop", (left, top, side):
            rows = [[side, 0, left * width], [0, side, top * height]]
        case "Flip", _:
            rows = [[-1, 0, width], [0, 1, 0]]
        case "Rotate", (angle_deg,):
            cos, sin = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
            centre_x, centre_y = width / 2, height / 2
            rows = [
                [cos, -sin, centre_x - cos * centre_x + sin * centre_y],
                [sin, cos, centre_y - sin * centre_x - cos * centre_y],
            ]
        case "ShearX", (shear,):
            rows = [[1, shear, 0], [0, 1, 0]]
        case "ShearY", (shear,):
            rows = [[1, 0, 0], [shear, 1, 0]]
        case "TranslateXRel", (shift,):
            rows = [[1, 0, shift * width], [0, 1, 0]]
        case "TranslateYRel", (shift,):
            rows = [[1, 0, 0], [0, 1, shift * height]]
        case _:
            return None
    return np.array([*rows, [0, 0, 1]], dtype=np.float64)


def _tone(operation: Operation) -> Step:
    values = np.arange(256)
    match operation.name, operation.arguments:
        case "AutoContrast", _:
            return Step("autocontrast", _NOTHING)
        case "Equalize", _:
            return Step("equalize", _NOTHING)
        case "ContrastIncreasing", (factor,):
            return Step("contrast", np.array(factor, dtype=np.float32))
        case "ColorIncreasing", (factor,):
            return Step("colour", np.array(factor, dtype=np.float32))
        case "SharpnessIncreasing", (factor,):
            return Step("sharpness", np.array(factor, dtype=np.float32))
        case "BrightnessIncreasing", (factor,):
            table = np.clip(np.float32(factor) * values.astype(np.float32), 0, 255)
        case "Invert", _:
            table = 255 - values
        case "PosterizeIncreasing", (bits,):
            table = values & -(2 ** (8 - int(bits)))
        case "SolarizeIncreasing", (threshold,):
            table = np.where(values < threshold, values, 255 - values)
        case "SolarizeAdd", (summand,):
            table = np.where(values < 128, np.minimum(values + summand, 255), values)
        case _:
            raise ValueError(f"no such operation: {operation}")
    return Step("table", table.astype(np.uint8))
