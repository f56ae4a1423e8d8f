"""Merging parts loses nothing and doubles nothing, at whatever moment it ends."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gare.config import ExtractConfig
from gare.data.store import parts
from gare.data.store.compact import compact
from gare.data.store.contents import FAILURE_SCHEMA, Store, frame_schema, part_files, write_part
from gare.data.store.feature_reader import FeatureReader
from gare.data.store.frame_reader import FrameReader
from gare.data.store.parts import CHECKSUM, is_part_gone, read_columns, read_part_index
from gare.data.store.verify import verify
from gare.errors import DataError
from gare.storage.generations import HeldStore
from tests.helpers.features import write_feature_store
from tests.helpers.servers import DroppingProxy
from tests.helpers.stores import failure_row, stored_row, stored_values, write_store
from tests.helpers.tiny import tiny_config

RAW = ExtractConfig(num_frames=3, image_size=16, encoding="raw")
IDS = [f"clip {index}" for index in range(11)]


@pytest.fixture
def store(tmp_path: Path, rng: np.random.Generator) -> str:
    """Eleven clips in four parts, of which one clip and all of a part no longer count; failures, too."""
    uri = str(tmp_path)
    write_store(uri, RAW, IDS, rng, part=3)
    for attempt in (1, 2):
        rows = [failure_row("bad", attempt), failure_row(IDS[0], attempt)]
        write_part(uri, "failures", rows, FAILURE_SCHEMA, [str(attempt)])
    places = Store(uri).ids()
    retired: dict[str, dict[str, str]] = {}
    for video_id in [IDS[1], *IDS[9:]]:
        checksum = read_columns(places[video_id][0], []).schema.metadata[b"gare.sha256"].decode()
        retired.setdefault(checksum, {})[video_id] = "gone"
    Store(uri).write_retired(retired)
    return uri


def test_small_parts_become_one(store: str) -> None:
    """Thousands of small files make every start of a training slow; what no longer counts takes up room."""
    before = stored_values(store)
    assert before.keys() == set(IDS) - {IDS[1], *IDS[9:]}
    reader = FrameReader(store)
    old = reader.read(IDS[2:5])
    found = compact(store, 10**6)
    assert found == {"parts_before": 4, "parts_after": 1, "rows_left_out": 3}
    assert stored_values(store) == before
    assert Store(store).read_retired() == {}
    assert len(part_files(store, "data")) == len(part_files(store, "failures")) == 1
    assert {key: row["attempts"] for key, row in Store(store).read_failures(before).items()} == {"bad": 2}
    # A training that goes on meanwhile finds its clips where they are now.
    assert all(np.array_equal(one, other) for one, other in zip(reader.read(IDS[2:5]), old, strict=True))
    files = part_files(store, "data")
    assert compact(store, 10**6) == {"parts_before": 1, "parts_after": 1, "rows_left_out": 0}
    assert part_files(store, "data") == files


def test_whole_pictures_are_merged_and_followed(tmp_path: Path, rng: np.random.Generator) -> None:
    """A training on whole pictures goes on while the store is merged, and finds the same ones."""
    extract = ExtractConfig(num_frames=3, image_size=16, crop="none")
    write_store(str(tmp_path), extract, IDS, rng, part=3)
    before = stored_values(str(tmp_path))
    reader, old = FrameReader(str(tmp_path)), FrameReader(str(tmp_path))
    pictures = {video_id: old.read_whole(video_id)[0] for video_id in IDS}
    assert compact(str(tmp_path), 10**6)["parts_after"] == 1
    assert stored_values(str(tmp_path)) == before
    for video_id in IDS:
        assert np.array_equal(reader.read_whole(video_id)[0], pictures[video_id])


def test_large_parts_stay(store: str) -> None:
    """Rewriting what is large enough would cost hours and change nothing."""
    Store(store).write_retired({})
    files = part_files(store, "data")
    largest = max(Path(file).stat().st_size for file in files)
    compact(store, largest // 2)
    assert part_files(store, "data") == files
    compact(store, 2 * largest + 1)
    assert len(part_files(store, "data")) == 2


def test_a_crash_at_any_moment_leaves_each_row_once(store: str) -> None:
    """A node that is taken away in the middle of it must not cost or double a clip."""
    before, failures = stored_values(store), Store(store).read_failures(stored_values(store))

    class Killed(BaseException):
        pass

    crashes = 0
    for moment in range(100):
        left = moment

        def die() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        try:
            compact(store, 10**6, HeldStore(raise_if_lost=die))
            break
        except Killed:
            crashes += 1
        assert stored_values(store) == before
        assert Store(store).read_failures(before) == failures
    assert crashes >= 4
    assert stored_values(store) == before
    assert len(part_files(store, "data")) == 1


def test_a_damaged_part_is_not_called_sound(store: str) -> None:
    """A merged part has a checksum of its own, which must not cover up what was broken before."""
    part = Path(part_files(store, "data")[0])
    data = bytearray(part.read_bytes())
    data[-20] ^= 4  # in the footer, where no page's checksum looks
    part.write_bytes(data)
    with pytest.raises(DataError, match=part.name):
        compact(store, 10**6)
    assert part.exists()


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_readers_on_s3_go_on_while_parts_are_merged(
    s3: Any, encoding: Literal["raw", "jpeg"], rng: np.random.Generator
) -> None:
    """A training of days on S3 would end with the nightly compaction of its store."""
    uri, extract = "s3://videos/store", RAW.model_copy(update={"encoding": encoding})
    write_store(uri, extract, IDS, rng, part=3)
    reader, other = FrameReader(uri), FrameReader(uri)
    expected = other.read(IDS)[0]
    # All parts are open, with their footers and counts known.
    reader.read(IDS[::3])
    assert compact(uri, 10**6)["parts_after"] == 1
    assert np.array_equal(reader.read(IDS)[0], expected)
    assert np.array_equal(reader.read_whole(IDS[1])[0], expected[1])


@pytest.mark.parametrize("cache_mb", [0.0, 100.0])
def test_readers_of_features_on_s3_go_on_while_parts_are_merged(
    s3: Any, cache_mb: float, rng: np.random.Generator
) -> None:
    """As of frames: what is read next is where it is now."""
    uri, config = "s3://videos/features", tiny_config()
    ids = [f"clip {index}" for index in range(40)]
    write_feature_store(uri, config, ids, rng, part=20)
    expected = FeatureReader(uri).read(ids, [0] * len(ids))
    reader = FeatureReader(uri, cache_mb=cache_mb)
    if not cache_mb:
        reader.read([ids[0], ids[20]])
    assert compact(uri, 10**8)["parts_after"] == 1
    # Clips of row groups that were not read before.
    found = reader.read(ids, [0] * len(ids))
    assert all(np.array_equal(found[name], array) for name, array in expected.items())


def test_an_outage_is_not_taken_for_a_merged_part(
    s3: Any, s3_proxy: DroppingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places that were looked up anew during an outage would hide what the storage said."""
    fault = DataError("cannot be read", where="s3://videos/part")
    fault.__cause__ = OSError("AWS Error NETWORK_CONNECTION")
    assert is_part_gone(fault)
    s3.put_object(Bucket="videos", Key="part", Body=b"x")
    assert not is_part_gone(fault)
    s3.delete_object(Bucket="videos", Key="part")

    def lost(uri: str) -> bool:
        raise DataError("cannot be looked up", where=uri)

    monkeypatch.setattr(parts, "exists", lost)
    assert not is_part_gone(fault)
    fault.__cause__ = ValueError("3 pictures of 4 frames")
    assert not is_part_gone(fault)


