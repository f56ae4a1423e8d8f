"""Files of fetched videos in a folder for temporary files that others share, who may put anything there."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cluster.sources.temporary import temporary_video

FOREIGN_UID = 4242
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, for this test alone."""
    folder = tmp_path / "shared"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def usual(shared: Path) -> Path:
    """Where this user's videos are to lie; it is not made yet."""
    return shared / f"gare-videos-{os.geteuid()}"


def fetched() -> Path:
    """Writes and reads a file as a fetch does; returns its folder, which then is of this user alone."""
    with temporary_video("a.mp4") as stream:
        stream.write(b"video")
        stream.flush()
        path = Path(stream.name)
        assert path.read_bytes() == b"video"
        status = path.parent.stat(follow_symlinks=False)
        assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (os.geteuid(), 0o700)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()
    return path.parent


def make_old(path: Path) -> None:
    os.utime(path, (1, 1), follow_symlinks=False)


def test_videos_lie_in_a_folder_of_the_user(shared: Path, usual: Path) -> None:
    """Another user of the machine would otherwise see which private videos are fetched, or get in between."""
    assert fetched() == usual
    assert list(shared.iterdir()) == [usual]


@pytest.mark.timeout(60)
def test_what_others_put_there_is_not_opened(shared: Path, usual: Path, tmp_path: Path) -> None:
    """Opening a named pipe waits for its other end: each fetch hung for ever, before its deadline began."""
    usual.mkdir(mode=0o700)
    precious = tmp_path / "precious"
    precious.write_bytes(b"of somebody")
    for folder in (shared, usual):
        os.mkfifo(folder / "gare-video-pipe.mp4")
        make_old(folder / "gare-video-pipe.mp4")
        (folder / "gare-video-link.mp4").symlink_to(precious)
        make_old(folder / "gare-video-link.mp4")
    assert fetched() == usual
    for folder in (shared, usual):
        assert {path.name for path in folder.glob("gare-video-*")} == {
            "gare-video-pipe.mp4",
            "gare-video-link.mp4",
        }
    assert precious.read_bytes() == b"of somebody"


@needs_root
def test_files_of_other_users_stay(shared: Path, usual: Path) -> None:
    """Root may remove everything, and must not take another user's fetch for an abandoned one."""
    usual.mkdir(mode=0o700)
    for folder in (shared, usual):
        foreign = folder / "gare-video-foreign.mp4"
        foreign.write_bytes(b"half a video")
        os.chown(foreign, FOREIGN_UID, FOREIGN_UID)
        make_old(foreign)
    assert fetched() == usual
    assert all((folder / "gare-video-foreign.mp4").exists() for folder in (shared, usual))


def test_an_open_folder_is_closed(usual: Path) -> None:
    """What others may write to is no place for what is then decoded."""
    usual.mkdir()
    usual.chmod(0o777)
    assert fetched() == usual


@pytest.mark.parametrize(
    "kind", ["link", "dangling", "file", "pipe", pytest.param("foreign", marks=needs_root)]
)
def test_a_name_that_is_taken_is_not_used(
    kind: str, shared: Path, usual: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever takes the folder's name first must neither get the videos nor stop the fetches."""
    elsewhere = tmp_path / "elsewhere"
    if kind == "link":
        elsewhere.mkdir()
    if kind in ("link", "dangling"):
        usual.symlink_to(elsewhere)
    elif kind == "file":
        usual.write_bytes(b"")
    elif kind == "pipe":
        os.mkfifo(usual)
    else:
        usual.mkdir(mode=0o777)
        os.chown(usual, FOREIGN_UID, FOREIGN_UID)
    before = usual.stat(follow_symlinks=False)
    first, second = fetched(), fetched()
    assert first == second != usual
    assert first.parent == shared
    assert caplog.text.count("is not a folder of this user alone") == 1
    assert usual.stat(follow_symlinks=False).st_mode == before.st_mode
    assert not elsewhere.exists() or not list(elsewhere.iterdir())
    # A cleaner of temporary files may remove it between two fetches.
    first.rmdir()
    assert fetched() not in (first, usual)


def test_folders_of_killed_processes_are_removed(shared: Path, usual: Path, repository: Path) -> None:
    """Where the usual folder cannot be used, nights with kills would fill the disk all the same."""
    usual.write_bytes(b"")
    lines = (
        "import os, sys",
        "from cluster.sources.temporary import temporary_video",
        "with temporary_video('a.mp4') as stream:",
        "    print(stream.name, flush=True)",
        "    sys.stdin.read()",
        "    os.kill(os.getpid(), 9)",
    )
    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=repository,
        env=os.environ | {"TMPDIR": str(shared)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout
    assert process.stdin
    with process.stdout as stdout, process.stdin as stdin:
        left = Path(stdout.readline().decode().strip())
        fetched()
        assert left.exists(), "it is in use"
        stdin.close()
        process.wait(60)
    assert left.exists()
    # Another process, which has not looked there yet.
    code = f"import sys; sys.stdin.close()\n{lines[1]}\nwith temporary_video('a.mp4'): pass"
    subprocess.run(
        [sys.executable, "-c", code], cwd=repository, env=os.environ | {"TMPDIR": str(shared)}, check=True
    )
    assert not left.parent.exists()


def test_files_of_earlier_versions_are_removed(shared: Path, usual: Path) -> None:
    """They lay in the shared folder itself; after an upgrade nobody else would remove them."""
    old, young, held = (shared / f"gare-video-{name}.mp4" for name in ("old", "young", "held"))
    for path in (old, young, held):
        path.write_bytes(b"half a video")
    make_old(old)
    make_old(held)
    with held.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert fetched() == usual
    assert (old.exists(), young.exists(), held.exists()) == (False, True, True)
