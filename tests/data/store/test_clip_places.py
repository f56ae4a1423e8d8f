"""The clips of a store as arrays: the same as a dictionary would say, in little memory."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gare.data.store import clip_places
from gare.data.store.clip_places import ClipPlaces, SortedIds
from gare.data.store.parts import Part
from gare.errors import DataError

#: Ids that sort differently by bytes, by characters and by case.
NASTY = ["", "a", "A", "a b", "ä", "日本", "\U0001f600", "\uffff", "z" * 3000, "0", "\0", "a\0", "\n"]


def part_of(name: str, ids: list[str], **columns: list[object]) -> Part:
    table = pa.table({"video_id": pa.array(ids, pa.string()), **columns})
    return Part(f"/store/data/{name}.parquet", name, frozenset(), table)


def test_every_id_is_found_where_it_is(rng: np.random.Generator) -> None:
    """A clip that is looked up wrongly is trained on with another one's captions."""
    ids = [*NASTY, *(f"clip {number}" for number in range(500))]
    shuffled = [ids[place] for place in rng.permutation(len(ids))]
    parts = [
        part_of(
            f"part-{number}",
            shuffled[first : first + 40],
            n=list(range(first, first + 40))[: len(shuffled) - first],
        )
        for number, first in enumerate(range(0, len(shuffled), 40))
    ]
    found = ClipPlaces.of("/store", parts, {})
    expected = {one: (f"/store/data/part-{at // 40}.parquet", at % 40) for at, one in enumerate(shuffled)}
    assert found == expected
    assert len(found) == len(ids)
    assert list(found) == sorted(ids, key=str.encode)
    numbers = found.columns["n"].to_pylist()
    assert [shuffled[number] for number in numbers] == list(found)
    for absent in ("clip", "clip 5000", "b", "\U0001f601", 3, None, "\ud800"):
        assert absent not in found
    with pytest.raises(KeyError):
        found["clip"]
    asked = pa.array(["clip 7", "none", *NASTY])
    places = found.find(asked).tolist()
    assert places[1] == -1
    assert [found.ids[place] for place in places if place >= 0] == ["clip 7", *NASTY]
    assert pickle.loads(pickle.dumps(found)) == expected


def test_no_clips_are_an_empty_mapping() -> None:
    """A store that has only begun is no fault."""
    for found in (ClipPlaces.of("/store", [], {}), ClipPlaces.of("/store", [part_of("a", [])], {})):
        assert found == {}
        assert found.find(pa.array(["a"])).tolist() == [-1]
        assert found.used_parts() == []


def test_the_newest_row_counts_and_retired_ones_do_not() -> None:
    """A clip would count twice, or an old file's frames in place of the new one's."""
    old, new = part_of("part-00000001-aa", ["a", "b", "c"]), part_of("part-00000002-bb", ["b", "d"])
    found = ClipPlaces.of("/store", [old, new], {old.checksum: {"c": "changed"}})
    assert found == {"a": (old.location, 0), "b": (new.location, 0), "d": (new.location, 1)}
    again = part_of("part-00000002-cc", ["d"])
    with pytest.raises(DataError, match=r"'d' is in two parts, .*-bb\.parquet and .*-cc\.parquet"):
        ClipPlaces.of("/store", [old, new, again], {})
    assert set(ClipPlaces.of("/store", [old, new, again], {"part-00000002-cc": {"d": "doubled"}})) == set(
        "abcd"
    )


def test_a_clip_takes_bytes_and_not_objects() -> None:
    """Ten million clips took 25 GB in every loader."""
    parts = [
        part_of(f"part-{number}", [f"video {number:04d}{row:04d}" for row in range(1000)])
        for number in range(50)
    ]
    tracemalloc.start()
    found = ClipPlaces.of("/store", parts, {}).without_columns()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    arrays = (found.part, found.row, found.offset, found.size, found.num_frames)
    assert sum(array.nbytes for array in arrays) + len(found.ids._data) <= 50 * len(found)
    assert kept < 100 * len(found)


def test_sorted_ids_are_a_sequence() -> None:
    """Plans name clips by their number."""
    ids = SortedIds(pa.array(["a", "b", "c"]).slice(1))
    assert list(ids) == ["b", "c"]
    assert ids[-1] == "c"
    assert ids[:1] == ["b"]
    with pytest.raises(IndexError):
        ids[2]


def test_places_of_a_large_store_are_the_same_after_a_move(tmp_path: Path) -> None:
    """Ids are compared by content alone: the folder may be anywhere."""
    one = ClipPlaces.of(str(tmp_path), [part_of("part-a", NASTY)], {})
    other = ClipPlaces.of("/elsewhere", [part_of("part-a", NASTY)], {})
    assert one == other


def test_pieces_of_clips_are_found_among_those_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of all ids for each piece takes half an hour for ten million clips."""
    ids = SortedIds(pa.array(sorted(f"é {number:05d}" for number in range(0, 3000, 3)), pa.string()))
    looked_at: list[int] = []
    index_in = clip_places.pc.index_in

    def counting(wanted: Any, value_set: Any) -> Any:
        looked_at.append(len(value_set))
        return index_in(wanted, value_set=value_set)

    monkeypatch.setattr(clip_places.pc, "index_in", counting)
    for first in range(0, 3000, 300):
        some = [f"é {number:05d}" for number in range(first, first + 300)]
        assert ids.places(pa.array(some)).tolist() == [ids.find(one) for one in some]
    assert sum(looked_at) <= 1010
    for some in ([], ["a"], ["zz", "é 00003", "a"], ["é 02997", "é 03000"]):
        assert ids.places(pa.array(some, pa.string())).tolist() == [ids.find(one) for one in some]
    nothing = SortedIds(pa.array([], pa.string()))
    assert nothing.places(pa.array(["a"])).tolist() == [-1]
