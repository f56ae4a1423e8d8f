"""The clips of a store with their places, as arrays: a store may have millions, and each loader holds them.

N clips, P parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gare.data.store.part_index import COLUMNS
from gare.data.store.parts import Part
from gare.errors import DataError

#: Columns that ``ClipPlaces.of`` adds: part and row of a clip, and where its frames lie.
_PLACES = ("#part", "#row", "#offset", "#size", "#frames")
_PART, _ROW, _OFFSET, _SIZE, _FRAMES = _PLACES


class Ids(Sequence[str]):
    """Ids as one array, which takes about as many bytes as they do.

    Args:
        ids: without null.
    """

    def __init__(self, ids: pa.Array[Any]) -> None:
        array: Any = ids.cast(pa.large_binary())
        _, offsets, data = array.buffers()
        self._offsets = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
        self._data = memoryview(data if data is not None else b"").cast("B")

    @classmethod
    def of(cls, ids: Iterable[str]) -> Self:
        """Returns ids as an array."""
        return cls(pa.array(ids, pa.large_string()))

    @property
    def array(self) -> pa.Array[Any]:
        """The ids as an Arrow array, without a copy of their bytes."""
        buffers: list[Any] = [None, pa.py_buffer(cast("Any", self._offsets)), pa.py_buffer(self._data)]
        return cast("pa.Array[Any]", pa.Array.from_buffers(pa.large_string(), len(self), buffers))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.array,)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return str(self._bytes(place % len(self)), "utf-8")

    def _bytes(self, place: int) -> memoryview:
        return self._data[self._offsets[place] : self._offsets[place + 1]]


class SortedIds(Ids):
    """Different ids in the order of their UTF-8 bytes.

    Args:
        ids: sorted, without null.
    """

    def find(self, one: object) -> int:
        """Returns the place of an id; -1 if it is not there."""
        if not isinstance(one, str):
            return -1
        wanted = one.encode("utf-8", "surrogatepass")
        place = self._first_from(wanted)
        return place if place < len(self) and self._bytes(place) == wanted else -1

    def places(self, ids: pa.Array[Any] | pa.ChunkedArray[Any]) -> npt.NDArray[np.int64]:
        """Returns the place of each id; -1 for those that are not there.

        It looks at those between the first and the last of them alone: clips that are compared piece by piece
        in their order cost as much as there are of them.
        """
        wanted = ids.cast(pa.large_string())
        bounds: Any = pc.min_max(wanted)
        if not bounds["min"].is_valid:
            return np.full(len(wanted), -1, np.int64)
        first, last = (self._first_from(bounds[name].as_py().encode()) for name in ("min", "max"))
        found: Any = pc.index_in(wanted, value_set=self.array.slice(first, last + 1 - first))
        places = found.fill_null(-1).to_numpy().astype(np.int64)
        places[places >= 0] += first
        return cast("npt.NDArray[np.int64]", places)

    def _first_from(self, wanted: bytes) -> int:
        """Returns the place of the first id that is not before these bytes."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if bytes(self._bytes(middle)) < wanted:
                low = middle + 1
            else:
                high = middle
        return low

    def __contains__(self, one: object) -> bool:
        return self.find(one) >= 0


