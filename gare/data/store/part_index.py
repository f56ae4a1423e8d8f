"""The index of a part: its ids, identities and counts, and where each clip's frames lie in the file.

It is part of the Parquet footer, as key-value metadata, which comes after the row groups. So the end of the
file suffices to know a part, by one request to an object store, and another one reads any clip of it. Parts
of earlier versions have none.

``gare.index``: an Arrow table, one row for each row of the part, with those of ``COLUMNS`` that it has.
``gare.places``: an Arrow table, ``gap`` and ``size`` of each clip's pages of frames in bytes (the gap lies
    before them), and as metadata the shape of a raw tensor and the bytes of each column in memory.

Both are Arrow streams, compressed with zstd, after their CRC-32 and their length, in base64.

N rows.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gare.data.store.pages import read_varint

INDEX, PLACES = "gare.index", "gare.places"
#: Bytes that are read from the end of a part. An index of 1,000 clips takes about half of it.
TAIL_BYTES = 160 * 1024
#: Name of the column of ``digest_of`` a clip's captions, which takes the place of the captions.
DIGEST = "captions_digest"
#: Columns of an index, if the part has them.
COLUMNS: dict[str, pa.DataType] = {
    "video_id": pa.string(),
    "start_s": pa.float64(),
    "end_s": pa.float64(),
    "source_bytes": pa.int64(),
    "source_version": pa.string(),
    "num_frames": pa.int32(),
    "complete": pa.bool_(),
    "rules": pa.int32(),
    DIGEST: pa.binary(16),
}
#: Value of ``gare.places`` while the part is written, before the places are known.
UNKNOWN = "?"

#: Largest index that is accepted, in bytes.
_MOST_BYTES = 2**28
_MAGIC = b"PAR1"
_HEAD = struct.Struct("<IQ")
#: Fields of Parquet's FileMetaData after the row groups, in Thrift's compact protocol: a binary, a list.
_BINARY, _LIST, _ORDER = 0x18, 0x19, b"\x1c\x00\x00"


class DamagedIndexError(ValueError):
    """An index whose bytes have changed."""


@dataclass(frozen=True)
class FramePlaces:
    """Places of clips' frames in a part, each clip's in one piece.

    Attributes:
        offset: (N,) int64, first byte in the file.
        size: (N,) int32, number of bytes.
        num_frames: (N,) int32, real frames.
        shape: of a raw tensor; None for JPEG files.
    """

    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int32]
    num_frames: npt.NDArray[np.int32]
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class PartIndex:
    """The index of a part.

    Attributes:
        table: N rows, columns as in ``COLUMNS``; all column names of the part as its metadata.
        places: of the frames; None if a row group has more than one clip.
        column_bytes: bytes of each column in memory.
    """

    table: pa.Table
    places: FramePlaces | None
    column_bytes: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def part_columns(self) -> list[str]:
        """Names of all columns of the part."""
        names: list[str] = json.loads((self.table.schema.metadata or {}).get(b"columns", b"[]"))
        return names

    def has_places_of(self, other: PartIndex) -> bool:
        """Returns True if another index names the same places and bytes."""
        if self.places is None or other.places is None:
            return self.places is other.places and self.column_bytes == other.column_bytes
        names = ("offset", "size", "num_frames")
        same = (np.array_equal(getattr(self.places, name), getattr(other.places, name)) for name in names)
        return self.places.shape == other.places.shape and all(same)

    def holds(self, columns: Sequence[str], added: Sequence[str]) -> bool:
        """Returns True if the index has these columns, and those of ``added`` that the part has."""
        names = self.table.column_names
        return {*columns} <= {*names} and {*added} & {*self.part_columns} <= {*names}


def digest_of(captions: Sequence[str]) -> bytes:
    """Returns 16 bytes that tell captions apart, whatever their number."""
    return hashlib.blake2b(json.dumps(list(captions)).encode(), digest_size=16).digest()


def packed_index(tables: Sequence[pa.Table]) -> str:
    """Returns the value of ``gare.index`` for a part, from the ``index_table`` of each piece of it."""
    return _packed(pa.concat_tables(tables))


def index_table(table: pa.Table) -> pa.Table:
    """Returns the table of a part's index, computed from all its columns."""
    columns = {
        name: table[name].combine_chunks().cast(kind)
        for name, kind in COLUMNS.items()
        if name in table.column_names
    }
    if "captions" in table.column_names:
        digests = [digest_of(captions or ()) for captions in table["captions"].to_pylist()]
        columns[DIGEST] = pa.array(digests, COLUMNS[DIGEST])
    found = pa.table(columns)
    return found.replace_schema_metadata({"columns": json.dumps(table.column_names)})


