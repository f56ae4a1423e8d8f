"""What a job writes after another one has taken its place counts nowhere."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gare.config import ExtractConfig
from gare.data.store.compact import compact
from gare.data.store.contents import FAILURE_SCHEMA, Store, frame_schema, part_files
from gare.data.store.parts import read_columns, read_parts, write_part
from gare.errors import DataError, LockLostError
from gare.storage import generations
from gare.storage.generations import HeldStore, OwnedFolder
from tests.helpers.stores import describe_store, failure_row, random_frames, stored_row, stored_values

RAW = ExtractConfig(num_frames=2, image_size=16, encoding="raw")


class Job:
    """One writer of a store, with a generation of its own."""

    def __init__(self, uri: str, name: str, rng: np.random.Generator) -> None:
        self.uri, self.rng, self.name = uri, rng, name
        self.generation = generations.begin_generation(uri, name)

    def write(self, *ids: str, group: str = "") -> str:
        rows = [stored_row(RAW, one, random_frames(RAW, self.rng, 2)) for one in ids]
        number = self.generation.number
        return write_part(self.uri, "data", rows, frame_schema(RAW), [self.name, group, *ids], number)

    def retire(self, video_id: str) -> None:
        part, _ = Store(self.uri).ids()[video_id]
        checksum = read_columns(part, []).schema.metadata[b"gare.sha256"].decode()
        retired = Store(self.uri).read_retired()
        retired.setdefault(checksum, {})[video_id] = "gone"
        Store(self.uri).write_retired(retired, HeldStore(self.generation.number))


def test_each_generation_has_one_job(tmp_path: Path) -> None:
    """Two owners of one number could not be told apart by anyone."""
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda job: generations.begin_generation(str(tmp_path), str(job)), range(24)))
    assert sorted(one.number for one in made) == list(range(1, 25))
    newest = generations.newest_generation(str(tmp_path))
    assert newest.number == generations.newest_number(str(tmp_path)) == 24
    generations.forget_generations_before(str(tmp_path), newest)
    assert [path.name for path in (tmp_path / "generations").iterdir()] == ["00000024.json"]
    assert generations.begin_generation(str(tmp_path), "next").number == 25


def test_a_job_without_its_claim_begins_no_generation(tmp_path: Path) -> None:
    """Its number would be above its successor's, who would end though nothing was wrong with him."""
    uri = str(tmp_path)
    first = generations.begin_generation(uri, "first")
    assert first is not None
    assert generations.begin_generation(uri, "late", lambda: False) is None
    assert generations.newest_number(uri) == first.number == 1


def test_workers_learn_of_a_newer_generation(tmp_path: Path) -> None:
    """Two training runs would write checkpoints of the same steps into one folder."""
    uri = str(tmp_path)
    first = OwnedFolder(uri, generations.begin_generation(uri, "first").number)
    assert not first.is_lost()
    second = generations.begin_generation(uri, "second")
    assert first.is_lost()
    assert not OwnedFolder(uri, second.number).is_lost()
    # Its successor took its generation back: it is the owner again.
    generations.withdraw_generation(uri, second)
    assert not first.is_lost()
    assert isinstance(first.lost_error(), LockLostError)
    assert uri in str(first.lost_error())


def test_a_generation_whose_file_is_lost_is_fenced(tmp_path: Path, rng: np.random.Generator) -> None:
    """Without conditional writes a sleeper may take that file away; its number must not come again."""
    uri = str(tmp_path)
    lost = Job(uri, "lost", rng)
    lost.write("a")
    generations.withdraw_generation(uri, lost.generation)
    successor = Job(uri, "successor", rng)
    assert successor.generation.number == 2
    lost.write("late")
    assert Store(uri).ids().keys() == {"a"}


def test_late_parts_do_not_count(tmp_path: Path, rng: np.random.Generator) -> None:
    """A suspended worker that wakes up would double clips, or bring back those that are gone."""
    uri = str(tmp_path)
    first = Job(uri, "first", rng)
    kept = first.write("a", "b")
    second = Job(uri, "second", rng)
    late = first.write("c", "gone")
    late_failure = write_part(uri, "failures", [failure_row("x")], FAILURE_SCHEMA, generation=1)
    assert Store(uri).ids() == {"a": (kept, 0), "b": (kept, 1)}
    assert Store(uri).read_failures(()) == {}
    mine = second.write("c")
    assert Store(uri).ids()["c"] == (mine, 0)
    # Not after further jobs either, whose files replace those of earlier ones.
    third = Job(uri, "third", rng)
    generations.forget_generations_before(uri, third.generation)
    assert Store(uri).ids().keys() == {"a", "b", "c"}
    assert [part.location for part in read_parts(uri, "data", ["video_id"])[1]] == [late]
    describe_store(uri, RAW)
    compact(uri, 10**6, HeldStore(third.generation.number))
    assert not Path(late).exists()
    assert not Path(late_failure).exists()
    assert Store(uri).ids().keys() == {"a", "b", "c"}


