"""Compaction of a store of any kind: merges small parts and leaves out rows that no longer count.

Parts of earlier versions are written anew, with an index, whatever their size.

In its footer, the merged part names the parts that it replaces. They stop counting in one step, when it
appears, and are deleted only then. A crash at any moment leaves each row once. If no row is left, the merged
part is empty; the next compaction deletes it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from gare.data.store.clip_places import ClipPlaces
from gare.data.store.contents import FAILURE_SCHEMA, IDENTITY, NO_LOCK, Store, rules_of, with_added_columns
from gare.data.store.parts import (
    Part,
    checksum_fault,
    encode_part,
    part_name_of_group,
    put_part,
    read_parts,
    write_table,
)
from gare.errors import DataError
from gare.storage.files import delete_file, read_bytes, stat_file
from gare.storage.generations import HeldStore

logger = logging.getLogger(__name__)


def compact(uri: str, part_bytes: int, held: HeldStore = NO_LOCK) -> dict[str, int]:
    """Merges parts until each is of about ``part_bytes``.

    Args:
        uri: the store.
        part_bytes: size of a merged part; parts of at least half of it stay as they are, if they have an
            index.
        held: the lock of the store; its check is called before each change, and raises an error to end the
            work.

    Returns:
        ``parts_before``, ``parts_after`` and ``rows_left_out``.

    Raises:
        DataError: for a damaged part, an id in two parts of one generation, or if the store cannot be
            written. Parts merged until then stay.
    """
    store = Store(uri)
    meta = store.read_meta()
    # From here on, a job that lost the lock cannot replace it, if the storage has conditional writes.
    store.write_retired(store.read_retired(), held)
    stored = store.clips((), ["rules"])
    retired = store.read_retired()
    parts, replaced = read_parts(uri, "data", ["video_id"])
    _delete(replaced, held.raise_if_lost)
    left_out, gone = 0, set[str]()
    for group in _groups(parts, retired, part_bytes):
        table = _joined([_live_rows(part, retired, stored) for part in group])
        ids = [str(video_id) for video_id in table["video_id"].to_pylist()]
        # Even without rows: a job that loses the lock before it deletes must not delete parts that its
        # successor counts.
        if any(len(part) for part in group):
            checksums = [part.checksum for part in group]
            name = part_name_of_group([*ids, *checksums], held.generation)
            data = encode_part("data", name, table, checksums)
            held.raise_if_lost()
            merged = put_part(uri, "data", name, data)
            logger.info("merged %d parts into %s, with %d clips", len(group), merged, len(ids))
        left_out += sum(map(len, group)) - len(ids)
        _delete(group, held.raise_if_lost)
        gone.update(part.checksum for part in group)
    store.write_retired({key: rows for key, rows in retired.items() if key not in gone}, held)
    _compact_failures(uri, stored, held)
    after = len(store.ids().used_parts())
    if "parts" in meta.counts:
        store.write_meta(dataclasses.replace(meta, counts=meta.counts | {"parts": after}), held)
    return {"parts_before": len(parts) + len(replaced), "parts_after": after, "rows_left_out": left_out}


def _groups(
    parts: Sequence[Part], retired: Mapping[str, Mapping[str, str]], part_bytes: int
) -> Iterator[list[Part]]:
    """Groups parts that become one part each, in order of name."""
    group: list[Part] = []
    total = 0.0
    for part in parts:
        dead = len(retired.get(part.checksum, {}))
        size = float((stat_file(part.location) or (0, 0))[0])
        if not dead and size >= part_bytes / 2 and part.is_indexed:
            continue
        size *= (len(part) - dead) / max(1, len(part))
        if group and total + size > part_bytes:
            yield from _worth_it(group, retired)
            group, total = [], 0.0
        group.append(part)
        total += size
    yield from _worth_it(group, retired)


def _worth_it(group: list[Part], retired: Mapping[str, Mapping[str, str]]) -> Iterator[list[Part]]:
    if len(group) > 1 or any(
        part.checksum in retired or not len(part) or not part.is_indexed for part in group
    ):
        yield group


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Joins the rows of parts; rows of earlier versions get nulls in columns that they lack."""
    # Columns are only ever added, so that the longest schema has all of them.
    schema = max((table.schema for table in tables), key=len)
    return pa.concat_tables([with_added_columns(table, schema) for table in tables])


def _live_rows(
    part: Part,
    retired: Mapping[str, Mapping[str, str]],
    stored: ClipPlaces,
) -> pa.Table:
    data = read_bytes(part.location)
    # A damaged part must not get a new checksum that hides the damage.
    if fault := checksum_fault(data):
        raise DataError(
            fault,
            where=part.location,
            accepted="delete it and run pipelines/extract.py, which makes it again",
        )
    table = pq.read_table(pa.BufferReader(data)).replace_schema_metadata(None)
    dead = retired.get(part.checksum, {})
    ids = part.table["video_id"]
    # Otherwise an older generation's row beside a newer one would count by the merged part's number.
    live = [
        index
        for index, (video_id, place) in enumerate(zip(ids.to_pylist(), stored.find(ids), strict=True))
        if video_id not in dead
        and place >= 0
        and stored.row[place] == index
        and stored.parts[stored.part[place]] == part.location
    ]
    return pa.concat_tables([table.slice(index, 1) for index in live] or [table.slice(0, 0)])


def _delete(parts: Sequence[Part], check: Callable[[], None]) -> None:
    for part in parts:
        check()
        delete_file(part.location)


def _compact_failures(uri: str, stored: ClipPlaces, held: HeldStore) -> None:
    """Merges failures: keeps the last one of each video that is still failed, in one part.

    Failures of earlier versions of its file and of other stages stay: the attempts are counted by them.
    """
    parts, replaced = read_parts(uri, "failures", ["video_id"])
    _delete(replaced, held.raise_if_lost)
    last = {
        tuple(row[key] for key in ("video_id", "stage", *IDENTITY)): row
        for row in Store(uri).all_failures()
        # A stored row may have been refused since by later rules, and not be retired yet.
        if (place := stored.ids.find(row["video_id"])) < 0
        or rules_of(row) > (stored.columns["rules"][place].as_py() or 1)
    }
    rows = list(last.values())
    if sum(len(part.rows) for part in parts) == len(rows) and len(parts) < 2:
        return
    if any(part.rows for part in parts):
        checksums = [part.checksum for part in parts]
        table = pa.Table.from_pylist(rows, FAILURE_SCHEMA)
        group = [*(row["video_id"] for row in rows), *checksums]
        held.raise_if_lost()
        write_table(uri, "failures", table, group, checksums, held.generation)
    _delete(parts, held.raise_if_lost)
