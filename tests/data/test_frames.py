"""Clips come back from the store as they went in, and nothing comes back for a clip that is damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gare.config import ExtractConfig
from gare.data.frames import FrameReader
from gare.data.images import decode_jpeg, encode_jpeg
from gare.data.store import META, frame_schema, write_part
from gare.errors import DataError
from tests.stores import describe_store, random_frames, stored_row, write_store

RAW = ExtractConfig(num_frames=4, image_size=16, encoding="raw")
JPEG = ExtractConfig(num_frames=4, image_size=16, encoding="jpeg")
IDS = [f"clip {index}" for index in range(8)]


@pytest.mark.parametrize("extract", [RAW, JPEG], ids=["raw", "jpeg"])
def test_clips_come_back_as_stored(extract: ExtractConfig, rng: np.random.Generator, tmp_path: Path) -> None:
    """A model would train on other pictures than were decoded, or take padding for frames."""
    stored = write_store(str(tmp_path), extract, IDS, rng)
    asked = [IDS[index] for index in rng.integers(0, len(IDS), 12)]
    frames, mask = FrameReader(str(tmp_path)).read(asked)
    assert frames.shape == (12, 4, 16, 16, 3)
    assert frames.dtype == np.uint8
    assert mask.dtype == np.bool_
    for found, real, video_id in zip(frames, mask, asked, strict=True):
        count = len(stored[video_id])
        assert real.tolist() == [index < count for index in range(4)]
        assert not found[count:].any()
        expected = stored[video_id]
        if extract is JPEG:
            expected = np.stack([decode_jpeg(encode_jpeg(frame, 95)) for frame in expected])
            # Wild colours in small blocks, of which JPEG halves the resolution.
            assert np.abs(expected.astype(int) - stored[video_id]).mean() < 20
        assert np.array_equal(found[:count], expected)
    empty, none = FrameReader(str(tmp_path)).read([])
    assert empty.shape == (0, 4, 16, 16, 3)
    assert none.shape == (0, 4)


def test_an_unknown_id_is_named(rng: np.random.Generator, tmp_path: Path) -> None:
    """A manifest that is newer than the store must not silently train on black clips."""
    write_store(str(tmp_path), RAW, IDS, rng)
    with pytest.raises(DataError, match="'other'") as caught:
        FrameReader(str(tmp_path)).read([IDS[0], "other"])
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("fault", ["jpeg", "cut jpeg", "fewer", "more", "none", "too many"])
def test_a_damaged_clip_is_named(rng: np.random.Generator, tmp_path: Path, fault: str) -> None:
    """Never zeros for a clip: the part and the row are named instead."""
    frames = random_frames(JPEG, rng, 3)
    row = stored_row(JPEG, "a", frames)
    if fault == "jpeg":
        row["frames"][1] = b"\xff\xd8 not a picture"
    elif fault == "cut jpeg":
        row["frames"][1] = row["frames"][1][:-40]
    elif fault == "fewer":
        del row["frames"][1]
    elif fault == "more":
        row["frames"].append(row["frames"][0])
    elif fault == "none":
        row |= {"num_frames": 0, "frames": []}
    else:
        row |= {"num_frames": 5, "frames": row["frames"][:1] * 5}
    part = write_part(str(tmp_path), "data", [stored_row(JPEG, "good", frames), row], frame_schema(JPEG))
    describe_store(str(tmp_path), JPEG)
    reader = FrameReader(str(tmp_path))
    with pytest.raises(DataError, match="row 1 cannot be read") as caught:
        reader.read(["a"])
    assert part in str(caught.value)
    assert reader.read(["good"])[1].sum() == 3


def test_a_part_that_is_gone_is_named(rng: np.random.Generator, tmp_path: Path) -> None:
    """A shared folder that loses a file in the middle of a run."""
    write_store(str(tmp_path), RAW, IDS[:2], rng)
    reader = FrameReader(str(tmp_path))
    for part in (tmp_path / "data").iterdir():
        part.unlink()
    with pytest.raises(DataError, match=r"part-\w+\.parquet"):
        reader.read(IDS[:1])


def test_a_store_of_features_is_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    """Features are not pictures."""
    write_store(str(tmp_path), RAW, IDS, rng)
    meta = tmp_path / META
    meta.write_text(meta.read_text().replace('"kind": "frames"', '"kind": "features"', 1))
    with pytest.raises(DataError, match="is a store of features"):
        FrameReader(str(tmp_path))
