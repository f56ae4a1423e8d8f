"""The frame store on disk: parts are whole or absent, ids are in one of them, settings are checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gare.config import ExtractConfig
from gare.data.store.contents import (
    FAILURE_SCHEMA,
    META,
    Store,
    fingerprint,
    frame_schema,
    frame_settings,
    part_files,
    read_columns,
    write_part,
)
from gare.errors import DataError
from tests.helpers.stores import describe_store, failure_row, random_frames, stored_row, write_store

RAW = ExtractConfig(num_frames=3, image_size=8, encoding="raw")


def rows_of(rng: np.random.Generator, *ids: str) -> list[dict[str, Any]]:
    return [stored_row(RAW, video_id, random_frames(RAW, rng, 2)) for video_id in ids]


def test_a_part_that_cannot_be_finished_is_not_there(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up must not leave half a part that the next run takes for whole."""
    store = str(tmp_path / "store")
    write_part(store, "data", rows_of(rng, "a"), frame_schema(RAW))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        write_part(store, "data", rows_of(rng, "b"), frame_schema(RAW))
    monkeypatch.undo()
    assert Store(store).ids().keys() == {"a"}
    assert len(list((tmp_path / "store" / "data").iterdir())) == 1


def test_the_same_ids_are_the_same_part(rng: np.random.Generator, tmp_path: Path) -> None:
    """A task that Ray runs twice must not double its clips."""
    store = str(tmp_path)
    first = write_part(store, "data", rows_of(rng, "a", "b"), frame_schema(RAW))
    assert write_part(store, "data", rows_of(rng, "b", "a"), frame_schema(RAW)) == first
    assert part_files(store, "data") == [first]
    # The same group, of which only one came through this time.
    assert write_part(store, "data", rows_of(rng, "b"), frame_schema(RAW), ["a", "b"]) == first
    assert Store(store).ids() == {"b": (first, 0)}


def test_an_id_in_two_parts_is_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    """Which of the two clips a model trains on would be chance."""
    store = str(tmp_path)
    write_part(store, "data", rows_of(rng, "a", "b"), frame_schema(RAW))
    write_part(store, "data", rows_of(rng, "b", "c"), frame_schema(RAW))
    with pytest.raises(DataError, match="'b' is in two parts"):
        Store(store).ids()


@pytest.mark.parametrize("keep", [0, 3, 200, -1])
def test_a_cut_part_is_named(rng: np.random.Generator, tmp_path: Path, keep: int) -> None:
    """A part that was copied halfway must be found by its name."""
    part = Path(write_part(str(tmp_path), "data", rows_of(rng, "a"), frame_schema(RAW)))
    part.write_bytes(part.read_bytes()[:keep])
    with pytest.raises(DataError, match=part.name):
        Store(str(tmp_path)).ids()


def test_a_part_without_a_column_is_named(tmp_path: Path) -> None:
    """Somebody else's Parquet file in the folder is not a part of the store."""
    part = tmp_path / "data" / "part-0.parquet"
    part.parent.mkdir()
    pq.write_table(pa.table({"name": ["a"]}), part)
    with pytest.raises(DataError, match=r"part-0\.parquet"):
        Store(str(tmp_path)).ids()
    with pytest.raises(DataError, match=r"part-0\.parquet"):
        read_columns(str(part), ["name", "video_id"])


def test_raw_frames_are_tensors_to_any_reader_of_parquet(rng: np.random.Generator, tmp_path: Path) -> None:
    """Stores outlive this program: plain pyarrow, without Ray or gare, must see the frames."""
    frames = random_frames(RAW, rng, 2)
    part = write_part(str(tmp_path), "data", [stored_row(RAW, "a", frames)], frame_schema(RAW))
    code = (
        "import sys, json, pyarrow.parquet as pq\n"
        "column = pq.read_table(sys.argv[1])['frames']\n"
        "array = column.combine_chunks().to_numpy_ndarray()\n"
        "meta = pq.read_metadata(sys.argv[1]).row_group(0).column(5)\n"
        "loaded = [name for name in ('ray', 'gare') if name in sys.modules]\n"
        "print(json.dumps([str(column.type), array.tolist(), meta.compression, loaded]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, part], capture_output=True, text=True, check=True, timeout=120
    )
    kind, array, compression, loaded = json.loads(done.stdout)
    assert "fixed_shape_tensor" in kind
    assert compression == "ZSTD"
    assert loaded == []
    found = np.array(array)
    assert found.shape == (1, 3, 8, 8, 3)
    assert np.array_equal(found[0, :2], frames)
    assert not found[0, 2].any()


def test_each_clip_is_a_row_group(rng: np.random.Generator, tmp_path: Path) -> None:
    """Training reads clips in random order; without this each would cost its whole part."""
    part = write_part(str(tmp_path), "data", rows_of(rng, "a", "b", "c"), frame_schema(RAW))
    file = pq.read_metadata(part)
    assert file.num_row_groups == 3
    frames = [
        name for name in range(file.num_columns) if "frames" in file.row_group(0).column(name).path_in_schema
    ]
    for column in frames:
        assert "RLE_DICTIONARY" not in file.row_group(0).column(column).encodings