def places_of(metadata: pq.FileMetaData, schema: pa.Schema) -> str:
    """Returns the value of ``gare.places`` for a part with this footer."""
    names = [metadata.schema.column(place).path for place in range(metadata.num_columns)]
    sizes: dict[str, int] = {}
    gaps: list[int] = []
    lengths: list[int] = []
    end = 0
    leaf = names.index("frames.list.element") if "frames.list.element" in names else -1
    is_alone = leaf >= 0 and "num_frames" in names and metadata.num_row_groups == metadata.num_rows
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for place in range(len(names)) if not is_alone else ():
            chunk = group.column(place)
            column = names[place].split(".")[0]
            sizes[column] = sizes.get(column, 0) + chunk.total_uncompressed_size
        if is_alone:
            chunk = group.column(leaf)
            is_alone = chunk.compression == "ZSTD" and not chunk.has_dictionary_page
            gaps.append(chunk.data_page_offset - end)
            lengths.append(chunk.total_compressed_size)
            end = chunk.data_page_offset + chunk.total_compressed_size
    if not is_alone:
        gaps, lengths = [], []
    kind = schema.field("frames").type if leaf >= 0 else None
    shape = list(kind.shape) if isinstance(kind, pa.FixedShapeTensorType) else None
    table = pa.table({"gap": pa.array(gaps, pa.int64()), "size": pa.array(lengths, pa.int64())})
    about = {"is_alone": is_alone, "shape": shape, "column_bytes": sizes}
    return _packed(table.replace_schema_metadata({"about": json.dumps(about)}))


def with_places(data: bytes | memoryview, value: str) -> bytearray:
    """Puts the value of ``gare.places`` into a part that was written with ``UNKNOWN`` in its place."""
    view = memoryview(data)
    start = len(view) - 8 - int.from_bytes(view[-8:-4], "little")
    footer = bytes(view[start:-8])
    unknown = _entry(PLACES, UNKNOWN)
    place = footer.rindex(unknown)
    footer = footer[:place] + _entry(PLACES, value) + footer[place + len(unknown) :]
    return bytearray().join([view[:start], footer, len(footer).to_bytes(4, "little"), _MAGIC])


def read_entries(file: Any) -> dict[str, bytes]:
    """Reads the key-value metadata of an open part, by one request or two.

    Returns:
        All entries from this program's first one on; none for a part of an earlier version.

    Raises:
        OSError: if the file cannot be read.
    """
    size = file.size()
    tail = _tail(file, size)
    length = int.from_bytes(tail[-8:-4], "little")
    if tail[-4:] != _MAGIC or not 0 < length <= size - 8:
        return {}
    found = _entries(tail[:-8][-length:])
    if INDEX not in found and length > len(tail) - 8:  # longer than usual
        found = _entries(file.read_at(length, size - 8 - length))
    return found if INDEX in found else {}


def read_footer(file: Any) -> pq.FileMetaData:
    """Reads the footer of an open part, by one request or two.

    Raises:
        OSError, pyarrow.ArrowException: if it cannot be read.
    """
    size = file.size()
    tail = _tail(file, size)
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < length <= size:
        tail = file.read_at(length - len(tail), size - length) + tail
    return pq.read_metadata(pa.BufferReader(tail))


def _tail(file: Any, size: int) -> bytes:
    found: bytes = file.read_at(min(size, TAIL_BYTES), max(0, size - TAIL_BYTES))
    return found


