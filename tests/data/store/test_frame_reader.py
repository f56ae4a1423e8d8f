"""Clips come back from the store as they went in, and nothing comes back for a clip that is damaged."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gare.config import ExtractConfig
from gare.data.images import crop_centre, decode_jpeg, encode_jpeg
from gare.data.store.contents import META, frame_schema, write_part
from gare.data.store.frame_reader import FrameReader
from gare.errors import DataError
from tests.helpers.stores import describe_store, random_frames, stored_row, write_store

RAW = ExtractConfig(num_frames=4, image_size=16, encoding="raw")
JPEG = ExtractConfig(num_frames=4, image_size=16, encoding="jpeg")
WHOLE = ExtractConfig(num_frames=4, image_size=16, crop="none")
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


@pytest.mark.parametrize("extract", [RAW, JPEG, WHOLE], ids=["raw", "jpeg", "whole"])
def test_one_clip_as_it_is_stored(extract: ExtractConfig, rng: np.random.Generator, tmp_path: Path) -> None:
    """Training that crops after it has augmented would miss the edges, or take padding for frames."""
    stored = write_store(str(tmp_path), extract, IDS, rng)
    reader = FrameReader(str(tmp_path))
    assert reader.crop == extract.crop
    for video_id, pictures in stored.items():
        frames, mask = reader.read_whole(video_id)
        assert frames.shape == (4, *pictures.shape[1:])
        assert (frames.dtype, mask.dtype) == (np.uint8, np.bool_)
        count = len(pictures)
        assert mask.tolist() == [index < count for index in range(4)]
        assert not frames[count:].any()
        expected = pictures
        if extract.encoding == "jpeg":
            expected = np.stack([decode_jpeg(encode_jpeg(frame, 95)) for frame in pictures])
        assert np.array_equal(frames[:count], expected)
        squares, same_mask = reader.read([video_id])
        assert squares.shape == (1, 4, 16, 16, 3)
        assert np.array_equal(same_mask[0], mask)
        assert np.array_equal(squares[0], [crop_centre(frame, 16) for frame in frames])
    with pytest.raises(DataError, match="does not hold 'other'"):
        reader.read_whole("other")


@pytest.mark.parametrize("extract", [RAW, JPEG, WHOLE], ids=["raw", "jpeg", "whole"])
def test_the_time_of_reading_is_told_in_two(
    extract: ExtractConfig, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Who waits for data must see whether the disk or the processor is slow."""
    write_store(str(tmp_path), extract, IDS, rng)
    reader = FrameReader(str(tmp_path))
    assert (reader.fetch_s, reader.jpeg_s) == (0, 0)
    for read in (lambda: reader.read(IDS[:3]), lambda: reader.read_whole(IDS[3])):
        fetch_s, jpeg_s = reader.fetch_s, reader.jpeg_s
        read()
        assert reader.fetch_s > fetch_s
        assert reader.jpeg_s > jpeg_s or (extract is RAW and not reader.jpeg_s)


def test_an_unknown_id_is_named(rng: np.random.Generator, tmp_path: Path) -> None:
    """A manifest that is newer than the store must not silently train on black clips."""
    write_store(str(tmp_path), RAW, IDS, rng)
    with pytest.raises(DataError, match="'other'") as caught:
        FrameReader(str(tmp_path)).read([IDS[0], "other"])
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("fault", ["jpeg", "cut jpeg", "null", "fewer", "more", "none", "too many"])
def test_a_damaged_clip_is_named(rng: np.random.Generator, tmp_path: Path, fault: str) -> None:
    """Never zeros for a clip: the part and the row are named instead."""
    frames = random_frames(JPEG, rng, 3)
    row = stored_row(JPEG, "a", frames)
    if fault == "jpeg":
        row["frames"][1] = b"\xff\xd8 not a picture"
    elif fault == "cut jpeg":
        row["frames"][1] = row["frames"][1][:-40]
    elif fault == "null":
        row["frames"][1] = None
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


@pytest.mark.parametrize(
    ("extract", "sizes", "said"),
    [
        (WHOLE, [(16, 20), (16, 20), (20, 16)], "frame 2 is 16 × 20 pixels, not 20 × 16"),
        (WHOLE, [(16, 20), (16, 21)], "frame 1 is 21 × 16 pixels, not 20 × 16"),
        (WHOLE, [(15, 20)], "frame 0 is 20 × 15 pixels, no side is 16"),
        (WHOLE, [(20, 32)], "frame 0 is 32 × 20 pixels, no side is 16"),
        (JPEG, [(16, 16), (16, 20)], "frame 1 is 20 × 16 pixels, not 16 × 16"),
        (JPEG, [(1, 1)], "frame 0 is 1 × 1 pixels, not 16 × 16"),
        (WHOLE, [(1, 1)], "frame 0 is 1 × 1 pixels, no side is 16"),
        (JPEG, [(1, 16)], "frame 0 is 16 × 1 pixels, not 16 × 16"),
    ],
)
def test_a_picture_of_another_size_is_named(
    extract: ExtractConfig, sizes: list[tuple[int, int]], said: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """A line of pixels must not be stretched to a picture, nor a batch fail without a word of where."""
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    row = stored_row(extract, "a", random_frames(extract, rng, len(sizes)))
    row["frames"] = [encode_jpeg(picture, 95) for picture in pictures]
    part = write_part(str(tmp_path), "data", [row], frame_schema(extract))
    describe_store(str(tmp_path), extract)
    reader = FrameReader(str(tmp_path))
    for read in (lambda: reader.read(["a"]), lambda: reader.read_whole("a")):
        with pytest.raises(DataError, match=f"'a' in row 0 cannot be read: {said}") as caught:
            read()
        assert part in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (8, 32), (32, 32)])
def test_raw_frames_of_another_shape_are_named(
    shape: tuple[int, int], rng: np.random.Generator, tmp_path: Path
) -> None:
    """One pixel must not be spread over a picture, nor its lines be read as shorter ones."""
    pictures = rng.integers(1, 256, (3, *shape, 3), dtype=np.uint8)
    kind = pa.fixed_shape_tensor(pa.uint8(), [4, *shape, 3])
    schema = frame_schema(RAW)
    schema = schema.set(schema.get_field_index("frames"), pa.field("frames", kind))
    part = write_part(str(tmp_path), "data", [stored_row(RAW, "a", pictures)], schema)
    describe_store(str(tmp_path), RAW)
    reader = FrameReader(str(tmp_path))
    for read in (lambda: reader.read(["a"]), lambda: reader.read_whole("a")):
        said = re.escape("'a' in row 0 cannot be read: its frames have the shape")
        with pytest.raises(DataError, match=f"{said}.* not ") as caught:
            read()
        assert part in str(caught.value)


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
