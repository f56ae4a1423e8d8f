"""Captions that name videos by URI, folders on an object store, and the ids that come of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gare.data.benchmarks.own_videos import read_folder
from gare.data.manifest import Manifest
from gare.errors import DataError

ALL = ("file", "s3", "https", "http")
FILES = ["a.mp4", "sub/100% é.mkv", "sub/b.mp4", "notes.txt"]


def read(tmp_path: Path, captions: Any, videos: str = "", **settings: Any) -> Manifest:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(captions))
    named = {"schemes": ALL, "list_remote": lambda _: FILES, **settings}
    return read_folder(videos, path, seed=0, val_fraction=0.1, test_fraction=0.2, **named)


def fault(tmp_path: Path, captions: Any, videos: str = "", **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(tmp_path, captions, videos, **settings)
    return str(caught.value)


def uris(manifest: Manifest) -> dict[str, str]:
    return {row.video_id: row.uri for row in manifest.rows}


def test_all_kinds_of_places_in_one_file(tmp_path: Path) -> None:
    """A collection lies where it grew; copying it into one folder first may be impossible."""
    local = tmp_path / "my clips" / "c.mp4"
    local.parent.mkdir()
    local.write_bytes(b"video")
    named = ["s3://bucket/sub/100%25%20%C3%A9.mp4", "https://host:8443/x/b.webm?sig=1", local.as_uri()]
    found = uris(read(tmp_path, dict.fromkeys(named, "x")))
    assert found == {
        "bucket/sub/100% é": named[0],
        "host:8443/x/b": named[1],
        f"{str(local)[1:].removesuffix('.mp4')}": str(local),
    }
    assert uris(read(tmp_path, {str(local): "x"})) == {str(local)[1:].removesuffix(".mp4"): str(local)}


def test_a_folder_on_an_object_store_is_as_a_local_one(tmp_path: Path) -> None:
    """Ids, and so the store, stay the same when a folder is moved to S3."""
    for root in ("s3://bucket/my%20clips", "s3://bucket/my clips/"):
        base = root.rstrip("/")
        manifest = read(tmp_path, {"a": "x", "sub/100% é.mkv": "y", f"{base}/sub/b.mp4": "z"}, root)
        assert uris(manifest) == {
            "a": f"{base}/a.mp4",
            "sub/100% é": f"{base}/sub/100%25%20%C3%A9.mkv",
            "sub/b": f"{base}/sub/b.mp4",
        }
    manifest = read(tmp_path, {"a": "x", "s3://other/c.mp4": "y"}, "s3://bucket/clips")
    assert uris(manifest) == {"a": "s3://bucket/clips/a.mp4", "other/c": "s3://other/c.mp4"}
    assert manifest.left_out == ("sub/100% é.mkv", "sub/b.mp4")


def test_uris_with_one_name_get_ids_of_their_own(tmp_path: Path) -> None:
    """Two videos under one id would be one row with the frames of either."""
    named = [
        *("s3://b/a.mp4", "s3://b/a.mkv"),
        *("https://h/c.mp4", "http://h/c.mp4"),
        *("https://h/watch?v=1&sig=hush", "https://h/watch?v=2&sig=hush"),
    ]
    found = uris(read(tmp_path, dict.fromkeys(named, "x")))
    assert sorted(found.values()) == sorted(named)
    assert {"b/a.mp4", "b/a.mkv", "https://h/c.mp4", "http://h/c.mp4"} < found.keys()
    assert "hush" not in "".join(found)
    # The same again is the same: an id must not change while nothing else does.
    assert uris(read(tmp_path, dict.fromkeys(reversed(named), "x"))) == found


def test_what_captions_may_not_name(tmp_path: Path) -> None:
    """A captions file from elsewhere must not lead to files of this machine that it has no business with."""
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(b"private")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"video")
    folder = str(tmp_path / "videos")
    assert "outside the folder" in fault(tmp_path, {secret.as_uri(): "x"}, folder)
    assert uris(read(tmp_path, {secret.as_uri(): "x"}, "s3://b/v")).keys() == {
        str(secret)[1:].removesuffix(".mp4")
    }
    assert "sources.schemes does not list file" in fault(tmp_path, {str(secret): "x"}, schemes=["s3"])
    assert "scheme not in sources.schemes" in fault(tmp_path, {"gs://b/a.mp4": "x"})
    assert "scheme not in sources.schemes" in fault(tmp_path, {"http://h/a.mp4?s=hush": "x"}, schemes=["s3"])
    assert "hush" not in fault(tmp_path, {"http://h/a.mp4?s=hush": "x"}, schemes=["s3"])
    assert "data.videos names no folder" in fault(tmp_path, {"a.mp4": "x"})
    assert "caption without video file" in fault(tmp_path, {str(tmp_path / "none.mp4"): "x"})
    assert "caption without video file" in fault(tmp_path, {"s3://b/v/none.mp4": "x"}, "s3://b/v")
    assert "missing or empty" in fault(tmp_path, {"a": "x"}, "s3://b/v", list_remote=lambda _: [])
