"""The index of a part says what its columns say, is found by one request, and never lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gare.config import ExtractConfig
from gare.data.store import part_index
from gare.data.store.contents import IDENTITY, Store, frame_schema, part_files, write_part
from gare.data.store.feature_reader import FeatureReader
from gare.data.store.frame_reader import FrameReader
from gare.data.store.part_index import (
    COLUMNS,
    DIGEST,
    INDEX,
    PLACES,
    TAIL_BYTES,
    digest_of,
    index_table,
    read_entries,
)
from gare.data.store.parts import (
    CHECKSUM,
    PartEncoder,
    checksum_fault,
    put_part,
    read_columns,
    read_part_index,
    table_of,
)
from gare.errors import DataError
from tests.helpers.features import write_feature_store
from tests.helpers.servers import DroppingProxy
from tests.helpers.stores import describe_store, random_frames, stored_row, write_store
from tests.helpers.tiny import tiny_config

JPEG = ExtractConfig(num_frames=4, image_size=16)
RAW = ExtractConfig(num_frames=4, image_size=16, encoding="raw")


def clips(count: int, length: int = 11) -> list[str]:
    return [f"clip {number:0{length - 5}d}" for number in range(count)]


def small_part(uri: str, rng: np.random.Generator, ids: list[str], extract: ExtractConfig = JPEG) -> str:
    """Writes a part of clips that share their frames, in which each file has a version like an ETag."""
    frames = random_frames(extract, rng, 2)
    row = stored_row(extract, "", frames)
    rows = [row | {"video_id": one, "source_version": rng.bytes(16).hex()} for one in ids]
    describe_store(uri, extract)
    return write_part(uri, "data", rows, frame_schema(extract))


@pytest.mark.parametrize("extract", [JPEG, RAW], ids=["jpeg", "raw"])
def test_the_index_says_what_the_columns_say(
    extract: ExtractConfig, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Plans and readers know a part by its index alone: clips would be made again, or taken for others."""
    part = small_part(str(tmp_path), rng, clips(50), extract)
    index = read_part_index(part)
    table = read_columns(part, None).replace_schema_metadata(None)
    assert index
    assert index.table.equals(index_table(table))
    assert index.table.column_names == [name for name in COLUMNS if name != DIGEST]
    footer = pq.read_metadata(part)
    leaf = [footer.schema.column(one).path for one in range(footer.num_columns)].index("frames.list.element")
    chunks = [footer.row_group(number).column(leaf) for number in range(50)]
    assert index.places
    assert index.places.offset.tolist() == [chunk.data_page_offset for chunk in chunks]
    assert index.places.size.tolist() == [chunk.total_compressed_size for chunk in chunks]
    assert index.places.num_frames.tolist() == [2] * 50
    assert index.places.shape == ((4, 16, 16, 3) if extract is RAW else None)


@pytest.mark.parametrize("sizes", [(4, 4, 0), (4, 3), (0, 4), (0,)])
def test_pieces_without_rows_cost_no_clip_its_place(
    sizes: tuple[int, ...], rng: np.random.Generator, tmp_path: Path
) -> None:
    """Extraction adds what is left at the end, perhaps nothing; readers then read footers clip by clip."""
    schema, encoder = frame_schema(JPEG), PartEncoder("data", frame_schema(JPEG))
    frames = {one: random_frames(JPEG, rng, 2) for one in clips(sum(sizes))}
    rows = iter([stored_row(JPEG, one, found) for one, found in frames.items()])
    for size in sizes:
        encoder.add(table_of([next(rows) for _ in range(size)], schema))
    describe_store(str(tmp_path), JPEG)
    put_part(str(tmp_path), "data", "part-a.parquet", encoder.finish("part-a.parquet"))
    index = read_part_index(part_files(str(tmp_path), "data")[0])
    assert index
    assert index.places
    assert len(index.places.size) == sum(sizes)
    reader = FrameReader(str(tmp_path))
    assert list(reader.places) == list(frames)
    for one in frames:
        reader.read([one])


@pytest.mark.parametrize("extract", [JPEG, RAW], ids=["jpeg", "raw"])
@pytest.mark.parametrize("size", [2, 100])
def test_a_part_that_another_program_wrote_anew_gives_no_other_clip(
    extract: ExtractConfig, size: int, rng: np.random.Generator, tmp_path: Path
) -> None:
    """The second row group is that of the third clip."""
    part = small_part(str(tmp_path), rng, clips(6), extract)
    pq.write_table(pq.read_table(part), part, row_group_size=size)
    reader = FrameReader(str(tmp_path))
    for one in clips(6):
        with pytest.raises(DataError, match=r"its row groups are not of one clip each"):
            reader.read([one])


