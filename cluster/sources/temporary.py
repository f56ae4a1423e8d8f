"""Temporary files for fetched videos: gone when their context ends, and soon after a kill.

The folder for temporary files (TMPDIR) is shared: whoever is on the machine can make a file, a link or a
named pipe of any name in it. So videos lie in a folder of this user alone, and nothing is opened, locked or
removed before it is known to be a regular file of this user.
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

from cluster.sources.attempts import of_the_disk

logger = logging.getLogger(__name__)

_PREFIX = "gare-video-"
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,5}\Z")
#: Links are not followed, and a pipe or device that took a file's place since it was looked at cannot block.
_SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
#: Files of earlier versions, which lay in the shared folder itself, are removed after this long.
_EARLIER_S = 3600.0

#: Shared folder → folder of this process alone in it, where the usual one cannot be used.
_own: dict[str, Path] = {}
#: Shared folders in which this process has looked for what others left.
_looked_at: set[str] = set()


@contextmanager
def temporary_video(name: str) -> Iterator[IO[bytes]]:
    """An empty file that only this user can read, open for writing; its ``name`` is its path.

    It lies in ``gare-videos-UID`` in the folder for temporary files (TMPDIR). Its owner holds a lock on it.
    One that a killed process left behind has none, and the next one that needs a file removes it, so that
    nights with kills do not fill the disk.

    Args:
        name: of the video; its ending is kept, since decoders look at it.

    Raises:
        TransientError: where the folder takes no file.
    """
    suffix = found[0] if (found := _SUFFIX.search(name)) else ""
    try:
        _remove_what_others_left()
        stream = _locked(suffix)
    except OSError as error:
        raise of_the_disk(error) from error
    try:
        yield stream
    finally:
        Path(stream.name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # of a full disk, at the last flush
            stream.close()


def _locked(suffix: str) -> IO[bytes]:
    while True:
        folder = _folder()
        _remove_abandoned(folder)
        try:
            descriptor, path = tempfile.mkstemp(suffix, _PREFIX, folder)
        except FileNotFoundError:  # a cleaner of temporary files took the empty folder meanwhile
            continue
        stream = Path(path).open("r+b")  # noqa: SIM115 - the caller closes it
        os.close(descriptor)
        fcntl.flock(stream, fcntl.LOCK_EX)
        if os.fstat(stream.fileno()).st_nlink:
            return stream
        stream.close()  # another process took it for abandoned before the lock was there


def _folder() -> Path:
    """The folder of this user, or where somebody else has taken its name one of this process alone."""
    shared = tempfile.gettempdir()
    if (own := _own.get(shared)) and own.is_dir():
        return own
    usual = Path(shared, f"gare-videos-{os.geteuid()}")
    try:
        usual.mkdir(mode=0o700, exist_ok=True)
        _make_private(usual)
    except OSError as error:
        # Its prefix is that of files, so that it is removed as they are if this process is killed.
        own = Path(tempfile.mkdtemp(prefix=_PREFIX))
        # Held until the process ends: the lock says that the folder is in use.
        fcntl.flock(os.open(own, os.O_RDONLY | os.O_DIRECTORY | _SAFELY), fcntl.LOCK_SH)
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        _own[shared] = own
        reason = error.strerror or str(error)
        logger.warning("%s is not a folder of this user alone (%s): using %s instead", usual, reason, own)
        return own
    return usual


def _make_private(folder: Path) -> None:
    """Takes others' rights to a folder away.

    Raises:
        OSError: for a link, no folder, or a folder of another user.
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
    """Removes files of this user that nobody holds, and folders that processes had made for themselves."""
    uid = os.geteuid()
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if not entry.name.startswith(_PREFIX):
                    continue
                # Before it is opened: opening a pipe waits, and opening a device may do anything.
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
        status = os.fstat(descriptor)  # another entry may have the name by now
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
    """Removes files of earlier versions and folders of killed processes from TMPDIR, once a process."""
    shared = tempfile.gettempdir()
    if shared in _looked_at:
        return
    _looked_at.add(shared)
    _remove_abandoned(Path(shared), older_than_s=_EARLIER_S)
