"""``extract --verify`` finds what is wrong with a store, and names it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gare.config import ExtractConfig
from gare.data.images import encode_jpeg
from gare.data.store import parts as parts_module
from gare.data.store.compact import compact
from gare.data.store.contents import (
    EARLIER_FAILURE_SCHEMA,
    FAILURE_SCHEMA,
    Store,
    frame_schema,
    part_files,
    write_part,
)
from gare.data.store.part_index import index_table, places_of
from gare.data.store.parts import encode_part, table_of, write_table
from gare.data.store.verify import verify, verify_or_raise
from gare.errors import DataError
from tests.helpers.stores import describe_store, failure_row, random_frames, stored_row, write_store

RAW = ExtractConfig(num_frames=3, image_size=16, encoding="raw")
JPEG = ExtractConfig(num_frames=3, image_size=16, encoding="jpeg")
IDS = [f"clip {index}" for index in range(5)]


def whole_store(uri: str, extract: ExtractConfig, rng: np.random.Generator) -> None:
    write_store(uri, extract, IDS, rng, part=2)
    write_part(uri, "failures", [failure_row("bad")], FAILURE_SCHEMA)
    meta = Store(uri).read_meta()
    Store(uri).write_meta(dataclasses.replace(meta, counts={"videos": 5, "failures": 1, "parts": 3}))


@pytest.mark.parametrize("extract", [RAW, JPEG], ids=["raw", "jpeg"])
def test_a_sound_store_has_no_faults(
    extract: ExtractConfig, rng: np.random.Generator, tmp_path: Path
) -> None:
    """A check that cries wolf is not run a second time."""
    whole_store(str(tmp_path), extract, rng)
    result = verify_or_raise(str(tmp_path), frame_schema(extract), [*IDS, "bad"])
    assert result["sound"]
    assert {name: result[name] for name in ("parts", "videos", "failures")} == {
        "parts": 4,
        "videos": 5,
        "failures": 1,
    }


def test_failures_of_earlier_versions_are_sound(rng: np.random.Generator, tmp_path: Path) -> None:
    """A store that was begun with an earlier version is checked, merged and read like any other."""
    uri = str(tmp_path)
    write_store(uri, RAW, IDS, rng, part=2)
    write_part(uri, "failures", [failure_row("old")], EARLIER_FAILURE_SCHEMA)
    write_part(uri, "failures", [failure_row("new")], FAILURE_SCHEMA)
    meta = Store(uri).read_meta()
    for parts in (3, 1):
        Store(uri).write_meta(dataclasses.replace(meta, counts={"videos": 5, "failures": 2, "parts": parts}))
        assert verify_or_raise(uri, frame_schema(RAW), [*IDS, "old", "new"])["sound"]
        assert {key: row["transient"] for key, row in Store(uri).read_failures({}).items()} == {
            "old": None,
            "new": False,
        }
        compact(uri, 10**6)
        assert len(part_files(uri, "failures")) == 1


def test_all_faults_of_a_store_are_named(
    rng: np.random.Generator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each with its part and its video, so that a person can mend it."""
    uri = str(tmp_path)
    whole_store(uri, RAW, rng)
    parts = part_files(uri, "data")
    write_part(uri, "data", [stored_row(RAW, IDS[0], random_frames(RAW, rng, 2))], frame_schema(RAW), ["x"])
    flipped = Path(parts[1])
    data = bytearray(flipped.read_bytes())
    # In a frame: a byte of the footer would make it no Parquet file at all.
    column = pq.read_metadata(flipped).row_group(0).column(frame_schema(RAW).names.index("frames"))
    data[column.data_page_offset + int(rng.integers(column.total_compressed_size))] ^= 16
    flipped.write_bytes(data)
    (tmp_path / "data" / "part-0.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError) as caught:
        verify_or_raise(uri, frame_schema(RAW), [*IDS, "bad", "never tried"])
    result = caught.value.result
    assert result is not None
    assert not result["sound"]
    found = {(Path(fault["part"]).name, fault["fault"].split(":")[0]) for fault in result["faults"]}
    assert (flipped.name, "its bytes have changed since it was written") in found
    assert ("part-0.parquet", "is not whole Parquet") in found
    assert str(len(result["faults"])) in str(caught.value)
    for fault in result["faults"]:
        assert fault["fault"] in caplog.text


@pytest.mark.parametrize(
    ("wanted", "change", "video_id", "said"),
    [
        ([*IDS, "bad", "new"], {}, "new", "is neither stored nor failed"),
        ([*IDS[1:], "bad"], {}, IDS[0], "is not in the manifest"),
        ([*IDS, "bad"], {"counts": {"videos": 4, "failures": 1, "parts": 3}}, "", "holds 5 videos"),
        ([*IDS, "bad"], {"complete": False}, "", "did not go through"),
        ([*IDS, "bad"], {"fingerprint": "0"}, "", "not that of its settings"),
    ],
)
def test_a_store_that_holds_other_videos_than_it_should(
    wanted: list[str],
    change: dict[str, Any],
    video_id: str,
    said: str,
    rng: np.random.Generator,
    tmp_path: Path,
) -> None:
    """Counts, ids and fingerprint against the manifest and the description."""
    uri = str(tmp_path)
    whole_store(uri, RAW, rng)
    Store(uri).write_meta(dataclasses.replace(Store(uri).read_meta(), **change))
    faults, _ = verify(uri, frame_schema(RAW), wanted)
    assert [(fault["video_id"], said in fault["fault"]) for fault in faults] == [(video_id, True)]


def test_an_id_in_two_parts_is_named(rng: np.random.Generator, tmp_path: Path) -> None:
    """Which of the two a training would read is chance."""
    uri = str(tmp_path)
    whole_store(uri, RAW, rng)
    write_part(uri, "data", [stored_row(RAW, IDS[0], random_frames(RAW, rng, 2))], frame_schema(RAW), ["x"])
    faults, _ = verify(uri, frame_schema(RAW), [*IDS, "bad"])
    assert (IDS[0], True) in [(fault["video_id"], "is also in" in fault["fault"]) for fault in faults]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_frames": 0}, "has 0 frames, not 1 to 3"),
        ({"frame_idx": [0]}, "has 2 frames, 1 positions and 2 times"),
        ({"frame_idx": [-1, 0]}, "at a position below 0"),
        ({"frame_time_s": [1.0, 0.0]}, "not in order of time"),
        ({"frame_time_s": [0.0, 500.0]}, "cover 500 s of a video of 2 s"),
        ({"frame_time_s": [0.0, math.nan]}, "frame_time_s is not finite"),
        ({"frame_time_s": [0.0, None]}, "without position or time"),
        ({"fps": math.inf}, "fps is not finite"),
        ({"frames": [b"\xff\xd8", b""]}, "frame 0: 2 bytes that are not a whole JPEG"),
        ({"frames": []}, "has 2 frames and 0 pictures"),
        ({"video_id": ""}, "has no video_id"),
    ],
)
def test_a_row_that_makes_no_sense_is_named(
    change: dict[str, Any], said: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Values that were written wrongly have a right checksum."""
    uri = str(tmp_path)
    row = stored_row(JPEG, "a", random_frames(JPEG, rng, 2))
    part = write_part(uri, "data", [row | change], frame_schema(JPEG))
    describe_store(uri, JPEG)
    faults, _ = verify(uri, frame_schema(JPEG), ["a"])
    named = [fault for fault in faults if fault["part"] == part and said in fault["fault"]]
    assert named
    assert named[0]["video_id"] == change.get("video_id", "a")


def test_pictures_of_another_size_or_behind_the_end(rng: np.random.Generator, tmp_path: Path) -> None:
    """A model would fail on the one in the middle of a night, and learn the other."""
    small = stored_row(JPEG, "a", random_frames(JPEG.model_copy(update={"image_size": 8}), rng, 2))
    write_part(str(tmp_path / "jpeg"), "data", [small], frame_schema(JPEG))
    describe_store(str(tmp_path / "jpeg"), JPEG)
    faults, _ = verify(str(tmp_path / "jpeg"), frame_schema(JPEG), ["a"])
    assert "frame 0 is 8 × 8 pixels, not 16 × 16" in [fault["fault"] for fault in faults]
    long = stored_row(RAW, "a", random_frames(RAW, rng, 3) | 1) | {
        "num_frames": 2,
        "frame_idx": [0, 1],
        "frame_time_s": [0.0, 1.0],
    }
    write_part(str(tmp_path / "raw"), "data", [long], frame_schema(RAW))
    describe_store(str(tmp_path / "raw"), RAW)
    faults, _ = verify(str(tmp_path / "raw"), frame_schema(RAW), ["a"])
    assert "has pictures behind its last frame" in [fault["fault"] for fault in faults]


def test_whole_pictures_have_one_size_a_clip(rng: np.random.Generator, tmp_path: Path) -> None:
    """Any shape is right for a whole picture but that of another video, or of another store."""
    extract = JPEG.model_copy(update={"crop": "none"})
    write_store(str(tmp_path / "sound"), extract, IDS, rng)
    faults, read = verify(str(tmp_path / "sound"), frame_schema(extract), IDS)
    assert read["videos"] == len(IDS)
    assert {fault["fault"] for fault in faults if fault["video_id"]} == set()
    rows = []
    for name, sizes in {"other": [(16, 24), (24, 16)], "small": [(8, 24), (15, 24)]}.items():
        jpegs = [encode_jpeg(np.zeros((*size, 3), np.uint8), 95) for size in sizes]
        rows.append(stored_row(extract, name, random_frames(extract, rng, 2)) | {"frames": jpegs})
    write_part(str(tmp_path / "bad"), "data", rows, frame_schema(extract))
    describe_store(str(tmp_path / "bad"), extract)
    faults, _ = verify(str(tmp_path / "bad"), frame_schema(extract), ["other", "small"])
    assert [(fault["video_id"], fault["fault"]) for fault in faults if fault["video_id"]] == [
        ("other", "frame 1 is 16 × 24 pixels, not 24 × 16"),
        ("small", "frame 0 is 24 × 8 pixels, no side is 16"),
        ("small", "frame 1 is 24 × 15 pixels, no side is 16"),
    ]


def test_a_tensor_that_is_not_finite_is_named(tmp_path: Path) -> None:
    """In a store of any kind: one NaN in a feature makes every loss NaN."""
    uri = str(tmp_path)
    describe_store(uri, RAW)
    Store(uri).write_meta(dataclasses.replace(Store(uri).read_meta(), kind="features"))
    columns: dict[str, pa.DataType] = {
        "video_id": pa.string(),
        "features": pa.fixed_shape_tensor(pa.float16(), [2, 3]),
        "texts": pa.list_(pa.list_(pa.float32())),
    }
    good = np.ones((2, 3), np.float16)
    bad = good.copy()
    bad[1, 2] = np.nan
    rows = [
        {"video_id": "sound", "features": good.tobytes(), "texts": [[1.0], [2.0, 3.0]]},
        {"video_id": "tensor", "features": bad.tobytes(), "texts": [[1.0]]},
        {"video_id": "nested", "features": good.tobytes(), "texts": [[], [1.0, math.inf]]},
    ]
    write_part(uri, "data", rows, pa.schema(columns))
    faults, _ = verify(uri, pa.schema(columns), ["sound", "tensor", "nested"])
    found = [(fault["video_id"], fault["fault"]) for fault in faults if fault["video_id"]]
    assert found == [("tensor", "features is not finite"), ("nested", "texts is not finite")]


@pytest.mark.parametrize("extract", [RAW, JPEG], ids=["raw", "jpeg"])
@pytest.mark.parametrize("what", ["ids", "places"])
def test_an_index_that_lies_is_found(
    what: str,
    extract: ExtractConfig,
    rng: np.random.Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Readers go by the index alone; a fault in what wrote it would give a clip another one's frames."""
    rows = [stored_row(extract, name, random_frames(extract, rng, 2)) for name in IDS]
    table = table_of(rows, frame_schema(extract))
    if what == "ids":
        monkeypatch.setattr(
            parts_module, "index_table", lambda table: index_table(table.take([1, 0, 2, 3, 4]))
        )
    else:
        other = table_of([rows[0], *rows[:-1]], frame_schema(extract))
        encoded = encode_part("data", "other", other)
        lie = places_of(pq.read_metadata(pa.BufferReader(encoded)), other.schema)
        monkeypatch.setattr(parts_module, "places_of", lambda *unused: lie)
    part = write_table(str(tmp_path), "data", table, IDS)
    describe_store(str(tmp_path), extract)
    faults = {
        fault["fault"]
        for fault in verify(str(tmp_path), frame_schema(extract), IDS)[0]
        if fault["part"] == part
    }
    assert len(faults) == 1
    assert "index" in faults.pop()
