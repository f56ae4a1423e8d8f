"""What is new, changed and gone, whatever a store went through before."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from gare.config import ExtractConfig
from gare.data.manifest import ManifestRow
from gare.data.store.compact import compact
from gare.data.store.contents import (
    EARLIER_FAILURE_SCHEMA,
    FAILURE_SCHEMA,
    RULES,
    Store,
    frame_schema,
    without_added_columns,
    write_part,
)
from gare.data.videos import FileVersion, LocalVideos
from gare.errors import DataError, FetchError, GoneError
from gare.extract.comparison import Comparison, WantedClip, compare, compare_clips
from tests.helpers.stores import describe_store, failure_row, random_frames, stored_row

RAW = ExtractConfig(num_frames=2, image_size=8, encoding="raw")
Versions = dict[str, FileVersion | DataError]


def clip(video_id: str, start_s: float | None = None, end_s: float | None = None) -> ManifestRow:
    return ManifestRow(video_id, f"/videos/{video_id}.mp4", start_s, end_s, "train", ("one",))


def version(number: int) -> FileVersion:
    return FileVersion(1000, f"mtime {number}")


def missing(kind: type[FetchError] = GoneError) -> DataError:
    return kind("cannot be read")


class GrowingStore:
    """A store that writes what it is asked for, without videos."""

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        self.uri, self.rng, self.runs = str(folder), rng, 0

    def run(
        self,
        rows: list[ManifestRow],
        versions: Versions,
        *,
        retry_failed: bool = False,
        max_attempts: int = 3,
        fails: str = "",
        transient: bool | None = False,
        rules: int = RULES,
        again: str = "",
        **failure: str,
    ) -> Comparison:
        """A run over these clips; those named in ``fails`` fail, None: as earlier versions recorded it."""
        asked = {"retry_failed": retry_failed, "max_attempts": max_attempts}
        found = compare(self.uri, rows, versions, **asked, again=again)
        Store(self.uri).write_retired(found.retired)
        self.runs += 1
        for request in found.pending:
            group = [str(self.runs), request["video_id"]]
            if request["video_id"] in fails or request["source_version"] is None:
                row = failure_row(request["video_id"], request["attempts"] + 1) | {
                    key: request[key] for key in ("start_s", "end_s", "source_bytes", "source_version")
                }
                schema = EARLIER_FAILURE_SCHEMA if transient is None else FAILURE_SCHEMA
                row |= {"transient": transient, "rules": rules, **failure}
                write_part(self.uri, "failures", [row], schema, group, self.runs)
                continue
            frames = random_frames(RAW, self.rng, 2)
            row = stored_row(RAW, request["video_id"], frames) | {
                key: request[key] for key in ("start_s", "end_s", "source_bytes", "source_version")
            }
            schemas = list(without_added_columns(frame_schema(RAW)))
            schema = schemas[0 if rules > 1 else -1]
            write_part(self.uri, "data", [row | {"rules": rules}], schema, group, self.runs)
        # As a run does at its end.
        Store(self.uri).write_retired(compare(self.uri, rows, versions, **asked).retired)
        return found

    @property
    def ids(self) -> set[str]:
        return set(Store(self.uri).ids())


@pytest.fixture
def store(tmp_path: Path, rng: np.random.Generator) -> GrowingStore:
    return GrowingStore(tmp_path, rng)


ROWS = [clip("a"), clip("b"), clip("c")]
FIRST: Versions = {row.uri: version(1) for row in ROWS}


def counts(found: Comparison) -> tuple[int, int, int, int]:
    return tuple(found.counts[name] for name in ("new", "changed", "unchanged", "gone"))  # type: ignore[return-value]


def pending(found: Comparison) -> list[str]:
    return [row["video_id"] for row in found.pending]


def test_only_what_is_new_or_changed_is_done(store: GrowingStore) -> None:
    """A nightly run over a grown collection must cost what has grown, and must not keep old pictures."""
    assert counts(store.run(ROWS, FIRST)) == (3, 0, 0, 0)
    assert counts(store.run(ROWS, FIRST)) == (0, 0, 3, 0)
    grown = [*ROWS, clip("d")]
    found = store.run(grown, {**FIRST, "/videos/d.mp4": version(1), "/videos/b.mp4": version(2)})
    assert counts(found) == (1, 1, 2, 0)
    assert pending(found) == ["b", "d"]
    assert store.ids == {"a", "b", "c", "d"}
    # Size alone tells, too; so do other seconds of the same file.
    found = store.run(
        [clip("a", 0.0, 2.0), *ROWS[1:]],
        {**FIRST, "/videos/b.mp4": version(2), "/videos/c.mp4": FileVersion(7, "mtime 1")},
    )
    assert pending(found) == ["a", "c"]
    assert counts(found) == (0, 2, 1, 1)
    assert store.ids == {"a", "b", "c"}


def test_a_moved_folder_is_no_change(store: GrowingStore) -> None:
    """Mounting the disk elsewhere must not cost a week of decoding."""
    store.run(ROWS, FIRST)
    moved = [ManifestRow(row.video_id, f"/mnt{row.uri}", None, None, "val", ("two",)) for row in ROWS]
    assert counts(store.run(moved, {row.uri: version(1) for row in moved})) == (0, 0, 3, 0)


def test_what_comes_back_counts_again(store: GrowingStore) -> None:
    """A file that is put back as it was, or a clip that is listed again, needs no second decode."""
    store.run(ROWS, FIRST)
    changed = store.run(ROWS, {**FIRST, "/videos/a.mp4": version(2)})
    assert pending(changed) == ["a"]
    back = store.run(ROWS, FIRST)
    assert (pending(back), counts(back)) == ([], (0, 0, 3, 0))
    assert store.ids == {"a", "b", "c"}
    assert counts(store.run(ROWS[:1], FIRST)) == (0, 0, 1, 2)
    assert store.ids == {"a"}
    assert set.union(*(set(rows.values()) for rows in Store(store.uri).read_retired().values())) == {
        "gone",
        "changed",
    }
    assert counts(store.run(ROWS, FIRST)) == (0, 0, 3, 0)
    assert store.ids == {"a", "b", "c"}


def test_a_file_that_is_gone_is_marked(store: GrowingStore) -> None:
    """Its pictures must not stand for a video that nobody has; one that cannot be read is not gone."""
    store.run(ROWS, FIRST)
    found = store.run(ROWS, {**FIRST, "/videos/a.mp4": missing(), "/videos/b.mp4": missing(FetchError)})
    assert (counts(found), found.lost) == ((0, 0, 2, 1), ("a",))
    assert store.ids == {"b", "c"}
    # It failed once, and is not tried every night.
    again = store.run(ROWS, {**FIRST, "/videos/a.mp4": missing()})
    assert (pending(again), again.lost) == ([], ("a",))
    assert pending(store.run(ROWS, {**FIRST, "/videos/a.mp4": version(2)})) == ["a"]
    assert store.ids == {"a", "b", "c"}


def test_a_failed_file_is_tried_again_when_it_changes(store: GrowingStore) -> None:
    """Who mends a file expects it in the store tomorrow; who does not, no second hour of decoding it."""
    assert store.run(ROWS, FIRST, fails="b").counts["new"] == 3
    assert pending(store.run(ROWS, FIRST)) == []
    found = store.run(ROWS, FIRST, retry_failed=True, fails="b")
    assert [(row["video_id"], row["attempts"]) for row in found.pending] == [("b", 1)]
    found = store.run(ROWS, {**FIRST, "/videos/b.mp4": version(2)})
    assert [(row["video_id"], row["attempts"]) for row in found.pending] == [("b", 2)]
    assert store.ids == {"a", "b", "c"}


def test_what_may_pass_is_tried_again_by_itself(store: GrowingStore) -> None:
    """Five minutes of a busy server at night must not keep clips out of the store for good."""
    store.run(ROWS, FIRST, fails="ab", transient=True)
    found = store.run(ROWS, FIRST, fails="a", transient=True)
    assert [(row["video_id"], row["attempts"]) for row in found.pending] == [("a", 1), ("b", 1)]
    assert found.counts == {"new": 0, "changed": 0, "unchanged": 1, "gone": 0, "retried": 2}
    assert (counts(store.run(ROWS, FIRST)), store.ids) == ((0, 0, 2, 0), {"a", "b", "c"})


def test_attempts_end(store: GrowingStore) -> None:
    """A server that is gone for good must not cost its timeouts every night for years."""
    tries = [pending(store.run(ROWS, FIRST, fails="b", transient=True)) for _ in range(5)]
    assert tries == [["a", "b", "c"], ["b"], ["b"], [], []]
    assert counts(store.run(ROWS, FIRST)) == (0, 0, 3, 0)
    assert pending(compare(store.uri, ROWS, FIRST, retry_failed=True)) == ["b"]
    # Once is never again.
    assert pending(store.run(ROWS, FIRST, max_attempts=1)) == []
    # Whether it passes is what the last attempt says.
    assert pending(store.run(ROWS, FIRST, max_attempts=5, fails="b")) == ["b"]
    assert pending(store.run(ROWS, FIRST, max_attempts=9)) == []


@pytest.mark.parametrize("is_compacted", [False, True])
def test_attempts_are_those_at_this_version(store: GrowingStore, *, is_compacted: bool) -> None:
    """A file that was mended after many bad nights has as many tries as any other."""
    describe_store(store.uri, RAW)
    for _ in range(4):
        store.run(ROWS, FIRST, fails="b", transient=True)
    second: Versions = {**FIRST, "/videos/b.mp4": version(2)}
    store.run(ROWS, second, fails="b", transient=True)
    if is_compacted:
        compact(store.uri, 10**6)
        assert Store(store.uri).read_failures({})["b"]["attempts"] == 4
    tries = [pending(store.run(ROWS, second, fails="b", transient=True)) for _ in range(3)]
    assert tries == [["b"], ["b"], []]


def test_a_file_that_is_away_uses_up_no_attempt(store: GrowingStore) -> None:
    """A disk that is unmounted for a week must find its clips waiting for it."""
    store.run(ROWS, FIRST, fails="b", transient=True)
    for _ in range(5):
        found = store.run(ROWS, {**FIRST, "/videos/b.mp4": missing()})
        assert (pending(found), counts(found)) == ([], (0, 0, 3, 0))
    assert pending(store.run(ROWS, FIRST)) == ["b"]


@pytest.mark.parametrize(
    ("stage", "error_type", "is_tried"),
    [
        ("fetch", "TransientError", True),
        ("decode", "DataError", False),
        ("encode", "OSError", True),
        ("encode", "FileNotFoundError", True),
        ("encode", "ValueError", False),
    ],
)
def test_failures_of_earlier_versions(
    store: GrowingStore, stage: str, error_type: str, *, is_tried: bool
) -> None:
    """What earlier versions gave up for good is in no list; those clips must come back by themselves."""
    failure = {"stage": stage, "error_type": error_type}
    store.run(ROWS, FIRST, fails="ab", transient=None, **failure)
    assert Store(store.uri).read_failures({})["a"]["transient"] is None
    found = store.run(ROWS, FIRST, fails="a", transient=False)  # beside parts of this version
    assert pending(found) == (["a", "b"] if is_tried else [])
    assert pending(store.run(ROWS, FIRST)) == []


def test_what_two_jobs_wrote_counts_once(store: GrowingStore) -> None:
    """A job that was taken for dead may still write; then the store must mend itself, not refuse for ever."""
    store.run(ROWS, FIRST)
    row = stored_row(RAW, "b", random_frames(RAW, store.rng, 2))
    write_part(store.uri, "data", [row], frame_schema(RAW), ["other job", "b"], 1)
    with pytest.raises(DataError, match=r"'b' is in two parts.*run pipelines/extract\.py again"):
        Store(store.uri).ids()
    assert counts(store.run(ROWS, FIRST)) == (0, 0, 3, 0)
    assert store.ids == {"a", "b", "c"}


def rules(store: GrowingStore) -> dict[str, int | None]:
    return {key: row["rules"] for key, (_, _, row) in Store(store.uri).rows((), ["rules"]).items()}


@pytest.mark.parametrize("is_compacted", [False, True])
def test_clips_of_earlier_rules_count_until_they_are_made_again(
    store: GrowingStore, *, is_compacted: bool
) -> None:
    """An upgrade must cost nothing until asked, and then the clips that are named, each once."""
    describe_store(store.uri, RAW)
    store.run(ROWS, FIRST, rules=1)
    assert rules(store) == {"a": None, "b": None, "c": None}
    assert counts(store.run(ROWS, FIRST)) == (0, 0, 3, 0)
    before = compare(store.uri, ROWS, FIRST, retry_failed=False, again="ab")
    assert (pending(before), counts(before), before.retired) == (["a", "b"], (0, 2, 1, 0), {})
    store.run(ROWS, FIRST, again="ab")
    if is_compacted:
        assert compact(store.uri, 10**6)["rows_left_out"] == 2
    assert rules(store) == {"a": 2, "b": 2, "c": None}
    # Asked again, what is made is made; and it counts also after it was away.
    assert counts(store.run(ROWS, FIRST, again="ab")) == (0, 0, 3, 0)
    store.run(ROWS[1:], FIRST)
    assert counts(store.run(ROWS, FIRST)) == (0, 0, 3, 0)
    assert rules(store) == {"a": 2, "b": 2, "c": None}


def test_a_file_that_is_refused_now_counts_no_more(store: GrowingStore) -> None:
    """A playlist's pictures must not stay since a later version reads none; an outage takes nothing."""
    store.run(ROWS, FIRST, rules=1)
    store.run(ROWS, FIRST, again="ab", fails="ab", transient=True, stage="fetch")
    assert store.ids == {"a", "b", "c"}
    found = store.run(ROWS, FIRST, again="ab", fails="b")
    assert pending(found) == ["a", "b"]
    assert (store.ids, rules(store)["a"]) == ({"a", "c"}, 2)
    assert counts(store.run(ROWS, FIRST)) == (0, 0, 3, 0)
    assert store.ids == {"a", "c"}
    assert Store(store.uri).read_failures(store.ids).keys() == {"b"}
    # Mended, it is back.
    assert pending(store.run(ROWS, {**FIRST, "/videos/b.mp4": version(2)})) == ["b"]
    assert store.ids == {"a", "b", "c"}