@dataclass(frozen=True, eq=False)
class ClipPlaces(Mapping[str, tuple[str, int]]):
    """The clips of a store that count: id → (part, row), in the order of the ids.

    Attributes:
        parts: P locations.
        ids: N ids, sorted.
        part: (N,) int32, place of each clip's part in ``parts``.
        row: (N,) int32, row in the part.
        offset: (N,) int64, first byte of its frames in the file; -1 if the part has no index.
        size: (N,) int32, bytes of its frames.
        num_frames: (N,) int32, number of real frames; 0 if the part has no index.
        shapes: of the raw frames of each part; None for JPEG files.
        column_bytes: bytes of each column of features in memory, of each part; None if it has no index.
        columns: N rows, further columns in the same order.
    """

    parts: tuple[str, ...]
    ids: SortedIds
    part: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int32]
    num_frames: npt.NDArray[np.int32]
    shapes: tuple[tuple[int, ...] | None, ...]
    column_bytes: tuple[Mapping[str, int] | None, ...]
    columns: pa.Table

    @classmethod
    def of(
        cls,
        uri: str,
        parts: Sequence[Part],
        retired: Mapping[str, Mapping[str, str]],
        columns: Sequence[str] = (),
    ) -> ClipPlaces:
        """Finds the rows that count. If a job and its successor have both written a clip, the newer counts.

        Args:
            uri: the store.
            parts: its parts that count, with ``video_id`` and further columns.
            retired: rows of them that do not count: checksum of the part → video id → why.
            columns: names of the further columns, for a store without parts.

        Raises:
            DataError: for a clip that two parts of its newest generation hold.
        """
        pieces = [
            _live_rows(number, part, retired.get(part.checksum, {})) for number, part in enumerate(parts)
        ]
        if not pieces:
            none = {name: pa.array([], COLUMNS.get(name, pa.null())) for name in ("video_id", *columns)}
            pieces = [_rows_of(0, Part("", "", frozenset(), pa.table(none)))]
        table = pa.concat_tables(pieces, promote_options="default")
        del pieces
        generations = np.array([part.generation for part in parts] or [0], np.int64)
        order = _newest(uri, table, generations, parts)
        # Column by column, since each is in memory twice meanwhile.
        taken = {name: _whole(table[name].take(order)) for name in columns}
        others = set(table.column_names) - {"video_id", *_PLACES, *columns}
        return cls(
            parts=tuple(part.location for part in parts),
            ids=SortedIds(_whole(table["video_id"].take(order))),
            part=_numbers(table, _PART, order),
            row=_numbers(table, _ROW, order),
            offset=_numbers(table, _OFFSET, order),
            size=_numbers(table, _SIZE, order),
            num_frames=_numbers(table, _FRAMES, order),
            shapes=tuple(part.places.shape if part.places else None for part in parts),
            column_bytes=tuple(part.column_bytes for part in parts),
            columns=pa.table(taken | {name: _whole(table[name].take(order)) for name in sorted(others)}),
        )

    def without_columns(self) -> ClipPlaces:
        """Returns the places alone."""
        return replace(self, columns=self.columns.select([]))

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        return (self.ids[place] for place in range(len(self.ids)))

    def __contains__(self, video_id: object) -> bool:
        return video_id in self.ids

    def __getitem__(self, video_id: str) -> tuple[str, int]:
        place = self.ids.find(video_id)
        if place < 0:
            raise KeyError(video_id)
        return self.parts[self.part[place]], int(self.row[place])

    def find(self, video_ids: pa.Array[Any] | pa.ChunkedArray[Any]) -> npt.NDArray[np.int64]:
        """Returns the place of each id in the arrays; -1 for those that are not there."""
        return self.ids.places(video_ids)

    def taken(self, column: str, video_ids: Sequence[str]) -> list[Any]:
        """Returns a column's values of clips; None for those that are not there."""
        places = self.find(pa.array(video_ids, pa.string()))
        values: Any = self.columns[column]
        return cast("list[Any]", values.take(pa.array(places, mask=places < 0)).to_pylist())

    def used_parts(self) -> list[str]:
        """Returns the parts that hold a clip that counts."""
        return [self.parts[number] for number in np.unique(self.part)]


def _live_rows(number: int, part: Part, retired: Mapping[str, str]) -> pa.Table:
    table = _rows_of(number, part)
    if not retired or not len(table):
        return table
    gone = pc.is_in(table["video_id"], value_set=pa.array(list(retired), pa.string()))
    return table.filter(pc.invert(gone))


def _rows_of(number: int, part: Part) -> pa.Table:
    count = len(part.table)
    rows: dict[str, Any] = {_PART: np.full(count, number, np.int32), _ROW: np.arange(count, dtype=np.int32)}
    places = part.places
    rows[_OFFSET] = places.offset if places else np.full(count, -1, np.int64)
    rows[_SIZE] = places.size if places else np.zeros(count, np.int32)
    rows[_FRAMES] = places.num_frames if places else np.zeros(count, np.int32)
    table = part.table
    for name, values in rows.items():
        table = table.append_column(name, pa.array(values))
    # One large string array in the end: all ids together may exceed 2 GB.
    column = table["video_id"].cast(pa.large_string())
    return table.set_column(table.column_names.index("video_id"), "video_id", column)


def _newest(uri: str, table: pa.Table, generations: npt.NDArray[np.int64], parts: Sequence[Part]) -> Any:
    """Returns the rows in the order of their ids, of each id that of the newest generation."""
    if not len(table):
        return pa.array([], pa.int64())
    part = _whole(table[_PART]).to_numpy()
    number = generations[part]
    ranked = table.select(["video_id"]).append_column("rank", pa.array(-number))
    order = pc.sort_indices(ranked, sort_keys=[("video_id", "ascending"), ("rank", "ascending")]).to_numpy()
    ids = _whole(table["video_id"].take(pa.array(order)))
    same = pc.equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False) if len(ids) > 1 else np.empty(0, bool)
    first = np.concatenate([[True], ~same])
    if same.any():
        doubled = np.flatnonzero(first[:-1] & same & (number[order[1:]] == number[order[:-1]]))
        if len(doubled):
            at = order[doubled[0] : doubled[0] + 2]
            locations = sorted(parts[one].location for one in part[at])
            raise DataError(
                f"{ids[int(doubled[0])].as_py()!r} is in two parts, {locations[0]} and {locations[1]}",
                where=uri,
                accepted="run pipelines/extract.py again, which keeps one of them",
            )
    return pa.array(order[first])


def _whole(column: pa.ChunkedArray[Any]) -> Any:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _numbers(table: pa.Table, name: str, order: Any) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = _whole(table[name].take(order)).to_numpy()
    return found
