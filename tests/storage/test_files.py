"""gare/storage/files.py: every location that the program reads or writes goes through it."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from gare.errors import DataError, FullDiskError
from gare.storage.files import delete_tree, exists, join, list_files, open_fs, read_bytes, write_atomically

AWKWARD = [
    "with space",
    "100%41",
    "a#b",
    "a@b.",
    "-dash",
    "naïve 日本語 🎬",
    "what?",
    "a..mp4",
    "plus+",
    "a:b",
]


@pytest.fixture(params=["path", "uri"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "path" else tmp_path.as_uri()


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_names_are_taken_literally(base: str, tmp_path: Path, name: str) -> None:
    """Otherwise files of real data sets are lost or written somewhere else."""
    folder = join(base, name)
    write_atomically(join(folder, name), b"content")
    assert (tmp_path / name / name).read_bytes() == b"content"
    assert exists(join(folder, name))
    assert read_bytes(join(folder, name)) == b"content"
    assert list_files(folder) == [join(folder, name)]
    delete_tree(folder)
    assert not (tmp_path / name).exists()


def test_local_paths_are_absolute_and_know_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path or ~ in the configuration has to mean what a shell means by it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_fs("videos")[1] == str(tmp_path / "videos")
    assert open_fs("~/videos")[1] == str(tmp_path / "home" / "videos")
    filesystem, path = open_fs("/data/100%25#1")
    assert isinstance(filesystem, pafs.LocalFileSystem)
    assert path == "/data/100%25#1"


def test_object_store_uris(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in a bucket need their names encoded and a query kept behind them, or they cannot be opened."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    uri = join("s3://bucket/store?region=eu-west-1&endpoint_override=127.0.0.1:9", "data", "100% a.parquet")
    filesystem, path = open_fs(uri)
    assert filesystem.type_name == "s3"
    assert path == "bucket/store/data/100% a.parquet"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "..\\x", "a\0b"])
def test_join_refuses_what_leads_elsewhere(name: str) -> None:
    """An id from somebody's annotations must not write outside the output folder."""
    with pytest.raises(DataError, match="not the name of a file"):
        join("/out", "data", name)


@pytest.mark.parametrize("uri", ["", "a\0b", "ftp://host/file", "s3://a b/c", "~nobody-of-that-name/x"])
def test_bad_locations_are_one_clear_error(uri: str) -> None:
    """A person who mistypes a location gets a message, not a traceback of pyarrow."""
    with pytest.raises(DataError) as caught:
        open_fs(uri)
    assert "s3://bucket/key" in caught.value.accepted


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    """The message has to name the file, since a pipeline reads many."""
    missing = str(tmp_path / "missing")
    with pytest.raises(DataError, match="No such file") as caught:
        read_bytes(missing)
    assert caught.value.where == missing
    with pytest.raises(DataError, match="cannot be read"):
        read_bytes(str(tmp_path))
    assert not exists(missing)
    assert list_files(missing) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be listed"):
        list_files(str(tmp_path / "file"))


def test_compressed_files_stay_as_they_are(tmp_path: Path) -> None:
    """By default pyarrow goes by the name: hashes of .gz annotation files would not match anybody else's."""
    data = gzip.compress(b"text")
    location = str(tmp_path / "captions.json.gz")
    write_atomically(location, data)
    assert Path(location).read_bytes() == data
    assert read_bytes(location) == data


def test_write_replaces_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk or a kill must not leave half a file under the final name."""
    location = str(tmp_path / "new" / "file.json")
    write_atomically(location, b"old")
    write_atomically(location, b"new")
    assert read_bytes(location) == b"new"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FullDiskError, match=r"No space left.*make room") as caught:
        write_atomically(location, b"newer")
    assert caught.value.exit_code == 4
    assert read_bytes(location) == b"new"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.json"]


def test_written_files_have_ordinary_rights(tmp_path: Path) -> None:
    """Stores are shared: a temporary file's 0600 would lock colleagues out."""
    (tmp_path / "plain").touch()
    write_atomically(str(tmp_path / "written"), b"")
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_write_says_what_is_in_the_way(tmp_path: Path) -> None:
    """A file where a folder is needed, or the reverse, is a fault of the configuration to be named."""
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(DataError, match="cannot be written"):
        write_atomically(str(tmp_path / "file" / "below"), b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        write_atomically(str(tmp_path / "folder"), b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_listing_is_sorted_filtered_and_whole(base: str, tmp_path: Path) -> None:
    """Parts read in another order, or a half-written one read as a part, would change a run."""
    for name in ("part-2.parquet", "part-10.parquet", "_META.json", ".gare-0.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "sub.parquet").mkdir()
    (tmp_path / "sub.parquet" / "part-3.parquet").touch()
    parts = [join(base, "part-10.parquet"), join(base, "part-2.parquet")]
    assert list_files(base, ".parquet") == parts
    assert list_files(base) == [join(base, "_META.json"), *parts]
    deep = join(base, "sub.parquet", "part-3.parquet")
    assert list_files(base, ".parquet", recursive=True) == [*parts, deep]


def test_delete_tree_spares_what_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """overwrite=true with a wrong root must not delete a home folder or what a link points to."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    kept = tmp_path / "home" / "kept"
    kept.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(kept)
    (tmp_path / "file").touch()
    for location in ("/", "~", str(link), str(tmp_path / "file")):
        with pytest.raises(DataError):
            delete_tree(location)
    with pytest.raises(DataError, match="bucket"):
        delete_tree("s3://bucket?region=eu-west-1")
    assert kept.is_dir()
    assert (tmp_path / "file").exists()
    delete_tree(str(tmp_path / "nothing there"))