def test_a_job_that_went_through_is_not_fenced(tmp_path: Path, rng: np.random.Generator) -> None:
    """The list of all its parts would be read with each look at the store, for nothing."""
    uri = str(tmp_path)
    first = Job(uri, "first", rng)
    first.write("a")
    generations.release_generation(uri, first.generation)
    second = Job(uri, "second", rng)
    assert second.generation.fences == {}
    assert Store(uri).ids().keys() == {"a"}
    assert list(Job(uri, "third", rng).generation.fences) == ["2"]


def test_the_newer_of_two_rows_counts(tmp_path: Path, rng: np.random.Generator) -> None:
    """Earlier versions know no fences: what they write late must not stop every reader."""
    uri = str(tmp_path)
    old = write_part(uri, "data", [stored_row(RAW, "a", random_frames(RAW, rng, 2))], frame_schema(RAW))
    new = Job(uri, "new", rng).write("a")
    assert Store(uri).ids() == {"a": (new, 0)}
    describe_store(uri, RAW)
    value = stored_values(uri)
    compact(uri, 10**6, HeldStore(1))
    assert stored_values(uri) == value
    assert not Path(old).exists()
    for group in ("one", "other"):
        Job(uri, "doubles", rng).write("b", group=group)
        generation = generations.newest_generation(uri)
        generations.release_generation(uri, generation)
    # Within one generation two rows are a fault that somebody has to look at.
    doubled = Job(uri, "last", rng)
    doubled.write("c", group="one")
    doubled.write("c", group="other")
    with pytest.raises(DataError, match="'c' is in two parts"):
        Store(uri).ids()


def test_nothing_is_described_without_the_lock(tmp_path: Path) -> None:
    """A description or a list of retired rows from before would hide what the successor made."""
    uri = str(tmp_path)
    describe_store(uri, RAW)
    Store(uri).write_retired({"part": {"a": "gone"}}, HeldStore(3))

    def lost() -> None:
        raise LockLostError("lost")

    with pytest.raises(LockLostError):
        Store(uri).write_meta(Store(uri).read_meta(), HeldStore(1, lost))
    with pytest.raises(LockLostError):
        Store(uri).write_retired({}, HeldStore(1, lost))
    assert Store(uri).read_retired() == {"part": {"a": "gone"}}
    Store(uri).write_meta(Store(uri).read_meta(), HeldStore(4))
    assert Store(uri).read_meta().generation == 4
    assert json.loads((tmp_path / "_RETIRED.json").read_text())["generation"] == 3


def test_a_compaction_that_sleeps_anywhere_loses_and_doubles_nothing(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """It is taken over in the middle, wakes up and goes on until its next look at the lock."""
    moments = 0
    for moment in range(100):
        uri = str(tmp_path / str(moment))
        writer = Job(uri, "writer", rng)
        for first in range(0, 8, 2):
            writer.write(f"clip {first}", f"clip {first + 1}")
        describe_store(uri, RAW)
        writer.retire("clip 1")
        generations.release_generation(uri, writer.generation)
        sleeper, left, expected = Job(uri, "sleeper", rng), moment, dict[str, object]()

        def sleep(uri: str = uri, expected: dict[str, object] = expected) -> None:
            nonlocal left
            left -= 1
            if left == -2:
                raise LockLostError("lost")
            if left == -1:  # looks, finds all well, sleeps, and writes when it wakes up
                successor = Job(uri, "successor", rng)
                successor.retire("clip 4")
                compact(uri, 10**6, HeldStore(successor.generation.number))
                successor.write("clip new")
                expected |= stored_values(uri)

        try:
            compact(uri, 10**6, HeldStore(sleeper.generation.number, sleep))
        except LockLostError:
            moments += 1
        if not expected:
            break
        assert expected.keys() == {*(f"clip {one}" for one in (0, 2, 3, 5, 6, 7)), "clip new"}
        assert stored_values(uri) == expected
        last = Job(uri, "last", rng)
        compact(uri, 10**6, HeldStore(last.generation.number))
        assert stored_values(uri) == expected
        assert len(part_files(uri, "data")) == 1
    assert moments >= 4
