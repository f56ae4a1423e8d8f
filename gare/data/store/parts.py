"""Parts of a store: Parquet files that appear whole or not at all and carry their own checksum.

A part's footer holds, as key-value metadata:

``gare.sha256``: SHA-256 of the whole file, in hexadecimal, computed with its own 64 digits as zeros. It is
    written in the file itself, so that no crash separates the two. Pages have CRC-32 checksums as well, which
    readers verify.
``gare.part``: the name of the file. It makes the checksum of each part unique: if a clip comes back and a
    later run writes the same rows again, they must not be taken for those that were replaced.
``gare.replaces``: JSON list of the checksums of the parts that this one replaces. They no longer count once
    this part is there, deleted or not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gare.data.store.tensor_pages import ENCODING, LEVEL
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
        rows: the requested columns, one mapping a row.
    """

    location: str
    checksum: str
    replaces: frozenset[str]
    rows: tuple[dict[str, Any], ...]

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
    # Training reads such tensors by their low bytes, see gare.data.store.tensor_pages.
    raw = [f"{field.name}.list.element" for field in table.schema if _is_tensor(field.type, pa.uint8())]
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        compression_level=dict.fromkeys(raw, LEVEL) or None,
        use_dictionary=False,
        column_encoding=dict.fromkeys(raw, ENCODING) or None,
        write_page_checksum=True,
    ) as writer:
        writer.write_table(table, row_group_size=_rows_per_group(folder, table))
        replaced = json.dumps(sorted(replaces))
        writer.add_key_value_metadata({NAME: name, REPLACES: replaced, CHECKSUM: _BLANK.decode()})
    data = bytearray(sink.getvalue())
    place = data.index(_BLANK, data.rindex(CHECKSUM.encode()))
    data[place : place + len(_BLANK)] = hashlib.sha256(data).hexdigest().encode()
    return memoryview(data)


def _rows_per_group(folder: str, table: pa.Table) -> int:
    if folder != "data":
        return max(1, len(table))
    are_features = any(_is_tensor(field.type, pa.float16()) for field in table.schema)
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
            with ThreadPoolExecutor(THREADS) as pool:
                parts = list(pool.map(lambda location: _read_part(location, columns, added), locations))
            break
        except DataError as error:
            # Merged into another and deleted since they were listed.
            if attempt == 2 or not is_part_gone(error):
                raise
    replaced = {checksum for part in parts for checksum in part.replaces}
    void = [Part(location, "", frozenset(), ()) for location in there if location not in set(locations)]
    return (
        [part for part in parts if part.checksum not in replaced],
        [part for part in parts if part.checksum in replaced] + void,
    )


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
    table = read_columns(location, columns, added)
    metadata = table.schema.metadata or {}
    # A part that another program wrote is identified by its name.
    checksum = metadata.get(CHECKSUM.encode(), location.rsplit("/", 1)[-1].encode()).decode()
    replaces = frozenset(json.loads(metadata.get(REPLACES.encode(), b"[]")))
    lacking = dict.fromkeys(name for name in added if name not in table.column_names)
    rows = [row | lacking for row in table.to_pylist()] if lacking else table.to_pylist()
    return Part(location, checksum, replaces, tuple(rows))


def read_columns(part: str, columns: Sequence[str] | None, added: Sequence[str] = ()) -> pa.Table:
    """Reads some columns of a part, or all, with its footer's metadata in the schema.

    Args:
        part: its location.
        columns: columns to read; None for all.
        added: further columns, read if the part has them.

    Raises:
        DataError: if the part is not whole Parquet or lacks a column.
    """
    filesystem, path = open_fs(part)
    try:
        with pq.ParquetFile(path, filesystem=filesystem, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            if missing := [name for name in columns or () if name not in names]:
                raise DataError(
                    f"lacks the columns {', '.join(missing)}",
                    where=part,
                    accepted="a Parquet part of a store",
                )
            some = [*(columns or ()), *(name for name in added if name in names)]
            table = file.read(columns=None if columns is None else some)
            return table.replace_schema_metadata(file.metadata.metadata)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"cannot be read: {error}", where=part, accepted="a Parquet part of a store"
        ) from error


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