def test_the_last_attempt_counts(tmp_path: Path) -> None:
    """A video that is tried again must be reported with its last reason, and not at all once it is stored."""
    store = str(tmp_path)
    write_part(store, "failures", [failure_row("a", 2), failure_row("b")], FAILURE_SCHEMA)
    write_part(store, "failures", [failure_row("a"), failure_row("c")], FAILURE_SCHEMA)
    found = Store(store).read_failures({"c"})
    assert {key: row["message"] for key, row in found.items()} == {"a": "attempt 2", "b": "attempt 1"}


def test_no_parts_are_no_clips(tmp_path: Path) -> None:
    """The first run starts from a folder that is not there."""
    assert Store(str(tmp_path / "none")).ids() == {}
    assert Store(str(tmp_path / "none")).read_failures({}) == {}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_size": 16}, ["image_size is 8 in the store and 16"]),
        ({"num_frames": 4, "sample_fps": 2.0}, ["num_frames is 3", "sample_fps is 1.0 in the store and 2.0"]),
        (
            {"encoding": "jpeg", "crop": "none"},
            ["crop is 'center' in the store and 'none' in the configuration"],
        ),
        ({"encoding": "jpeg"}, ["encoding is 'raw'", "jpeg_quality is None in the store and 95"]),
    ],
)
def test_a_store_of_other_settings_is_refused(
    tmp_path: Path, change: dict[str, Any], named: list[str]
) -> None:
    """Frames of another size or rate would train another model under the same name."""
    store = str(tmp_path)
    describe_store(store, RAW)
    with pytest.raises(DataError) as caught:
        Store(store).read_meta_of(frame_settings(RAW.model_copy(update=change)))
    for said in [*named, store]:
        assert said in str(caught.value)
    assert "sampling is" not in str(caught.value)


def test_whole_pictures_are_not_taken_for_squares(tmp_path: Path) -> None:
    """A person who goes back to the default must be told which key made the store."""
    whole = ExtractConfig(crop="none")
    describe_store(str(tmp_path), whole)
    Store(str(tmp_path)).read_meta_of(frame_settings(whole))
    with pytest.raises(DataError, match="crop is 'none' in the store and 'center' in the configuration"):
        Store(str(tmp_path)).read_meta_of(frame_settings(ExtractConfig()))


@pytest.mark.parametrize(
    ("extract", "known"),
    [
        (ExtractConfig(), "65d5272ff03f1afbdb3e1521d751dc274cd9de19efe5d6695a03eede7583f538"),
        (
            ExtractConfig(encoding="raw", sampling="uniform", image_size=32),
            "bb5b5fde5474570e8a46a7932d0fe95c1ef44ef58ec7f404495eca854b70f0f7",
        ),
    ],
    ids=["jpeg", "raw"],
)
def test_stores_of_earlier_versions_are_taken(extract: ExtractConfig, known: str) -> None:
    """A new key with its default must not make a person extract days of video again."""
    assert fingerprint(frame_settings(extract)) == known


def test_what_does_not_change_the_frames_is_free(tmp_path: Path) -> None:
    """A store need not be made again for another number of workers."""
    describe_store(str(tmp_path), RAW)
    other = RAW.model_copy(update={"workers": 3, "deadline_s": 5.0, "videos_per_part": 7, "jpeg_quality": 50})
    Store(str(tmp_path)).read_meta_of(frame_settings(other))
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"kind": "frames"}', "null"])
def test_a_damaged_description_is_named(tmp_path: Path, content: str) -> None:
    """A store whose description is broken must not be trained on by guess."""
    (tmp_path / META).write_text(content)
    with pytest.raises(DataError, match=META):
        Store(str(tmp_path)).read_meta()


def test_a_store_of_a_later_version_is_refused(tmp_path: Path) -> None:
    """Its columns may mean something else."""
    describe_store(str(tmp_path), RAW)
    tree = json.loads((tmp_path / META).read_text())
    (tmp_path / META).write_text(json.dumps(tree | {"schema_version": 3}))
    with pytest.raises(DataError, match="its schema is 3"):
        Store(str(tmp_path)).read_meta()


def test_no_store_says_what_to_do(tmp_path: Path) -> None:
    """The most common fault: extract has not run yet."""
    with pytest.raises(DataError, match=r"run pipelines/extract\.py"):
        Store(str(tmp_path / "nothing")).read_meta()


def test_a_written_store_is_described(rng: np.random.Generator, tmp_path: Path) -> None:
    """The fixture of the tests around here is itself a store that the checks take."""
    write_store(str(tmp_path), RAW, [f"v{index}" for index in range(7)], rng)
    Store(str(tmp_path)).read_meta_of(frame_settings(RAW))
    assert len(part_files(str(tmp_path), "data")) == 3