def test_a_clip_that_comes_back_as_it_was_counts(tmp_path: Path, rng: np.random.Generator) -> None:
    """Its part had the bytes of the one that was replaced, so it would be missing for ever."""
    uri = str(tmp_path)
    frames = write_store(uri, RAW, IDS[:2], rng, part=1)
    rows = [stored_row(RAW, IDS[0], frames[IDS[0]])]
    for generation in (1, 2):
        part, _ = Store(uri).ids()[IDS[0]]
        checksum = read_columns(part, []).schema.metadata[b"gare.sha256"].decode()
        Store(uri).write_retired({checksum: {IDS[0]: "gone"}})
        compact(uri, 10**6, HeldStore(2 * generation))
        assert Store(uri).ids().keys() == {IDS[1]}
        write_part(uri, "data", rows, frame_schema(RAW), [f"run {generation}", IDS[0]], 2 * generation + 1)
        assert Store(uri).ids().keys() == set(IDS[:2])


def test_where_no_row_is_left_an_empty_part_stands_for_a_while(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """It says that the rows will not come back; who reads or checks the store must not stumble over it."""
    uri = str(tmp_path)
    write_store(uri, RAW, IDS[:2], rng, part=2)
    part, _ = Store(uri).ids()[IDS[0]]
    checksum = read_columns(part, []).schema.metadata[b"gare.sha256"].decode()
    Store(uri).write_retired({checksum: dict.fromkeys(IDS[:2], "gone")})
    write_part(uri, "failures", [failure_row("bad")], FAILURE_SCHEMA)
    assert compact(uri, 10**6)["rows_left_out"] == 2
    assert Store(uri).ids() == Store(uri).read_retired() == {}
    [empty] = part_files(uri, "data")
    assert empty != part
    assert FrameReader(uri).places == {}
    assert [fault for fault in verify(uri, frame_schema(RAW), set())[0] if fault["part"] == empty] == []
    compact(uri, 10**6)
    assert part_files(uri, "data") == []


def test_parts_of_earlier_versions_get_an_index(rng: np.random.Generator, tmp_path: Path) -> None:
    """Else a store that was made before would be slow for ever, however often it is compacted."""
    uri = str(tmp_path)
    write_store(uri, RAW, IDS, rng, part=6)
    before = stored_values(uri)
    for part in map(Path, part_files(uri, "data")):
        part.write_bytes(as_before(part))
    assert not any(map(read_part_index, part_files(uri, "data")))
    compact(uri, 1)  # so that no two are merged
    assert len(part_files(uri, "data")) == 2
    assert all(map(read_part_index, part_files(uri, "data")))
    assert stored_values(uri) == before
    files = part_files(uri, "data")
    compact(uri, 1)
    assert part_files(uri, "data") == files


def as_before(part: Path) -> bytes:
    """Returns a part as versions without an index wrote it."""
    sink = pa.BufferOutputStream()
    table = pq.read_table(part).replace_schema_metadata(None)
    with pq.ParquetWriter(sink, table.schema, compression="zstd", use_dictionary=False) as writer:
        writer.write_table(table, row_group_size=1)
        writer.add_key_value_metadata({"gare.part": part.name, "gare.replaces": "[]", CHECKSUM: "0" * 64})
    data = bytearray(sink.getvalue())
    place = data.rindex(b"0" * 64)
    data[place : place + 64] = hashlib.sha256(data).hexdigest().encode()
    return bytes(data)
