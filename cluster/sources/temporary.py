"""Temporary files for fetched videos, deleted when their context ends, and soon after a kill.

The folder for temporary files (TMPDIR) is shared: any user of the machine can make a file, a link or a
named pipe of any name in it. So videos lie in a folder of this user alone, and nothing is opened, locked or
deleted before it is known to be a regular file of this user.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cluster.sources.attempts import disk_error

logger = logging.getLogger(__name__)

_PREFIX = "gare-video-"
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,5}\Z")
#: Links are not followed, and a pipe or device that has replaced a file since it was checked cannot block.
_SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
#: Age after which files of earlier versions, which lay directly in the shared folder, are deleted.
_EARLIER_S = 3600.0

#: Shared folder → folder of this process alone in it, if the usual one cannot be used.
_own: dict[str, Path] = {}
#: Shared folders that this process has already searched for abandoned files.
_looked_at: set[str] = set()


@contextmanager
def temporary_video(name: str) -> Iterator[IO[bytes]]:
    """Yields an empty file that only this user can read, open for writing; its ``name`` is its path.

    It lies in ``gare-videos-UID`` in the folder for temporary files (TMPDIR). Its owner holds a lock on it.
    A file left by a killed process has no lock, and the next process that needs a file deletes it, so that
    repeated kills do not fill the disk.

    Args:
        name: name of the video; its suffix is kept, since decoders look at it.

    Raises:
        TransientError: if the folder takes no file.
    """
    suffix = found[0] if (found := _SUFFIX.search(name)) else ""
    try:
        _remove_what_others_left()
        stream = _locked(suffix)
    except OSError as error:
        raise disk_error(error) from error
    try:
        yield stream
    finally:
        Path(stream.name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # from a full disk, at the last flush
            stream.close()


def _locked(suffix: str) -> IO[bytes]:
    while True:
        folder = _folder()
        _remove_abandoned(folder)
        try:
            descriptor, path = tempfile.mkstemp(suffix, _PREFIX, folder)
        except FileNotFoundError:  # a cleaner of temporary files removed the empty folder meanwhile
            continue
        stream = Path(path).open("r+b")  # noqa: SIM115 - the caller closes it
        os.close(descriptor)
        fcntl.flock(stream, fcntl.LOCK_EX)
        if os.fstat(stream.fileno()).st_nlink:
            return stream
        stream.close()  # another process took the file for abandoned before it was locked


def _folder() -> Path:
    """Returns this user's folder, or a folder of this process alone if another user has taken that name."""
    shared = tempfile.gettempdir()
    if (own := _own.get(shared)) and own.is_dir():
        return own
    usual = Path(shared, f"gare-videos-{os.geteuid()}")
    try:
        usual.mkdir(mode=0o700, exist_ok=True)
        _make_private(usual)
    except OSError as error:
        # It has the prefix of files, so that it is removed like them if this process is killed.
        own = Path(tempfile.mkdtemp(prefix=_PREFIX))
        # Held until the process ends: the lock marks the folder as in use.
        fcntl.flock(os.open(own, os.O_RDONLY | os.O_DIRECTORY | _SAFELY), fcntl.LOCK_SH)
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        _own[shared] = own
        reason = error.strerror or str(error)
        logger.warning("%s is not a folder of this user alone (%s): using %s instead", usual, reason, own)
        return own
    return usual


def _make_private(folder: Path) -> None:
    """Removes other users' rights to a folder.

    Raises:
        OSError: for a link, for something that is not a folder, or for a folder of another user.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | _SAFELY)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "it belongs to another user")
        if stat.S_IMODE(status.st_mode) != 0o700:
            os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)


def _remove_abandoned(folder: Path, *, older_than_s: float = 0.0) -> None:
    """Deletes this user's files that no process holds, and folders that processes made for themselves."""
    uid = os.geteuid()
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if not entry.name.startswith(_PREFIX):
                    continue
                # Before opening it: opening a pipe blocks, and opening a device may do anything.
                status = entry.stat(follow_symlinks=False)
                if status.st_uid != uid:
                    continue
                if stat.S_ISDIR(status.st_mode):
                    _remove_if_free(entry.path, os.O_DIRECTORY)
                elif stat.S_ISREG(status.st_mode) and time.time() - status.st_mtime >= older_than_s:
                    _remove_if_free(entry.path, 0)


def _remove_if_free(path: str, kind: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | kind | _SAFELY)
    try:
        status = os.fstat(descriptor)  # another entry may have this name by now
        is_expected = stat.S_ISDIR(status.st_mode) if kind else stat.S_ISREG(status.st_mode)
        if status.st_uid != os.geteuid() or not is_expected:
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if kind:
            shutil.rmtree(path, ignore_errors=True)
        else:
            Path(path).unlink()
    finally:
        os.close(descriptor)


def _remove_what_others_left() -> None:
    """Deletes files of earlier versions and folders of killed processes from TMPDIR, once per process."""
    shared = tempfile.gettempdir()
    if shared in _looked_at:
        return
    _looked_at.add(shared)
    _remove_abandoned(Path(shared), older_than_s=_EARLIER_S)