def read_index(entries: Mapping[str, bytes]) -> PartIndex | None:
    """Reads the index from ``read_entries``; None for a part that has none.

    Raises:
        DamagedIndexError: if its bytes have changed, or it is no index.
    """
    if not entries.get(INDEX):
        return None
    try:
        table = _unpacked(entries[INDEX])
        places = _unpacked(entries.get(PLACES, b""))
        about = json.loads((places.schema.metadata or {})[b"about"])
        found = None
        if about["is_alone"]:
            size = places["size"].to_numpy()
            offset = np.cumsum(places["gap"].to_numpy() + size) - size
            counts = table["num_frames"].fill_null(pa.scalar(0, pa.int32())).to_numpy()
            # Copies, which do not keep the bytes of the whole index.
            size, counts = size.astype(np.int32), np.array(counts)
            found = FramePlaces(offset, size, counts, tuple(about["shape"]) if about["shape"] else None)
        known = all(COLUMNS[name] == table.schema.field(name).type for name in table.column_names)
        if not known or (found and len(found.size) != len(table)):
            raise DamagedIndexError("its index is not that of this part")
        return PartIndex(table, found, about["column_bytes"])
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
        if isinstance(error, DamagedIndexError):
            raise
        raise DamagedIndexError(f"its index is damaged: {error}") from error


def _packed(table: pa.Table) -> str:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table.combine_chunks())
    plain = sink.getvalue().to_pybytes()
    packed = pa.compress(plain, codec="zstd", asbytes=True)
    return base64.b64encode(_HEAD.pack(zlib.crc32(plain), len(plain)) + packed).decode()


def _unpacked(value: bytes) -> pa.Table:
    try:
        data = base64.b64decode(value, validate=True)
        checksum, size = _HEAD.unpack_from(data)
        if not size <= _MOST_BYTES:
            raise DamagedIndexError(f"its index has {size} bytes")
        plain = pa.decompress(data[_HEAD.size :], decompressed_size=size, codec="zstd", asbytes=True)
    except (binascii.Error, struct.error, OSError, pa.ArrowException) as error:
        raise DamagedIndexError(f"its index is damaged: {error}") from error
    if zlib.crc32(plain) != checksum:
        raise DamagedIndexError("the bytes of its index have changed since it was written")
    table: pa.Table = pa.ipc.open_stream(plain).read_all()
    return table


def _entry(key: str, value: str) -> bytes:
    """Returns a KeyValue of Thrift's compact protocol."""
    return b"".join([_binary(key.encode()), _binary(value.encode()), b"\0"])


def _binary(value: bytes) -> bytes:
    return bytes([_BINARY]) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _entries(footer: bytes) -> dict[str, bytes]:
    """Finds the key-value metadata at the end of a footer, of which only the end may be there.

    A list of entries counts only if it leads to the end of the footer: the statistics of columns may hold any
    bytes.
    """
    best: dict[str, bytes] = {}
    for key in (INDEX, PLACES, "gare.sha256", "gare.part", "gare.replaces"):
        start = footer.rfind(_binary(key.encode()) + bytes([_BINARY]))
        if start < 0:
            continue
        try:
            found = dict(_walk(footer, start))
        except (IndexError, ValueError):
            continue
        best = found if len(found) > len(best) else best
    return best


def _walk(footer: bytes, place: int) -> Iterator[tuple[str, bytes]]:
    while True:
        key, place = _read_binary(footer, place)
        if footer[place] != _BINARY:  # not an entry, but the name of the program that wrote it
            break
        value, place = _read_binary(footer, place)
        if footer[place]:
            raise ValueError("an entry of three fields")
        yield key.decode("latin-1"), value
        place += 1
    count, after = 0, place
    if footer[place] == _LIST:
        count, after = footer[place + 1] >> 4, place + 2
        if count == 15:
            count, after = read_varint(footer, place + 2)
    if footer[after:] != _ORDER * count + b"\0":
        raise ValueError("not the end of the footer")


def _read_binary(data: bytes, place: int) -> tuple[bytes, int]:
    if data[place] != _BINARY:
        raise ValueError("not text")
    size, place = read_varint(data, place + 1)
    if place + size > len(data):
        raise ValueError("longer than the footer")
    return data[place : place + size], place + size
