"""gare/data/manifest.py: what prepare hands to every later step."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gare.data.manifest import (
    SCHEMA,
    Manifest,
    ManifestRow,
    read_manifest,
    require_captions,
    write_manifest,
)
from gare.errors import DataError

ROWS = (
    ManifestRow("a", "/videos/a.mp4", None, None, "train", ("a dog", "  two  blanks")),
    ManifestRow("b#1-2.5", "/videos/naïve 日本語 🎬.mp4", 1.0, 2.5, "val", ("a\nline break",)),
    ManifestRow("-c@d.", "s3://bucket/c%20d", None, 3.0, "test", ("piñata", "piñata")),
)


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(ROWS, "folder", "own split", {"captions.csv": "0" * 64}, ("unused.mp4",))


def test_round_trip(manifest: Manifest, tmp_path: Path) -> None:
    """What extract and train read has to be what prepare found, to the letter."""
    location = str(tmp_path / "out" / "manifest.parquet")
    write_manifest(manifest, location)
    again = read_manifest(location)
    assert again == manifest
    assert again.fingerprint == manifest.fingerprint
    assert pickle.loads(pickle.dumps(again)) == manifest
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.parquet"]


def test_the_file_is_the_contract(manifest: Manifest, tmp_path: Path) -> None:
    """Other tools read this file: its columns, types and metadata keys may not drift."""
    location = tmp_path / "manifest.parquet"
    write_manifest(manifest, str(location))
    schema = pq.read_schema(location)
    assert schema.names == ["video_id", "uri", "start_s", "end_s", "split", "captions"]
    assert [str(kind) for kind in schema.types] == [
        *("string", "string", "double", "double", "string"),
        "list<element: string>",
    ]
    metadata = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    assert metadata["benchmark"] == "folder"
    assert metadata["protocol"] == "own split"
    assert json.loads(metadata["annotation_sha256"]) == {"captions.csv": "0" * 64}
    assert json.loads(metadata["counts"]) == {
        "train": {"videos": 1, "captions": 2},
        "val": {"videos": 1, "captions": 1},
        "test": {"videos": 1, "captions": 2},
    }


def test_splits_and_counts(manifest: Manifest) -> None:
    """A split that loses rows would change every score without a word."""
    assert manifest.of_split("train") == ROWS[:1]
    assert manifest.counts["test"] == {"videos": 1, "captions": 2}
    only_test = Manifest(ROWS[2:], "folder", "own split")
    assert only_test.of_split("train") == ()
    assert only_test.counts["train"] == {"videos": 0, "captions": 0}
    with pytest.raises(DataError, match="'validate'"):
        manifest.of_split("validate")


def test_fingerprint_knows_what_matters(manifest: Manifest) -> None:
    """It decides whether two runs used the same data: it may miss no change and invent none."""
    first = ROWS[0]
    for other in (
        replace(first, video_id="A"),
        replace(first, start_s=0.5),
        replace(first, end_s=0.5),
        replace(first, split="val"),
        replace(first, captions=first.captions[::-1]),
        replace(first, captions=("a dog  two  blanks",)),
        replace(first, captions=("a dog",)),
    ):
        changed = replace(manifest, rows=(other, *ROWS[1:]))
        assert changed.fingerprint != manifest.fingerprint, other
    assert replace(manifest, rows=ROWS[:2]).fingerprint != manifest.fingerprint
    moved = tuple(replace(row, uri=f"/elsewhere/{row.video_id}") for row in reversed(ROWS))
    assert replace(manifest, rows=moved, left_out=()).fingerprint == manifest.fingerprint
    whole_seconds = replace(ROWS[1], start_s=1)
    assert replace(manifest, rows=(ROWS[0], whole_seconds, ROWS[2])).fingerprint == manifest.fingerprint
    # Pinned: a new version of the program must not take old manifests for others.
    assert manifest.fingerprint == "c9aed016d669f0ab3f05c170fc593c01d95a8084a1bb0b232b270fa5f31fd36f"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_id": ""}, "empty video_id"),
        ({"uri": ""}, "no uri"),
        ({"uri": "https://me:hush@host/a.mp4"}, r"^(?!.*hush).*credentials belong into the environment"),
        ({"uri": "S3://key@bucket/a.mp4"}, "credentials belong into the environment"),
        ({"split": "validate"}, "split is not one of train, val, test"),
        ({"captions": ()}, "no caption"),
        ({"captions": ("fine", " \n")}, "blank caption"),
        ({"captions": ("\ud800",)}, "UTF-8"),
        ({"start_s": 2.0, "end_s": 2.0}, "start is not before end"),
        ({"start_s": None, "end_s": 0.0}, "start is not before end"),
        ({"start_s": float("nan")}, "not a time"),
        ({"start_s": -1.0}, "not a time"),
        ({"end_s": float("inf")}, "not a time"),
    ],
)
def test_broken_rows_are_refused(change: dict[str, object], message: str) -> None:
    """A row that breaks the contract would fail hours later in extract or train, far from its cause."""
    with pytest.raises(DataError, match=message):
        Manifest((replace(ROWS[0], **change), ROWS[1]), "folder", "own split")


def test_an_at_sign_elsewhere_is_no_password() -> None:
    """Presigned links and files of an album have them; without those a collection could not be read."""
    for uri in ("/videos/me@home.mp4", "./a:b@c", "https://host/a@b.mp4?sign=a@b", "s3://bucket/a@b.mp4"):
        assert Manifest((replace(ROWS[0], uri=uri),), "folder", "own split").rows[0].uri == uri


def test_all_faults_come_at_once_with_their_ids() -> None:
    """Fifteen faults found one by one are fifteen runs."""
    bad = [replace(ROWS[0], video_id=f"v{number:02}", captions=()) for number in range(15)]
    with pytest.raises(DataError) as caught:
        Manifest((*bad, ROWS[0], ROWS[0], replace(ROWS[1], split="")), "folder", "own split")
    message = str(caught.value)
    assert "no caption (15): 'v00'" in message
    assert "'v09' … and 5 more" in message
    assert "'v10'" not in message
    assert "video_id used more than once (1): 'a' (2 times)" in message
    assert "split is not one of train, val, test (1): 'b#1-2.5': ''" in message


def test_empty_manifest_is_refused() -> None:
    """Nothing to do is a fault of the input, not a success."""
    with pytest.raises(DataError, match="no video has a caption"):
        Manifest((), "folder", "own split")


def test_videos_may_all_be_without_captions(manifest: Manifest, tmp_path: Path) -> None:
    """People who only want to search have none; training has to say so, whatever reads the manifest first."""
    rows = tuple(replace(row, captions=()) for row in ROWS)
    silent, said = str(tmp_path / "silent.parquet"), str(tmp_path / "said.parquet")
    write_manifest(Manifest(rows, "folder", "own split"), silent)
    write_manifest(manifest, said)
    assert read_manifest(silent).rows == rows
    with pytest.raises(DataError, match=r"have no captions, .* data\.captions=FILE") as caught:
        require_captions(silent)
    assert caught.value.where == silent
    require_captions(said)
    require_captions(str(tmp_path / "none.parquet"))
    (tmp_path / "other.parquet").write_bytes(b"x")
    require_captions(str(tmp_path / "other.parquet"))


def test_missing_manifest_names_the_next_step(tmp_path: Path) -> None:
    """Who starts with extract has to be told to prepare first."""
    with pytest.raises(DataError, match=r"run pipelines/prepare\.py first"):
        read_manifest(str(tmp_path / "manifest.parquet"))


def test_other_files_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    """A wrong path or a truncated copy must be named as such."""
    location = tmp_path / "manifest.parquet"
    location.write_text("video,caption\n")
    with pytest.raises(DataError, match="is not a Parquet file"):
        read_manifest(str(location))
    write_manifest(manifest, str(location))
    location.write_bytes(location.read_bytes()[:-20])
    with pytest.raises(DataError, match="is not a Parquet file"):
        read_manifest(str(location))


def test_other_columns_are_named(manifest: Manifest, tmp_path: Path) -> None:
    """A Parquet file of something else has to be told apart by what it lacks."""
    location = str(tmp_path / "manifest.parquet")
    write_manifest(manifest, location)
    table = pq.read_table(location)
    starts = pa.array(["0:01", "1", "2"])
    table = table.drop_columns(["split", "start_s"]).append_column("start_s", starts)
    pq.write_table(table.append_column("fold", starts), location)
    with pytest.raises(DataError) as caught:
        read_manifest(location)
    for part in ("missing columns: split", "unknown columns: fold", "start_s of type string"):
        assert part in str(caught.value)


def test_changes_by_hand_are_noticed(manifest: Manifest, tmp_path: Path) -> None:
    """Edited captions under the old fingerprint would be logged as the old data."""
    location = str(tmp_path / "manifest.parquet")
    write_manifest(manifest, location)
    table = pq.read_table(location)
    pq.write_table(table.slice(0, 2), location)
    with pytest.raises(DataError, match="changed by hand"):
        read_manifest(location)
    pq.write_table(table.replace_schema_metadata(None), location)
    with pytest.raises(DataError, match="schema version None"):
        read_manifest(location)
    pq.write_table(table.replace_schema_metadata({"schema_version": "1"}), location)
    with pytest.raises(DataError, match="lacks the metadata benchmark"):
        read_manifest(location)


def test_broken_rows_in_a_file_name_the_file(tmp_path: Path) -> None:
    """Nulls written by other tools must come back as faults with ids, not as crashes later."""
    location = str(tmp_path / "manifest.parquet")
    table = pa.table(
        [["a", None], ["u", "v"], [None, None], [None, None], ["train", None], [None, ["x", None]]],
        schema=SCHEMA,
    )
    keys = ("benchmark", "protocol", "fingerprint")
    metadata = {"schema_version": "1", "annotation_sha256": "{}", "counts": "{}", "left_out": "[]"}
    pq.write_table(table.replace_schema_metadata({**metadata, **dict.fromkeys(keys, "x")}), location)
    with pytest.raises(DataError, match="several faults") as caught:
        read_manifest(location)
    assert caught.value.where == location
    for part in ("empty video_id (1): row 1", "no caption (1): 'a'", "blank caption", "split is not one of"):
        assert part in str(caught.value)
