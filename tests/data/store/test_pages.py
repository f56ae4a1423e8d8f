"""Raw frames by the short way are those that any reader of Parquet sees."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gare.config import ExtractConfig
from gare.data.store.contents import frame_schema, part_files, write_part
from gare.data.store.frame_reader import FrameReader
from gare.data.store.pages import UnknownPageError, byte_arrays, low_bytes
from gare.errors import DataError
from tests.helpers.stores import describe_store, random_frames, stored_row

RAW = ExtractConfig(num_frames=4, image_size=40, encoding="raw")


def chunk_of(values: np.ndarray, **options: object) -> tuple[bytes, str]:
    """The column chunk of a list of bytes as Parquet writes it."""
    sink = io.BytesIO()
    array = pa.FixedSizeListArray.from_arrays(pa.array(values), len(values))
    settings = {"compression": "zstd", "use_dictionary": False, "column_encoding": "BYTE_STREAM_SPLIT"}
    pq.write_table(pa.table({"x": array}), sink, **(settings | options))
    column = pq.ParquetFile(sink).metadata.row_group(0).column(0)
    start = column.data_page_offset
    return sink.getvalue()[start : start + column.total_compressed_size], column.compression


def test_low_bytes_are_the_values(rng: np.random.Generator) -> None:
    """A page read wrongly would be a picture of noise, or of another clip."""
    values = rng.integers(0, 256, int(rng.integers(1, 50_000)), dtype=np.uint8)
    assert np.array_equal(np.concatenate(low_bytes(*chunk_of(values))), values)


@pytest.mark.parametrize(
    "options",
    [
        {"column_encoding": "PLAIN"},
        {"column_encoding": None, "use_dictionary": True},
        {"compression": "snappy"},
        {"data_page_version": "2.0"},
    ],
    ids=["plain", "dictionary", "snappy", "version 2"],
)
def test_other_pages_are_left_to_pyarrow(options: dict[str, object], rng: np.random.Generator) -> None:
    """Stores that others have rewritten, with their own settings, must not be read as noise."""
    with pytest.raises(UnknownPageError):
        low_bytes(*chunk_of(rng.integers(0, 256, 1000, dtype=np.uint8), **options))


def test_damaged_pages_are_errors(rng: np.random.Generator) -> None:
    """Whatever stands in the bytes: an error of a known kind, or as many values as were written."""
    chunk, codec = chunk_of(rng.integers(0, 256, 1000, dtype=np.uint8))
    for _ in range(300):
        broken = bytearray(chunk[: int(rng.integers(1, len(chunk) + 1))])
        for place in rng.integers(0, min(len(broken), 60), 2):
            broken[place] = int(rng.integers(256))
        try:
            found = low_bytes(bytes(broken), codec)
        except (UnknownPageError, OSError, ValueError, pa.ArrowException):
            continue
        assert all(page.dtype == np.uint8 for page in found)


def test_both_ways_give_the_same_frames(rng: np.random.Generator, tmp_path: Path) -> None:
    """The store is what plain readers see, and what training sees."""
    rows = [stored_row(RAW, name, random_frames(RAW, rng, count)) for name, count in (("a", 3), ("b", 4))]
    write_part(str(tmp_path), "data", rows, frame_schema(RAW))
    describe_store(str(tmp_path), RAW)
    (part,) = part_files(str(tmp_path), "data")
    plain = pq.read_table(part)["frames"].combine_chunks().to_numpy_ndarray()
    assert np.array_equal(FrameReader(str(tmp_path)).read(["a", "b"])[0], plain)
    # Rewritten by another program, which knows nothing of encodings.
    pq.write_table(pq.read_table(part), part, row_group_size=1)
    assert np.array_equal(FrameReader(str(tmp_path)).read(["a", "b"])[0], plain)


def test_a_damaged_row_is_named(rng: np.random.Generator, tmp_path: Path) -> None:
    """Noise in place of a clip would be trained on."""
    part = write_part(
        str(tmp_path), "data", [stored_row(RAW, "a", random_frames(RAW, rng, 4))], frame_schema(RAW)
    )
    describe_store(str(tmp_path), RAW)
    reader = FrameReader(str(tmp_path))
    group = pq.read_metadata(part).row_group(0)
    columns = [group.column(place) for place in range(group.num_columns)]
    column = next(one for one in columns if one.path_in_schema == "frames.list.element")
    data = bytearray(Path(part).read_bytes())
    data[column.data_page_offset + 40 : column.data_page_offset + column.total_compressed_size] = bytes(
        column.total_compressed_size - 40
    )
    Path(part).write_bytes(data)
    with pytest.raises(DataError, match="row 0 cannot be read") as caught:
        reader.read(["a"])
    assert part in str(caught.value)


def test_byte_arrays_are_the_values(rng: np.random.Generator) -> None:
    """Pictures would be cut off, or taken for others, and training go on."""
    pictures = [rng.bytes(int(size)) for size in rng.integers(0, 300_000, 20)]
    assert byte_arrays(*chunk_of_bytes([pictures])) == pictures
    assert byte_arrays(*chunk_of_bytes([pictures], data_page_size=1000)) == pictures


@pytest.mark.parametrize("values", [[[b"a", None]], [[]], [None]])
def test_missing_byte_arrays_are_not_guessed(values: list[list[bytes | None]]) -> None:
    """The reader of whole columns says which one is missing."""
    with pytest.raises(UnknownPageError):
        byte_arrays(*chunk_of_bytes(values))


@pytest.mark.parametrize(
    "options", [{"compression": "snappy"}, {"data_page_version": "2.0"}, {"use_dictionary": True}]
)
def test_byte_arrays_of_other_pages_are_left_to_pyarrow(options: dict[str, Any]) -> None:
    """A store that another program rewrote is read all the same, more slowly."""
    with pytest.raises(UnknownPageError):
        byte_arrays(*chunk_of_bytes([[b"picture"] * 4], **options))


def test_changed_bytes_of_a_picture_are_found(rng: np.random.Generator) -> None:
    """A bit that a disk turned must not become part of a picture."""
    pictures = [rng.bytes(2000)]
    chunk, codec = chunk_of_bytes([pictures])
    for place in rng.integers(0, len(chunk), 50):
        changed = bytearray(chunk)
        changed[place] ^= 1 << int(rng.integers(8))
        try:
            found = byte_arrays(bytes(changed), codec)
        except (UnknownPageError, OSError):
            continue
        assert found == pictures  # what changed was no part of it


def chunk_of_bytes(values: list[Any], **options: Any) -> tuple[bytes, str]:
    sink = pa.BufferOutputStream()
    settings = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
    array = pa.array(values, pa.list_(pa.binary()))
    pq.write_table(pa.table({"x": array}), sink, **(settings | options))
    data = sink.getvalue().to_pybytes()
    column = pq.read_metadata(pa.BufferReader(data)).row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    return data[start : start + column.total_compressed_size], column.compression
