"""The contact sheet of a store: readable by a person, for whatever the clips and captions are."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gare.config import ExtractConfig
from gare.data.images import crop_centre
from gare.data.manifest import ManifestRow
from gare.data.store.frame_reader import FrameReader
from gare.errors import DataError
from gare.report.contact_sheet import draw_preview
from tests.helpers.stores import write_store

JPEG = ExtractConfig(num_frames=20, image_size=32, encoding="jpeg")


def row(video_id: str, caption: str = "a man plays", start_s: float | None = None) -> ManifestRow:
    return ManifestRow(video_id, f"/videos/{video_id}.mp4", start_s, None, "train", (caption, "another"))


def sheet(store: Path, rows: list[ManifestRow], num_clips: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(draw_preview(str(store), rows, num_clips))))


def test_frames_of_the_clips_are_on_it(rng: np.random.Generator, tmp_path: Path) -> None:
    """Else a person would trust pictures that are not those of the store."""
    stored = write_store(str(tmp_path), JPEG, ["a", "b", "c"], rng)
    rows = [row("missing"), *(row(name) for name in stored)]
    three, one = sheet(tmp_path, rows, 8), sheet(tmp_path, rows, 1)
    assert three.shape[0] - one.shape[0] == 2 * (one.shape[0] - 32)
    assert three.shape[1] == one.shape[1]
    # The first frame of the first clip, whose corner is below the two lines of text.
    frame = Image.fromarray(stored["a"][0]).resize((112, 112), Image.Resampling.LANCZOS)
    shown = one[16 + 42 : 16 + 42 + 112, 16 : 16 + 112].astype(int)
    assert np.abs(shown - np.asarray(frame)).mean() < 12


def test_of_whole_pictures_the_centre_is_on_it(rng: np.random.Generator, tmp_path: Path) -> None:
    """A sheet of squashed pictures, where the model sees the centre."""
    whole = JPEG.model_copy(update={"crop": "none"})
    write_store(str(tmp_path), whole, ["a", "b"], rng)
    picture = sheet(tmp_path, [row("a")], 8)
    frames, _ = FrameReader(str(tmp_path)).read_whole("a")
    frame = Image.fromarray(crop_centre(frames[0], 32)).resize((112, 112), Image.Resampling.LANCZOS)
    assert np.array_equal(picture[16 + 42 : 16 + 42 + 112, 16 : 16 + 112], np.asarray(frame))


def test_any_caption_fits(rng: np.random.Generator, tmp_path: Path) -> None:
    """A paragraph, an emoji or a line break must not spill over the next clip or end the job."""
    write_store(str(tmp_path), JPEG, ["a", "b"], rng)
    plain = sheet(tmp_path, [row("a"), row("b")], 2)
    odd = sheet(tmp_path, [row("a", "piñata $x$ 🎸 走\n" * 100, start_s=1.5), row("b")], 2)
    assert odd.shape == plain.shape
    assert (odd[:, -12:] == 255).all()
    assert np.array_equal(odd[len(odd) // 2 + 8 :], plain[len(plain) // 2 + 8 :])


def test_a_store_without_the_clips_is_named(rng: np.random.Generator, tmp_path: Path) -> None:
    """An empty picture would look like a fault of the videos."""
    write_store(str(tmp_path), JPEG, ["a"], rng)
    with pytest.raises(DataError, match="holds none of the clips"):
        draw_preview(str(tmp_path), [row("b")], 3)


def test_clips_without_captions_are_on_it(rng: np.random.Generator, tmp_path: Path) -> None:
    """A look at the frames is all that there is before a search."""
    write_store(str(tmp_path), JPEG, ["a"], rng)
    silent = dataclasses.replace(row("a"), captions=())
    assert sheet(tmp_path, [silent], 1).shape == sheet(tmp_path, [row("a")], 1).shape
