"""From picture to model input."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from gare.data.images import (
    CLIP_MEAN,
    CLIP_STD,
    crop_centre,
    decode_jpeg,
    encode_jpeg,
    fit_frame,
    normalise,
    prepare_frame,
)
from gare.errors import DataError


@pytest.mark.parametrize(
    ("height", "width"),
    [(240, 320), (320, 240), (224, 224), (241, 321), (16, 9), (1, 1), (1080, 1920), (3, 500)],
)
def test_prepare_gives_a_square_of_the_centre(height: int, width: int, rng: np.random.Generator) -> None:
    """Lost otherwise: the middle of the picture, or a whole clip of an odd shape."""
    rgb = np.zeros((height, width, 3), np.uint8)
    rgb[:] = rng.integers(0, 256, 3)
    out = prepare_frame(rgb, 32)
    assert out.shape == (32, 32, 3)
    assert out.dtype == np.uint8
    assert (out == rgb[0, 0]).all()


def test_prepare_is_clips_preprocessing(rng: np.random.Generator) -> None:
    """Lost otherwise: agreement with features computed elsewhere; the steps written out by hand."""
    rgb = rng.integers(0, 256, (101, 150, 3), dtype=np.uint8)
    image = Image.fromarray(rgb).resize((47, 32), Image.Resampling.BICUBIC)  # 32 * 150 / 101 = 47.5
    assert (prepare_frame(rgb, 32) == np.array(image)[:, 8:40]).all()  # round(7.5) is 8


@pytest.mark.parametrize(
    ("height", "width", "whole"),
    [
        (240, 320, (32, 42)),
        (320, 240, (42, 32)),
        (241, 321, (32, 42)),
        (101, 150, (32, 47)),
        (150, 101, (47, 32)),
        (33, 33, (32, 32)),
        (32, 35, (32, 35)),
        (9, 16, (32, 56)),
        (1, 1, (32, 32)),
    ],
)
def test_cropping_later_is_cropping_at_once(
    height: int, width: int, whole: tuple[int, int], rng: np.random.Generator
) -> None:
    """Lost otherwise: a model that learns from the centre and is evaluated on squares beside it."""
    rgb = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = prepare_frame(rgb, 32, "none")
    assert picture.shape == (*whole, 3)
    assert (crop_centre(picture, 32) == prepare_frame(rgb, 32)).all()


def test_a_picture_of_another_size_keeps_its_centre(rng: np.random.Generator) -> None:
    """Lost otherwise: videos whose size changes midway, or what is in the middle of them."""
    for _ in range(20):
        sides = np.stack([rng.permuted([8, rng.integers(8, 20)]) for _ in range(2)])
        picture, like = (rng.integers(1, 256, (*side, 3), dtype=np.uint8) for side in sides)
        fitted = fit_frame(picture, like, 8)
        assert fitted.shape == like.shape
        assert (crop_centre(fitted, 8) == crop_centre(picture, 8)).all()
        # No pixel is there twice or in part: what is not black is one block of the picture.
        assert fitted.any(axis=-1).sum() == np.prod(np.minimum(*sides))
        assert (fit_frame(picture, picture, 8) == picture).all()


def test_a_picture_that_is_too_long_for_jpeg_is_named() -> None:
    """Lost otherwise: why a banner, kept whole, is among the failures."""
    banner = prepare_frame(np.zeros((1, 2100, 3), np.uint8), 32, "none")
    with pytest.raises(DataError, match="67200 × 32 pixels is larger than a JPEG can be") as caught:
        encode_jpeg(banner, 95)
    assert "extract.crop=center" in str(caught.value)


def test_prepare_leaves_pixels_of_the_right_size_alone(rng: np.random.Generator) -> None:
    """Lost otherwise: sharpness, by resampling pictures that already fit."""
    rgb = rng.integers(0, 256, (32, 52, 3), dtype=np.uint8)
    assert (prepare_frame(rgb, 32) == rgb[:, 10:42]).all()


def test_jpeg_there_and_back() -> None:
    """Lost otherwise: the stored pictures, or red and blue swapped."""
    rgb = np.zeros((64, 64, 3), np.uint8)
    rgb[:32, :, 0], rgb[32:, :, 2] = 250, 250
    data = encode_jpeg(rgb, 95)
    assert data[:2] == b"\xff\xd8"
    assert np.abs(decode_jpeg(data).astype(int) - rgb).mean() < 3
    assert len(encode_jpeg(rgb, 10)) < len(data)


def test_a_damaged_jpeg_is_an_error(rng: np.random.Generator) -> None:
    """Lost otherwise: grey pictures from a damaged store, unnoticed."""
    data = encode_jpeg(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), 95)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="PNG")
    for bad in (b"", b"nonsense", data[: len(data) // 2], buffer.getvalue()):
        with pytest.raises(DataError, match="JPEG"):
            decode_jpeg(bad)


def test_normalise_is_clips(rng: np.random.Generator) -> None:
    """Lost otherwise: the meaning of pretrained weights; compared with the slow definition."""
    frames = rng.integers(0, 256, (2, 3, 5, 7, 3), dtype=np.uint8)
    slow = ((frames / 255.0 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)).transpose(0, 1, 4, 2, 3)
    fast = normalise(torch.from_numpy(frames))
    assert fast.shape == (2, 3, 3, 5, 7)
    assert fast.dtype == torch.float32
    assert fast.is_contiguous()
    assert np.abs(fast.numpy() - slow).max() < 1e-5


def test_normalise_refuses_what_is_normalised_already() -> None:
    """Lost otherwise: a model fed values a hundred times too small."""
    with pytest.raises(ValueError, match="uint8"):
        normalise(torch.zeros(2, 4, 4, 3))
    with pytest.raises(ValueError, match="uint8"):
        normalise(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
