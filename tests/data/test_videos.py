"""gare/data/videos.py: local videos, read where they are."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from gare.data.decode.probe import probe
from gare.data.videos import FileVersion, LocalVideos
from gare.errors import DataError, FetchError, GoneError, without_secrets


def test_files_are_read_in_place(tmp_path: Path) -> None:
    """A copy of each video would double the disk and the time of a local run."""
    path = tmp_path / "100% é #1?.mp4"
    path.write_bytes(b"video")
    os.utime(path, ns=(7, 7))
    for uri in (str(path), path.as_uri(), f"file://{path}", f"file://localhost{path}"):
        with LocalVideos().open(uri) as video:
            assert Path(video.path) == path
            assert (video.size_bytes, video.version) == (5, "7")
        assert LocalVideos().stat([uri]) == {uri: FileVersion(5, "7")}


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    """A video that was moved has to be found by the reason."""
    for uri in (str(tmp_path / "none.mp4"), "s3://bucket/a.mp4?secret=1", "a\0b", "~nobody-of-that-name/a"):
        with pytest.raises(FetchError) as caught, LocalVideos().open(uri):
            raise AssertionError("it was opened")
        assert "secret" not in str(caught.value)
        assert isinstance(LocalVideos().stat([uri])[uri], FetchError)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("../.git/annex/objects/zq/Xk/SHA256E-s9--0.mp4/SHA256E-s9--0.mp4", "fetch it with git annex get"),
        ("moved.mp4", "is a link to nothing"),
    ],
)
def test_a_link_to_nothing_is_named(tmp_path: Path, target: str, reason: str) -> None:
    """A folder shows such a file, so that "No such file" sends people looking in the wrong place."""
    path = tmp_path / "a.mp4"
    path.symlink_to(target)
    with pytest.raises(GoneError, match=reason), LocalVideos().open(str(path)):
        raise AssertionError("it was opened")
    with pytest.raises(DataError, match=reason):
        probe(path)


@pytest.mark.parametrize("decoded", [True, False])
def test_a_file_that_grows_while_it_is_read_is_a_fault(tmp_path: Path, decoded: bool) -> None:
    """Frames of half a video must not stand for all of it, nor its damage be called the video's own."""
    path = tmp_path / "a.mp4"
    path.write_bytes(b"half")

    def read() -> None:
        with LocalVideos().open(str(path)):
            path.write_bytes(b"half and the rest")
            if not decoded:
                raise DataError("is damaged")

    with pytest.raises(FetchError, match="changed while it was read"):
        read()
    with pytest.raises(DataError, match="own fault"), LocalVideos().open(str(path)):
        raise DataError("own fault")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("https://me:pass@host:1/a%20b.mp4?X-Amz-Signature=secret#part", "https://host:1/a%20b.mp4"),
        ("s3://key:pass@bucket/a?region=x", "s3://bucket/a"),
        ("https://host?token=secret", "https://host"),
        ("/data/what? #1@home.mp4", "/data/what? #1@home.mp4"),
        ("relative/x://y?z", "relative/x://y?z"),
        ("", ""),
    ],
)
def test_locations_are_shown_without_secrets(uri: str, expected: str) -> None:
    """Messages and stores are passed on; a signature in them is a key passed on."""
    assert without_secrets(uri) == expected


def test_that_a_fault_may_pass_is_known_everywhere() -> None:
    """It is found out in a worker and recorded elsewhere; lost on the way, a clip is given up for good."""
    for error in (
        FetchError("is away", where="/a.mp4", accepted="more").as_transient(),
        GoneError("is gone"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.is_transient) == (type(error), str(error), error.is_transient)
    assert not FetchError.is_transient