def test_an_earlier_failure_does_not_keep_a_clip_from_being_made_again(store: GrowingStore) -> None:
    """A clip that --retry-failed brought in after all is as wrong as any other of its kind."""
    store.run(ROWS, FIRST, rules=1, fails="a", transient=None)
    store.run(ROWS, FIRST, rules=1, retry_failed=True)
    assert rules(store) == {"a": None, "b": None, "c": None}
    assert pending(store.run(ROWS, FIRST, again="a")) == ["a"]
    assert rules(store) == {"a": 2, "b": None, "c": None}


@pytest.mark.parametrize("error_type", ["DecodeMemoryError", "DecoderFaultError", "EOFError"])
def test_a_decoder_that_fails_takes_no_row_away(store: GrowingStore, error_type: str) -> None:
    """Frames that count must not go since less memory was allowed, or a library is missing."""
    store.run(ROWS, FIRST, rules=1)
    store.run(ROWS, FIRST, again="a", fails="a", error_type=error_type)
    assert store.ids == {"a", "b", "c"}
    assert counts(store.run(ROWS, FIRST)) == (0, 0, 3, 0)


def test_another_file_that_was_refused_takes_no_row_away(store: GrowingStore) -> None:
    """A server that does not answer for a night must not cost a clip of the file that came back."""
    store.run(ROWS, FIRST, rules=1)
    other: Versions = {**FIRST, "/videos/a.mp4": version(2)}
    store.run(ROWS, other, fails="a")
    assert store.ids == {"b", "c"}
    store.run(ROWS, FIRST)
    assert store.ids == {"a", "b", "c"}
    found = store.run(ROWS, {**FIRST, "/videos/a.mp4": missing(FetchError)})
    assert (counts(found), store.ids) == ((0, 0, 3, 0), {"a", "b", "c"})


