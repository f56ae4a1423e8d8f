"""Steps of a frame from picture to model input: resize, crop, JPEG, normalise.

H×W pixels, S pixels of the short side.
"""

from __future__ import annotations

import io
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gare.errors import DataError

if TYPE_CHECKING:
    import torch

#: The part of a resized frame that is kept: its centre square, or all of it.
Crop: TypeAlias = Literal["center", "none"]

#: Arrays or tensors of pictures.
_Pictures = TypeVar("_Pictures", bound=Any)

#: Mean and standard deviation of CLIP's training pictures, RGB in 0…1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

#: Pixels of the longest side that libjpeg encodes.
MAX_SIDE = 65500

#: Pixels of the largest picture that is decoded; a few bytes can claim any size.
MAX_PIXELS = 2**26


def prepare_frame(rgb: NDArray[np.uint8], size_px: int, crop: Crop = "center") -> NDArray[np.uint8]:
    """Resizes the short side to ``size_px`` (bicubic, antialiased) and crops the centre.

    Sizes round as in CLIP's preprocessing: the long side is truncated, the crop's offset rounded.

    Args:
        rgb: picture (H, W, 3), uint8.
        size_px: S, the short side after resizing.
        crop: none leaves out the crop.

    Returns:
        (S, S, 3), or without the crop (H, W, 3) with short side S; uint8, contiguous.
    """
    height, width = rgb.shape[:2]
    short = min(height, width)
    new_width, new_height = size_px * width // short, size_px * height // short
    image = Image.fromarray(rgb)
    if (new_width, new_height) != (width, height):
        image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    if crop == "none":
        return np.array(image)
    top, left = _centre((new_height, new_width), size_px)
    return np.array(image.crop((left, top, left + size_px, top + size_px)))


def crop_centre(pictures: _Pictures, size_px: int) -> _Pictures:
    """Cuts the centre squares, as cropped by ``prepare_frame``, out of whole pictures.

    Args:
        pictures: array or tensor (..., H, W, 3), short side at least ``size_px``.
        size_px: S, side of the square.

    Returns:
        (..., S, S, 3), a view.
    """
    top, left = _centre(pictures.shape[-3:], size_px)
    cut: _Pictures = pictures[..., top : top + size_px, left : left + size_px, :]
    return cut


def _centre(shape: tuple[int, ...], size_px: int) -> tuple[int, int]:
    """Returns top and left of the centre square of a picture (H, W, …)."""
    return round((shape[0] - size_px) / 2), round((shape[1] - size_px) / 2)


def fit_frame(picture: NDArray[np.uint8], like: NDArray[np.uint8], size_px: int) -> NDArray[np.uint8]:
    """Fits a whole picture to the size of another one, for a video that changes its size midway.

    The centre square is kept pixel by pixel; parts that do not fit around it are cut, missing parts are
    black.

    Args:
        picture: (H, W, 3), short side ``size_px``.
        like: a picture (H', W', 3) of the same short side.
        size_px: S, the short side.

    Returns:
        (H', W', 3), uint8.
    """
    if picture.shape == like.shape:
        return picture
    fitted = np.zeros_like(like)
    target, source = [], []
    centres = (_centre(one.shape, size_px) for one in (like, picture))
    for there, here, room, length in zip(*centres, like.shape, picture.shape, strict=False):
        before, behind = min(there, here), min(room - there, length - here)
        target.append(slice(there - before, there + behind))
        source.append(slice(here - before, here + behind))
    fitted[tuple(target)] = picture[tuple(source)]
    return fitted


def size_fault(picture: NDArray[np.uint8], size_px: int, shape: tuple[int, ...] | None) -> str:
    """Describes a wrong size of a stored picture; empty if the size is right.

    Args:
        picture: (H, W, 3).
        size_px: S, the short side that it should have.
        shape: the shape that it should have; None for any shape with that short side.
    """
    height, width = picture.shape[:2]
    if shape is None:
        return "" if min(height, width) == size_px else f"{width} × {height} pixels, no side is {size_px}"
    return "" if picture.shape == shape else f"{width} × {height} pixels, not {shape[1]} × {shape[0]}"


def encode_jpeg(rgb: NDArray[np.uint8], quality: int) -> bytes:
    """Encodes a picture (H, W, 3), uint8, as JPEG of the given quality (1 to 100).

    Raises:
        DataError: for a picture that is larger than a JPEG can be.
    """
    height, width = rgb.shape[:2]
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise DataError(
            f"a picture of {width} × {height} pixels is larger than a JPEG can be",
            accepted=f"{MAX_SIDE} pixels a side, {MAX_PIXELS} in all; extract.crop=center cuts longer ones",
        )
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def decode_jpeg(data: bytes | memoryview) -> NDArray[np.uint8]:
    """Decodes a JPEG to (H, W, 3), uint8 RGB: the same numbers as Pillow's, in two thirds of its time.

    Raises:
        DataError: if the bytes are not a whole JPEG.
    """
    import simplejpeg

    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > MAX_PIXELS:
            raise ValueError(f"it claims {width} × {height} pixels")
        # Its faster transform and upsampling give other numbers.
        picture: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False)
    except (ValueError, MemoryError) as error:
        raise DataError(f"{len(data)} bytes that are not a whole JPEG: {error}") from error
    return picture


@cache
def _standard(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and standard deviation (3, 1, 1) of pixels in 0…255, cached on the device."""
    import torch

    with torch.inference_mode(mode=False):  # to be usable in training, too
        mean, std = ((torch.tensor(one) * 255)[:, None, None].to(device) for one in (CLIP_MEAN, CLIP_STD))
    return mean, std


def normalise(frames: torch.Tensor) -> torch.Tensor:
    """Converts uint8 frames (…, H, W, 3) to CLIP's float32 (…, 3, H, W): scaled to 0…1, standardised.

    Raises:
        ValueError: for another dtype or last dimension.
    """
    import torch  # here, because the decoding process imports this module and must stay light

    if frames.dtype != torch.uint8 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {tuple(frames.shape)}; accepted: uint8 (..., H, W, 3)")
    mean, std = _standard(frames.device)
    moved = frames.movedim(-1, -3)
    # Converted and moved in one pass, then changed in place: a fifth of the time on a CPU.
    if frames.device.type == "cpu":
        # In NumPy's memory, which comes in huge pages: small ones take longer than the arithmetic.
        floats = torch.from_numpy(np.empty(moved.shape, np.float32)).copy_(moved)
    else:
        floats = moved.to(torch.float32, memory_format=torch.contiguous_format)
    return floats.sub_(mean).div_(std)
