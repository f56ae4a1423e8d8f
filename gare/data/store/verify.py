"""Verification of a store: reads all of it and lists its faults.

Checks that follow from the columns' types are made for a store of any kind; frames are checked in addition.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gare.data.images import decode_jpeg, size_fault
from gare.data.store.contents import FAILURE_SCHEMA, Store, StoreMeta, fingerprint, without_added_columns
from gare.data.store.part_index import (
    INDEX,
    PLACES,
    index_table,
    packed_index,
    places_of,
    read_entries,
    read_index,
)
from gare.data.store.parts import checksum_fault, part_files, read_parts
from gare.errors import DataError
from gare.storage.files import read_bytes
from gare.storage.generations import generation_of

logger = logging.getLogger(__name__)

#: A fault: the part or file, the video (empty if no single one) and a description.
Fault = dict[str, str]


def verify(
    uri: str, schema: pa.Schema, wanted: Collection[str], threads: int = 4
) -> tuple[list[Fault], dict[str, int]]:
    """Checks that a store is whole, holds what it should, and that every value of it makes sense.

    Args:
        uri: the store.
        schema: schema that its data parts should have.
        wanted: ids of the videos that it should hold.
        threads: parts that are read at once.

    Returns:
        The faults, and the numbers of parts, videos, failures and bytes read.

    Raises:
        DataError: if there is no store.
    """
    meta = Store(uri).read_meta()
    faults: list[Fault] = []
    read = {"parts": 0, "videos": 0, "failures": 0, "bytes": 0}
    if fingerprint(meta.settings) != meta.fingerprint:
        faults.append(_fault(uri, "", "the fingerprint in _META.json is not that of its settings"))
    for folder, current in (("data", schema), ("failures", FAILURE_SCHEMA)):
        expected = list(without_added_columns(current))
        with ThreadPoolExecutor(threads) as pool:
            checked = pool.map(
                lambda part, expected=expected: _check_part(part, expected, meta), part_files(uri, folder)
            )
            for found, size in checked:
                faults += found
                read["parts"] += 1
                read["bytes"] += size
    try:
        faults += _check_ids(uri, meta, wanted, read)
    except DataError as error:  # a part without ids is listed already
        faults += [] if any(fault["part"] == error.where for fault in faults) else [_of(error)]
    return faults, read


def verify_or_raise(uri: str, schema: pa.Schema, wanted: Collection[str]) -> dict[str, Any]:
    """Runs ``verify``, logs every fault, and raises an error if there are any.

    Returns:
        The numbers of ``verify``, with an empty list of faults.

    Raises:
        DataError: for a store with faults; its ``result`` lists them all.
    """
    faults, read = verify(uri, schema, wanted)
    result = {"store": uri, "sound": not faults, **read, "faults": faults}
    for fault in faults:
        logger.error(
            "%s: %s%s", fault["part"], f"{fault['video_id']!r}: " * bool(fault["video_id"]), fault["fault"]
        )
    if faults:
        error = DataError(
            f"{len(faults)} faults, the first of them: {faults[0]['fault']}",
            where=faults[0]["part"],
            accepted="delete the parts that are named and run pipelines/extract.py, which makes them again",
        )
        error.result = result
        raise error
    return result


def _fault(part: str, video_id: str, what: str) -> Fault:
    return {"part": part, "video_id": video_id, "fault": what}


def _of(error: DataError) -> Fault:
    return _fault(error.where, "", error.what)


def _check_ids(uri: str, meta: StoreMeta, wanted: Collection[str], read: dict[str, int]) -> Iterator[Fault]:
    """Compares the rows that count with the manifest and with the counts of the last run."""
    retired = Store(uri).read_retired()
    places: dict[str, str] = {}
    parts, _ = read_parts(uri, "data", ["video_id"])
    for part in parts:
        for row in part.rows:
            video_id = row["video_id"]
            if video_id in retired.get(part.checksum, {}):
                continue
            if video_id in places and generation_of(places[video_id]) == part.generation:
                yield _fault(part.location, video_id, f"is also in {places[video_id]}")
            places[video_id] = max(places.get(video_id, part.location), part.location, key=generation_of)
    failures = Store(uri).read_failures(places)
    failed = failures.keys() & set(wanted)
    read |= {"videos": len(places), "failures": len(failed)}
    for video_id in sorted(places.keys() - set(wanted)):
        yield _fault(places[video_id], video_id, "is not in the manifest")
    for video_id in sorted(set(wanted) - places.keys() - failed):
        yield _fault(uri, video_id, "is neither stored nor failed")
    found = {"videos": len(places), "failures": len(failed), "parts": len(set(places.values()))}
    for name, count in found.items():
        if meta.counts.get(name) != count:
            yield _fault(uri, "", f"holds {count} {name}, _META.json says {meta.counts.get(name)}")
    if not meta.complete:
        yield _fault(uri, "", "the last run did not go through")


def _check_part(location: str, schemas: Sequence[pa.Schema], meta: StoreMeta) -> tuple[list[Fault], int]:
    """Returns the faults of a part, which must have one of the schemas, and its size in bytes."""
    try:
        data = read_bytes(location)
    except DataError as error:
        return [_of(error)], 0
    faults = []
    if fault := checksum_fault(data):
        faults.append(_fault(location, "", fault))
    try:
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            found = file.schema_arrow
            if not any(found.equals(schema) for schema in schemas):
                faults.append(_fault(location, "", f"has other columns: {_difference(found, schemas[0])}"))
                return faults, len(data)
            for group in range(file.num_row_groups):
                faults += _check_group(location, file, group, meta)
            faults += _check_index(location, data, file)
    except (OSError, ValueError, pa.ArrowException) as error:
        if not fault:
            faults.append(_fault(location, "", f"cannot be read: {error}"))
    return faults, len(data)


def _check_index(location: str, data: bytes, file: pq.ParquetFile) -> Iterator[Fault]:
    """Compares the index of a part, if it has one, with its columns and its footer."""
    index = read_index(read_entries(pa.BufferReader(data)))
    if not index:
        return
    expected = index_table(file.read(columns=[*{*file.schema_arrow.names} - {"frames", "text", "words"}]))
    names = index.table.column_names
    if len(expected) != len(index.table) or not expected.select(names).equals(index.table):
        yield _fault(location, "", "its index does not say what its columns say")
    places = read_index(
        {
            INDEX: packed_index([expected]).encode(),
            PLACES: places_of(file.metadata, file.schema_arrow).encode(),
        }
    )
    assert places
    if not places.has_places_of(index):
        yield _fault(location, "", "its index says that frames lie where they do not")


def _difference(found: pa.Schema, expected: pa.Schema) -> str:
    columns = [{name: str(schema.field(name).type) for name in schema.names} for schema in (found, expected)]
    names = dict.fromkeys([*columns[1], *columns[0]])
    return "; ".join(
        f"{name} is {columns[0].get(name, 'missing')}, not {columns[1].get(name, 'there')}"
        for name in names
        if columns[0].get(name) != columns[1].get(name)
    )


def _check_group(location: str, file: pq.ParquetFile, group: int, meta: StoreMeta) -> Iterator[Fault]:
    """Checks a row group: one clip of a data part, or all rows of a failures part."""
    try:
        table = file.read_row_group(group)
    except (OSError, ValueError, pa.ArrowException) as error:
        yield _fault(location, "", f"row group {group} cannot be read: {error}")
        return
    for index in range(len(table)):
        row = table.slice(index, 1)
        video_id = row["video_id"][0].as_py()
        if not video_id:
            yield _fault(location, "", f"row group {group} has no video_id")
        for name in row.column_names:
            if not _is_finite(row[name]):
                yield _fault(location, video_id, f"{name} is not finite")
        if meta.kind == "frames" and "frames" in row.column_names:
            for what in _check_frames(row, meta.settings):
                yield _fault(location, video_id, what)


def _is_finite(column: pa.ChunkedArray[Any]) -> bool:
    """Returns True if all floats of a column are finite, however nested; nulls are ignored."""
    array: Any = column.combine_chunks()
    while isinstance(array, pa.ExtensionArray | pa.ListArray | pa.FixedSizeListArray):
        array = array.storage if isinstance(array, pa.ExtensionArray) else array.flatten()
    if not pa.types.is_floating(array.type):
        return True
    return bool(np.isfinite(array.drop_null().to_numpy(zero_copy_only=False)).all())


def _check_frames(row: pa.Table, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yields the faults of one clip of a frame store."""
    count = row["num_frames"][0].as_py()
    most, size = int(settings["num_frames"]), int(settings["image_size"])
    if count is None or not 1 <= count <= most:
        yield f"has {count} frames, not 1 to {most}"
        return
    idx, times = row["frame_idx"][0].as_py() or [], row["frame_time_s"][0].as_py() or []
    if (len(idx), len(times)) != (count, count):
        yield f"has {count} frames, {len(idx)} positions and {len(times)} times"
    if None in idx or None in times:
        yield "has a frame without position or time"
        return
    if any(position < 0 for position in idx):
        yield "has a frame at a position below 0"
    if not all(earlier <= later for earlier, later in itertools.pairwise(times)):
        yield "its frames are not in order of time"
    duration_s = row["duration_s"][0].as_py() or 0.0
    if times and not times[-1] - times[0] <= duration_s + 1:
        yield f"its frames cover {times[-1] - times[0]:g} s of a video of {duration_s:g} s"
    if isinstance(row.schema.field("frames").type, pa.FixedShapeTensorType):
        frames: Any = row["frames"].combine_chunks()
        if frames.to_numpy_ndarray()[0, count:].any():
            yield "has pictures behind its last frame"
        return
    jpegs = row["frames"][0].as_py() or []
    if len(jpegs) != count:
        yield f"has {count} frames and {len(jpegs)} pictures"
    shape: tuple[int, ...] | None = None if settings.get("crop") == "none" else (size, size, 3)
    for position, jpeg in enumerate(jpegs):
        try:
            picture = decode_jpeg(jpeg or b"")
        except DataError as error:
            yield f"frame {position}: {error.what}"
            continue
        if fault := size_fault(picture, size, shape):
            yield f"frame {position} is {fault}"
        else:
            shape = picture.shape
