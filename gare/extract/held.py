"""The rows of a store, whether they count or not, as arrays: a store may have millions.

N different clips, R rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute

from gare.data.store.clip_places import SortedIds
from gare.data.store.contents import IDENTITY, Store
from gare.data.store.part_index import DIGEST
from gare.data.store.parts import Part, read_parts

#: Its functions are typed for arrays of one kind.
pc: Any = pyarrow.compute
#: start_s, end_s, source_bytes, source_version: see ``gare.data.store.contents.IDENTITY``.
Identity = tuple[Any, ...]


@dataclass(frozen=True)
class Held:
    """A row in a part, whether it counts or not.

    Attributes:
        part: its part.
        identity: of its source.
        captions: digest of its captions; empty if they do not matter.
        is_retired: True if it does not count.
        rules: by which its frames were decoded.
    """

    part: Part
    identity: Identity
    captions: bytes
    is_retired: bool
    rules: int


@dataclass(frozen=True)
class HeldRows:
    """The rows of each clip, sorted: counting ones first, then newer rules, then newer generation.

    Attributes:
        parts: the parts, without their rows.
        ids: N ids.
        first: (N + 1,) row of each clip's first one.
        table: R rows, sorted by clip, with identity, digest of the captions, rules, part and ``is_retired``.
    """

    parts: tuple[Part, ...]
    ids: SortedIds
    first: npt.NDArray[np.int64]
    table: pa.Table

    @classmethod
    def read(cls, uri: str, *, captions: bool) -> HeldRows:
        """Reads all rows of a store.

        Args:
            uri: the store.
            captions: True if the captions matter.

        Raises:
            DataError: for a part that cannot be read.
        """
        columns = ["video_id", *IDENTITY, *([DIGEST] if captions else [])]
        parts, _ = read_parts(uri, "data", columns, ["rules"])
        retired = Store(uri).read_retired()
        pieces = []
        for number, part in enumerate(parts):
            gone = pa.array(list(retired.get(part.checksum, ())), pa.string())
            is_retired = pc.is_in(part.table["video_id"], value_set=gone)
            order = {"part": number, "age": -part.generation}
            table = part.table.append_column("is_retired", is_retired)
            for name, value in order.items():
                table = table.append_column(name, pa.array(np.full(len(table), value, np.int64)))
            rules = pc.fill_null(table["rules"].cast(pa.int32()), 1)
            table = table.set_column(table.column_names.index("rules"), "rules", rules)
            pieces.append(table.append_column("older", pc.negate(rules)))
        light = tuple(Part(part.location, part.checksum, part.replaces, pa.table({})) for part in parts)
        if not pieces:
            return cls((), SortedIds(pa.array([], pa.string())), np.zeros(1, np.int64), pa.table({}))
        keys = [(name, "ascending") for name in ("video_id", "is_retired", "older", "age")]
        whole: Any = pa.concat_tables(pieces, promote_options="default")
        ids = whole["video_id"].cast(pa.large_string())
        whole = whole.set_column(whole.column_names.index("video_id"), "video_id", ids)
        whole = whole.take(pc.sort_indices(whole, sort_keys=keys)).combine_chunks()
        ids = whole["video_id"].combine_chunks()
        starts = np.ones(len(ids), bool)
        if len(ids) > 1:
            starts[1:] = pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
        first = np.append(np.flatnonzero(starts), len(ids)).astype(np.int64)
        distinct = SortedIds(ids.take(pa.array(first[:-1])))
        return cls(light, distinct, first, whole.drop_columns(["video_id", "older", "age"]))

    def __len__(self) -> int:
        return len(self.ids)

    def places(self, video_ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """Returns the place of each id; -1 for those without a row."""
        return self.ids.places(pa.array(video_ids, pa.large_string()))

    def rows(self, place: int) -> list[Held]:
        """Returns the rows of the clip at a place."""
        if place < 0:
            return []
        start, stop = int(self.first[place]), int(self.first[place + 1])
        return list(self._held(self.table.slice(start, stop - start)))

    def only_rows(self, places: npt.NDArray[np.int64]) -> Iterator[Held | None]:
        """Yields the row of each clip that has one alone; None for others, and for those without place."""
        if not len(self):
            yield from [None] * len(places)
            return
        there = np.maximum(places, 0)
        alone = (places >= 0) & (self.first[there + 1] - self.first[there] == 1)
        for held, is_alone in zip(
            self._held(self.table.take(cast("Any", pa.array(self.first[there])))), alone.tolist(), strict=True
        ):
            yield held if is_alone else None

    def _held(self, table: pa.Table) -> Iterator[Held]:
        digests = table[DIGEST].to_pylist() if DIGEST in table.column_names else [b""] * len(table)
        identities = zip(*(table[name].to_pylist() for name in IDENTITY), strict=True)
        others = (table[name].to_pylist() for name in ("part", "is_retired", "rules"))
        for identity, digest, part, is_retired, rules in zip(identities, digests, *others, strict=True):
            yield Held(self.parts[part], identity, digest, is_retired, rules)
