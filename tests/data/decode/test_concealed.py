"""Damaged pictures that decoders conceal are said, whoever decodes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gare.data.decode.clip import decode_clip
from gare.data.decode.clip_request import ClipRequest
from gare.data.decode.probe import probe
from gare.data.decode.process import DecodeProcess
from tests.films.clocks import made
from tests.films.film import Film, draw_track
from tests.films.kinds import generator, make_film
from tests.films.numbers import read


@pytest.fixture(scope="module")
def process() -> Iterator[DecodeProcess]:
    with DecodeProcess() as process:
        yield process


def hurt(seed: int, number: int, folder: Path) -> Film:
    """A damaged MP4, the same each time."""
    return make_film("hurt_mp4", generator(seed, "hurt_mp4", number), folder, number)


def test_what_decord_conceals_is_said(process: DecodeProcess, tmp_path: Path) -> None:
    """It gives the picture before once more: a clip that stands still would be learned from."""
    film = hurt(7, 82, tmp_path)  # H.264 with 51 bytes of noise
    assert decode_clip(film.path).decoder == "decord"
    clip = process.extract(ClipRequest(str(film.path), image_size=64, encoding="raw"))
    assert (clip.decoder, clip.complete) == ("pyav", False)
    assert "damaged packets or frames are left out" in clip.note
    # The next file is judged by itself.
    whole = make_film("steady", generator(7, "steady", 0), tmp_path, 0)
    assert process.extract(ClipRequest(str(whole.path), image_size=64)).complete


def test_a_damaged_picture_that_looks_like_a_keyframe(tmp_path: Path) -> None:
    """By its own list decord seeks to it, and lands on another: now and then it gave second 2.75 for 3."""
    film = hurt(4, 10, tmp_path)  # VP9 whose 36th picture passes for a keyframe
    assert probe(film.path).traits == {"other keyframes"}
    for _ in range(5):
        clip = decode_clip(film.path)
        assert (clip.decoder, clip.complete) == ("pyav", False)


def test_errors_of_single_pictures_are_damage(tmp_path: Path) -> None:
    """A JPEG that ends in grey decodes without an error, but its decoder logs one."""
    film = hurt(7, 53, tmp_path)  # Motion JPEG with 33 bytes of zeros
    clip = decode_clip(film.path, num_frames=200, sample_fps=100)
    assert not clip.complete
    assert None not in [read(rgb) for rgb in clip.frames]


@pytest.mark.parametrize(
    "segment",
    [
        b"\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff\xff\x7f",
        b"\xff\xe1\x00\x10Exif\0\0XXXXXXXX",
        b"\xff\xe0\x00\x10LJIF" + bytes(10),
        b"\xff\xe0\x00\x01AVI1\0",
    ],
    ids=["EXIF far", "EXIF of no kind", "LJIF", "short APP"],
)
def test_what_is_written_beside_the_pixels_is_no_damage(
    segment: bytes, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Cameras write odd metadata into each picture; the decoder logs an error, and the picture is right."""
    film = made(tmp_path / "film", "avi", [draw_track(rng, "avi", codecs=("mjpeg",))])
    before = decode_clip(film.path)
    written = film.path.read_bytes()
    odd, count = re.subn(
        rb"\xff\xfe\x00\x10Lavc.{10}",
        lambda found: segment + found[0][len(segment) :],
        written,
        flags=re.DOTALL,
    )
    assert count > 5
    film.path.write_bytes(odd)
    clip = decode_clip(film.path)
    assert (clip.complete, clip.note) == (True, "")
    assert all(map(np.array_equal, clip.frames, before.frames))
