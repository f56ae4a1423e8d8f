"""Reference implementation of RandAugment: one picture and one operation at a time, by Pillow."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from gare.train.input.randaugment import Operation

ENHANCEMENTS = {
    "ColorIncreasing": ImageEnhance.Color,
    "ContrastIncreasing": ImageEnhance.Contrast,
    "BrightnessIncreasing": ImageEnhance.Brightness,
    "SharpnessIncreasing": ImageEnhance.Sharpness,
}


def by_pillow(frames: np.ndarray, operations: Iterable[Operation]) -> np.ndarray:
    """Applies the operations to (F, H, W, 3) uint8, rounding after each as the released code does."""
    out = []
    for frame in frames:
        image = Image.fromarray(frame)
        for operation in operations:
            image = _changed(image, operation)
        out.append(np.asarray(image))
    return np.stack(out)


def _changed(image: Image.Image, operation: Operation) -> Image.Image:
    name, arguments = operation.name, operation.arguments
    width, height = image.size
    if name in ENHANCEMENTS:
        return ENHANCEMENTS[name](image).enhance(arguments[0])
    match name:
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Invert":
            return ImageOps.invert(image)
        case "Flip":
            return ImageOps.mirror(image)
        case "PosterizeIncreasing":
            # The highest level keeps no bits, which newer releases of Pillow refuse.
            return ImageOps.posterize(image, arguments[0]) if arguments[0] else image.point(lambda _: 0)
        case "SolarizeIncreasing":
            return ImageOps.solarize(image, arguments[0])
        case "SolarizeAdd":
            return image.point([min(255, v + arguments[0]) if v < 128 else v for v in range(256)] * 3)
        case "Rotate":
            return image.rotate(arguments[0], resample=Image.Resampling.BICUBIC, fillcolor=(128,) * 3)
        case "ShearX":
            return _affine(image, 1, arguments[0], 0, 0, 1, 0)
        case "ShearY":
            return _affine(image, 1, 0, 0, arguments[0], 1, 0)
        case "TranslateXRel":
            return _affine(image, 1, 0, arguments[0] * width, 0, 1, 0)
        case "TranslateYRel":
            return _affine(image, 1, 0, 0, 0, 1, arguments[0] * height)
        case "Crop":
            left, top, side = arguments
            return _affine(image, side, 0, left * width, 0, side, top * height)
    raise ValueError(name)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        resample=Image.Resampling.BICUBIC,
        fillcolor=(128,) * 3,
    )