def test_features_are_indexed_with_a_digest_of_their_captions(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """Captions are most of what a feature store's small columns hold, and a plan only compares them."""
    rows = write_feature_store(str(tmp_path), tiny_config(), clips(40), rng)
    for part in part_files(str(tmp_path), "data"):
        index = read_part_index(part)
        assert index
        assert index.places is None
        digests = dict(zip(index.table["video_id"].to_pylist(), index.table[DIGEST].to_pylist(), strict=True))
        assert digests == {one: digest_of(rows[one]["captions"]) for one in digests}
        footer = pq.read_metadata(part)
        chunks = [
            footer.row_group(group).column(one)
            for group in range(footer.num_row_groups)
            for one in range(footer.num_columns)
        ]
        assert sum(index.column_bytes.values()) == sum(chunk.total_uncompressed_size for chunk in chunks)
    assert digest_of(["a", "b"]) != digest_of(["a b"]) != digest_of(["b", "a"])


def test_a_thousand_clips_are_known_by_one_read(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each further read is a request to an object store, for each part and each loader."""
    part = small_part(str(tmp_path), rng, clips(1000))
    with pa.OSFile(part) as file:
        asked = Counting(file)
        assert read_entries(asked).keys() >= {INDEX, PLACES, CHECKSUM}
        assert [size for size, _ in asked.reads] == [TAIL_BYTES]
        # Ids that are longer than usual make an index that is longer than what is read at once.
        monkeypatch.setattr(part_index, "TAIL_BYTES", 3000)
        asked = Counting(file)
        assert read_entries(asked).keys() >= {INDEX, PLACES, CHECKSUM}
        assert len(asked.reads) == 2
    assert checksum_fault(Path(part).read_bytes()) == ""


class Counting:
    """A file that notes what is read of it."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.reads: list[tuple[int, int]] = []

    def size(self) -> int:
        return int(self.file.size())

    def read_at(self, size: int, offset: int) -> bytes:
        self.reads.append((size, offset))
        return bytes(self.file.read_at(size, offset))


@pytest.mark.parametrize("kind", ["jpeg", "raw", "features"])
def test_requests_grow_with_parts_and_not_with_clips(
    kind: str, s3: Any, s3_proxy: DroppingProxy, rng: np.random.Generator
) -> None:
    """320 clips took 333 requests to open, and the first one of a compacted part 323."""
    uri, ids = f"s3://videos/{kind}", clips(48)
    if kind == "features":
        write_feature_store(uri, tiny_config(), ids, rng, part=24)
    else:
        write_store(uri, JPEG if kind == "jpeg" else RAW, ids, rng, part=24)
    s3_proxy.requests.clear()
    reader = FeatureReader(uri, cache_mb=0) if kind == "features" else FrameReader(uri)
    assert len(of_parts(s3_proxy)) == 2 * 2
    s3_proxy.requests.clear()
    reader.read(ids[:1])
    assert len(of_parts(s3_proxy)) <= 3
    s3_proxy.requests.clear()
    reader.read(ids)
    assert len(of_parts(s3_proxy)) <= 48 + 2


def of_parts(proxy: DroppingProxy) -> list[str]:
    return [line for line in proxy.requests if ".parquet" in line.split("?")[0]]


@pytest.mark.parametrize("extract", [JPEG, RAW], ids=["jpeg", "raw"])
def test_a_changed_byte_never_gives_another_clip(
    extract: ExtractConfig, rng: np.random.Generator, tmp_path: Path
) -> None:
    """An index that has changed would send a reader to another clip's pictures, which are sound."""
    frames = write_store(str(tmp_path), extract, clips(8), rng, part=8)
    (part,) = [Path(one) for one in part_files(str(tmp_path), "data")]
    whole = FrameReader(str(tmp_path)).read(clips(8))[0]
    data = part.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    starts = [data.rindex(name.encode()) for name in (INDEX, PLACES)]
    for place in [
        *rng.integers(footer, len(data), 150),
        *(at + rng.integers(400) for at in starts for _ in range(50)),
    ]:
        changed = bytearray(data)
        changed[place] ^= 1 << int(rng.integers(8))
        part.write_bytes(changed)
        try:
            reader = FrameReader(str(tmp_path))
            for row, one in enumerate(clips(8)):
                if one in reader.places:
                    assert np.array_equal(reader.read([one])[0][0], whole[row]), place
        except DataError:
            continue
    assert len(frames) == 8


def test_what_looks_like_an_index_in_a_column_is_none(rng: np.random.Generator, tmp_path: Path) -> None:
    """Statistics of a part of an earlier version hold text that others wrote, such as file names."""
    other = small_part(str(tmp_path / "other"), rng, ["another"])
    with pa.OSFile(other) as file:
        entries = read_entries(file)
    forged = b"".join(
        b"\x18" + bytes([len(key)]) + key.encode() + b"\x18" + part_index._varint(len(value)) + value + b"\0"
        for key, value in entries.items()
    )
    part = small_part(str(tmp_path), rng, ["a"])
    table = read_columns(part, None).replace_schema_metadata(None)
    table = table.set_column(table.column_names.index("note"), "note", pa.array([forged.decode("latin-1")]))
    pq.write_table(table, part, row_group_size=1, compression="none", write_statistics=True)
    assert read_part_index(part) is None
    assert Store(str(tmp_path)).ids().keys() == {"a"}


def test_a_part_without_index_is_read_as_before(rng: np.random.Generator, tmp_path: Path) -> None:
    """Stores of earlier versions, and those that another program rewrote, keep their clips."""
    frames = write_store(str(tmp_path), JPEG, clips(5), rng)
    for part in part_files(str(tmp_path), "data"):
        table = pq.read_table(part).replace_schema_metadata(None)
        pq.write_table(table, part, row_group_size=1)
        assert read_part_index(part) is None
    found = Store(str(tmp_path)).clips([*IDENTITY, "num_frames"], ["rules", "absent"])
    assert found.columns["num_frames"].to_pylist() == [len(frames[one]) for one in found]
    assert found.columns["absent"].to_pylist() == [None] * 5
    assert (found.offset < 0).all()
    read, mask = FrameReader(str(tmp_path)).read(clips(5))
    assert mask.sum(axis=1).tolist() == [len(frames[one]) for one in clips(5)]
    assert read[mask].any()