def test_a_refusal_outlives_a_compaction(store: GrowingStore) -> None:
    """A run that was killed before it retired the row would else leave it for good."""
    describe_store(store.uri, RAW)
    store.run(ROWS, FIRST, rules=1)
    asked = compare(store.uri, ROWS, FIRST, retry_failed=False, again="a").pending[0]
    identity = {key: asked[key] for key in ("start_s", "end_s", "source_bytes", "source_version")}
    write_part(store.uri, "failures", [failure_row("a") | identity], FAILURE_SCHEMA, ["killed"], 9)
    compact(store.uri, 10**6)
    assert store.ids == {"a", "b", "c"}
    assert counts(store.run(ROWS, FIRST)) == (0, 0, 3, 0)
    assert store.ids == {"b", "c"}


def test_features_of_new_frames_are_made_whatever_failed_on_the_old(store: GrowingStore) -> None:
    """Features that were not finite were of other frames."""
    store.run(ROWS, FIRST, rules=1, fails="b", stage="encode", error_type="ValueError")
    made = [
        WantedClip(row, WantedClip.of(row, FIRST[row.uri]).identity, is_decoded=True, rules=2) for row in ROWS
    ]
    found = compare_clips(store.uri, made, retry_failed=False)
    assert pending(found) == ["a", "b", "c"]
    as_before = [dataclasses.replace(one, rules=1) for one in made]
    assert pending(compare_clips(store.uri, as_before, retry_failed=False)) == []


def test_versions_of_real_files(tmp_path: Path) -> None:
    """What is compared must change with the file, and a missing one must be told from an unreadable one."""
    path = tmp_path / "a b#1.mp4"
    path.write_bytes(b"one")
    source = LocalVideos()
    first = source.stat([str(path), path.as_uri(), str(tmp_path / "none"), "s3://bucket/key"])
    assert first[str(path)] == first[path.as_uri()]
    path.write_bytes(b"three")
    assert source.stat([str(path)])[str(path)] != first[str(path)]
    assert isinstance(first[str(tmp_path / "none")], GoneError)
    assert isinstance(first["s3://bucket/key"], FetchError)
    assert not isinstance(first["s3://bucket/key"], GoneError)
