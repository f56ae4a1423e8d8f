"""Parts of a store: Parquet files that appear whole or not at all and carry their own checksum.

A part's footer holds, as key-value metadata:

``gare.sha256``: SHA-256 of the whole file, in hexadecimal, computed with its own 64 digits as zeros. It is
    written in the file itself, so that no crash separates the two. Pages have CRC-32 checksums as well, which
    readers verify.
``gare.part``: the name of the file. It makes the checksum of each part unique: if a clip comes back and a
    later run writes the same rows again, they must not be taken for those that were replaced.
``gare.replaces``: JSON list of the checksums of the parts that this one replaces. They no longer count once
    this part is there, deleted or not.
``gare.index``, ``gare.places``: see ``gare.data.store.part_index``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gare.data.store.pages import ENCODING, LEVEL
from gare.data.store.part_index import (
    COLUMNS,
    DIGEST,
    INDEX,
    PLACES,
    UNKNOWN,
    FramePlaces,
    PartIndex,
    digest_of,
    index_table,
    packed_index,
    places_of,
    read_entries,
    read_index,
    with_places,
)
from gare.errors import DataError
from gare.storage.files import exists, join, list_files, open_fs, read_bytes, write_atomically
from gare.storage.generations import generation_of, newest_generation, part_name
from gare.storage.patience import has_os_error

CHECKSUM, NAME, REPLACES = "gare.sha256", "gare.part", "gare.replaces"
#: Files that are opened at once: most of the time is spent waiting, above all for an object store.
THREADS = 16
#: Clips of a row group of features, which are small: reading one clip reads the whole group.
FEATURES_PER_GROUP = 16
_BLANK = b"0" * 64


@dataclass(frozen=True)
class Part:
    """A part as its footer describes it.

    Attributes:
        location: location of the file.
        checksum: SHA-256 stated in the footer, by which other parts refer to it.
        replaces: checksums of the parts that it replaces.
        table: the requested columns; those that a part of an earlier version lacks are null.
        places: of its frames, if it has an index of them.
        column_bytes: bytes of each column of features in memory; None if the part has no index.
    """

    location: str
    checksum: str
    replaces: frozenset[str]
    table: pa.Table
    places: FramePlaces | None = None
    column_bytes: Mapping[str, int] | None = None

    @property
    def is_indexed(self) -> bool:
        """True if it has an index."""
        return self.column_bytes is not None

    @cached_property
    def rows(self) -> tuple[dict[str, Any], ...]:
        """The requested columns, one mapping a row."""
        return tuple(self.table.to_pylist())

    def __len__(self) -> int:
        return len(self.table)

    @property
    def generation(self) -> int:
        """Generation that wrote the part, see ``gare.storage.generations``."""
        return generation_of(self.location)


def write_part(
    uri: str,
    folder: str,
    rows: Sequence[Mapping[str, Any]],
    schema: pa.Schema,
    group: Sequence[str] | None = None,
    generation: int = 0,
) -> str:
    """Writes one part, named by its group, so that a group written twice is one part.

    Args:
        uri: the store.
        folder: ``data`` or ``failures``.
        rows: one mapping a clip, with a ``video_id``.
        schema: of the part.
        group: strings that name the part: a mark of the run and the ids of all videos tried together, of
            which ``rows`` ended in this folder; by default the ids of the rows. A group that is tried again
            after a crash may have other results (deadlines vary) and must replace its part, not add a second
            one.
        generation: of the writer, see ``gare.storage.generations``.

    Returns:
        The location of the part.
    """
    group = [row["video_id"] for row in rows] if group is None else group
    return write_table(uri, folder, table_of(rows, schema), group, generation=generation)


def table_of(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Builds a table of rows; tensors are given as bytes of the exact size."""
    columns = [_column([row[field.name] for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def write_table(
    uri: str,
    folder: str,
    table: pa.Table,
    group: Sequence[str],
    replaces: Iterable[str] = (),
    generation: int = 0,
) -> str:
    """Writes a table as one part; each clip of frames is a row group, to be read by itself.

    Args:
        uri: the store.
        folder: ``data`` or ``failures``.
        table: with the columns of the part.
        group: see ``write_part``.
        replaces: checksums of the parts that this one replaces.
        generation: of the writer.

    Returns:
        The location of the part.
    """
    name = part_name_of_group(group, generation)
    return put_part(uri, folder, name, encode_part(folder, name, table, replaces))


def part_name_of_group(group: Sequence[str], generation: int = 0) -> str:
    """Returns the file name of a part; see ``write_part`` for the arguments."""
    return part_name(generation, hashlib.sha256("\n".join(sorted(group)).encode()).hexdigest()[:20])


def put_part(uri: str, folder: str, name: str, data: memoryview) -> str:
    """Writes the bytes that ``encode_part`` made under this name; returns the location."""
    location = join(uri, folder, name)
    write_atomically(location, data)
    return location


def encode_part(folder: str, name: str, table: pa.Table, replaces: Iterable[str] = ()) -> memoryview:
    """Encodes a part of this name, with its checksum; see ``write_table`` for the other arguments."""
    encoder = PartEncoder(folder, table.schema)
    encoder.add(table)
    return encoder.finish(name, replaces)


class PartEncoder:
    """Encoder of one part, whose rows come piece by piece and are held in compressed form alone.

    Args:
        folder: ``data`` or ``failures``.
        schema: of the part.
    """

    def __init__(self, folder: str, schema: pa.Schema) -> None:
        self._schema, self._is_indexed = schema, folder == "data" and "video_id" in schema.names
        self._rows_per_group = _rows_per_group(folder, schema)
        self._indexes: list[pa.Table] = []
        # Training reads such tensors by their low bytes, see gare.data.store.pages.
        raw = [f"{field.name}.list.element" for field in schema if _is_tensor(field.type, pa.uint8())]
        self._sink = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(
            self._sink,
            schema,
            compression="zstd",
            compression_level=dict.fromkeys(raw, LEVEL) or None,
            use_dictionary=False,
            column_encoding=dict.fromkeys(raw, ENCODING) or None,
            write_page_checksum=True,
            # Those of frames would be whole pictures in the footer.
            write_statistics=[name for name in ("video_id",) if name in schema.names],
        )

    def add(self, table: pa.Table) -> None:
        """Adds rows, perhaps none; pieces of features have whole row groups, but for the last one."""
        if len(table):  # Parquet would get a row group without rows, and the clips no places
            self._writer.write_table(table, row_group_size=self._rows_per_group or len(table))
        if self._is_indexed:
            self._indexes.append(index_table(table))

    def finish(self, name: str, replaces: Iterable[str] = ()) -> memoryview:
        """Returns the bytes of the part; see ``write_table`` for the arguments."""
        metadata = {NAME: name, REPLACES: json.dumps(sorted(replaces)), CHECKSUM: _BLANK.decode()}
        if self._is_indexed:
            metadata |= {INDEX: packed_index(self._indexes), PLACES: UNKNOWN}
        self._writer.add_key_value_metadata(metadata)
        self._writer.close()
        written = self._sink.getvalue()
        if self._is_indexed:
            places = places_of(pq.read_metadata(pa.BufferReader(written)), self._schema)
            data = with_places(memoryview(written), places)
        else:
            data = bytearray(written)
        place = data.index(_BLANK, data.rindex(CHECKSUM.encode()))
        data[place : place + len(_BLANK)] = hashlib.sha256(data).hexdigest().encode()
        return memoryview(data)


def _rows_per_group(folder: str, schema: pa.Schema) -> int:
    """Returns the rows of a row group; 0 for all."""
    if folder != "data":
        return 0
    are_features = any(_is_tensor(field.type, pa.float16()) for field in schema)
    return FEATURES_PER_GROUP if are_features else 1


def _is_tensor(kind: pa.DataType, of: pa.DataType) -> bool:
    return isinstance(kind, pa.FixedShapeTensorType) and kind.value_type == of


def checksum_fault(data: bytes) -> str:
    """Checks the bytes of a part against their checksum; returns the fault in words, or empty."""
    try:
        metadata = pq.read_metadata(pa.BufferReader(data)).metadata or {}
    except (OSError, ValueError, pa.ArrowException) as error:
        return f"is not whole Parquet: {error}"
    stated = metadata.get(CHECKSUM.encode(), b"")
    place = data.rfind(stated)
    if len(stated) != len(_BLANK) or place < 0:
        return "carries no checksum"
    digest = hashlib.sha256(data[:place])
    digest.update(_BLANK)
    digest.update(data[place + len(_BLANK) :])
    return "" if digest.hexdigest().encode() == stated else "its bytes have changed since it was written"


def is_part_gone(error: DataError) -> bool:
    """True if a part cannot be read because it is gone: it has been merged into another meanwhile.

    An object store does not report this for an open part, so the part is looked up after any read error; a
    storage that does not answer does not count as gone.
    """
    if not isinstance(error.__cause__, OSError):
        return False
    if isinstance(error.__cause__, FileNotFoundError):
        return True
    try:
        return not exists(error.where)
    except DataError:
        return False


def is_content_fault(error: DataError) -> bool:
    """True if a part cannot be read because of its content, not because of the storage.

    pyarrow raises OSError both for changed bytes of a page and for a storage that does not answer, so the
    whole part is read and compared with its checksum.

    Args:
        error: error of reading the part at its ``where``.

    Raises:
        DataError: if the storage does not answer, or the part is gone.
    """
    return not has_os_error(error) or bool(checksum_fault(read_bytes(error.where)))


def part_files(uri: str, folder: str) -> list[str]:
    """Lists the locations of all parts of a store, sorted, including those that do not count."""
    return list_files(join(uri, folder), ".parquet")


def read_parts(
    uri: str, folder: str, columns: Sequence[str], added: Sequence[str] = ()
) -> tuple[list[Part], list[Part]]:
    """Reads the parts that count, and lists those that may be deleted, each sorted.

    The latter are replaced by others, or void: written by a job after another took its place. Void parts come
    without rows.

    Args:
        uri: the store.
        folder: ``data`` or ``failures``.
        columns: columns to read.
        added: further columns, which parts of earlier versions lack; their rows have None there.

    Raises:
        DataError: for a part that cannot be read.
    """
    for attempt in range(3):
        try:
            there, locations = _listed(uri, folder)
            parts = read_these_parts(locations, columns, added)
            break
        except DataError as error:
            # Merged into another and deleted since they were listed.
            if attempt == 2 or not is_part_gone(error):
                raise
    replaced = {checksum for part in parts for checksum in part.replaces}
    void = [
        Part(location, "", frozenset(), pa.table({})) for location in there if location not in set(locations)
    ]
    return (
        [part for part in parts if part.checksum not in replaced],
        [part for part in parts if part.checksum in replaced] + void,
    )


def read_these_parts(
    locations: Sequence[str], columns: Sequence[str], added: Sequence[str] = ()
) -> list[Part]:
    """Reads parts, whether they count or not; see ``read_parts`` for the other arguments.

    Raises:
        DataError: for a part that cannot be read.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda location: _read_part(location, columns, added), locations))


def _listed(uri: str, folder: str) -> tuple[list[str], list[str]]:
    """Lists the locations of all parts, and of those that are not void.

    Raises:
        DataError: if they cannot be listed, or are merged again and again meanwhile.
    """
    for _ in range(3):
        there = part_files(uri, folder)
        # Read after the listing: a part that appeared before a fence was written may count, and one that was
        # listed after that is recognised as void.
        locations = newest_generation(uri).parts_that_count(folder, there) if there else []
        # A fence does not name parts that are gone. So a part that was merged into another after the listing
        # looks void; a part that is still there was void when the fence was made.
        if len(locations) == len(there) or not set(there).difference(locations, part_files(uri, folder)):
            return there, locations
    raise DataError(
        "other jobs keep merging its parts while it is read", where=uri, accepted="try again later"
    )


def _read_part(location: str, columns: Sequence[str], added: Sequence[str]) -> Part:
    with _opened(location) as file:
        entries = read_entries(file)
        if (index := read_index(entries)) and index.holds(columns, added):
            table = index.table.select(
                [name for name in (*columns, *added) if name in index.part_columns or name == DIGEST]
            )
            # A copy, so that the rest of the index does not stay in memory with it.
            table = table.replace_schema_metadata(None).take(np.arange(len(table)))
        else:
            table = _columns_of(location, file, *_without_digest(columns, added))
            entries = {key.decode(): value for key, value in (table.schema.metadata or {}).items()}
            table = table.replace_schema_metadata(None)
        # A part that another program wrote is identified by its name.
        checksum = entries.get(CHECKSUM, location.rsplit("/", 1)[-1].encode()).decode()
        replaces = frozenset(json.loads(entries.get(REPLACES, b"[]")))
    table = _with_digest(table, columns)
    for name in added:
        if name not in table.column_names:
            nulls: Any = pa.array([None] * len(table), COLUMNS.get(name, pa.null()))
            table = table.append_column(name, nulls)
    table = table.select([*dict.fromkeys([*columns, *added])])
    known = (index.places, index.column_bytes) if index else (None, None)
    return Part(location, checksum, replaces, table, *known)


def _without_digest(columns: Sequence[str], added: Sequence[str]) -> tuple[list[str], Sequence[str]]:
    return ["captions" if name == DIGEST else name for name in columns], added


def _with_digest(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    if DIGEST not in columns or DIGEST in table.column_names:
        return table
    digests = [digest_of(captions or ()) for captions in table["captions"].to_pylist()]
    return table.append_column(DIGEST, pa.array(digests, COLUMNS[DIGEST]))


@contextmanager
def _opened(part: str) -> Iterator[Any]:
    """Opens a part, and names it if it cannot be read."""
    try:
        filesystem, path = open_fs(part)
        with filesystem.open_input_file(path) as file:
            yield file
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"cannot be read: {error}", where=part, accepted="a Parquet part of a store"
        ) from error


def read_part_index(part: str) -> PartIndex | None:
    """Reads the index of a part; None if it has none.

    Raises:
        DataError: if the part cannot be read, or its index is damaged.
    """
    with _opened(part) as file:
        return read_index(read_entries(file))


def read_columns(part: str, columns: Sequence[str] | None, added: Sequence[str] = ()) -> pa.Table:
    """Reads some columns of a part, or all, with its footer's metadata in the schema.

    Args:
        part: its location.
        columns: columns to read; None for all.
        added: further columns, read if the part has them.

    Raises:
        DataError: if the part is not whole Parquet or lacks a column.
    """
    with _opened(part) as file:
        return _columns_of(part, file, columns, added)


def _columns_of(part: str, stream: Any, columns: Sequence[str] | None, added: Sequence[str]) -> pa.Table:
    # Not as a context: the caller closes the stream.
    file = pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=True)
    names = file.schema_arrow.names
    if missing := [name for name in columns or () if name not in names]:
        raise DataError(
            f"lacks the columns {', '.join(missing)}", where=part, accepted="a Parquet part of a store"
        )
    some = [*(columns or ()), *(name for name in added if name in names)]
    table: pa.Table = file.read(columns=None if columns is None else some)
    return table.replace_schema_metadata(file.metadata.metadata)


def _column(values: Sequence[Any], kind: pa.DataType) -> pa.Array[Any]:
    if not isinstance(kind, pa.FixedShapeTensorType):
        return pa.array(values, kind)
    # Tensors come as bytes of the exact size; storage is a fixed-size list over one flat buffer.
    flat = pa.Array.from_buffers(
        kind.value_type,
        sum(map(len, values)) // (kind.value_type.bit_width // 8),
        [None, pa.py_buffer(b"".join(values))],
    )
    storage = pa.FixedSizeListArray.from_arrays(flat, math.prod(kind.shape))
    return pa.ExtensionArray.from_storage(kind, storage)
