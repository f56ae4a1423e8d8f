"""Temporary files for fetched videos: gone when their context ends, and soon after a kill."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cluster.sources.attempts import of_the_disk

_PREFIX = "gare-video-"
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,5}\Z")


@contextmanager
def temporary_video(name: str) -> Iterator[IO[bytes]]:
    """An empty file in the folder for temporary files (TMPDIR), open for writing; its ``name`` is its path.

    Its owner holds a lock on it. One that a killed process left behind has none, and the next one that needs
    a file removes it, so that nights with kills do not fill the disk.

    Args:
        name: of the video; its ending is kept, since decoders look at it.

    Raises:
        TransientError: where the folder takes no file.
    """
    suffix = found[0] if (found := _SUFFIX.search(name)) else ""
    try:
        _remove_abandoned()
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
        descriptor, path = tempfile.mkstemp(suffix, _PREFIX)
        stream = Path(path).open("r+b")  # noqa: SIM115 - the caller closes it
        os.close(descriptor)
        fcntl.flock(stream, fcntl.LOCK_EX)
        if os.fstat(stream.fileno()).st_nlink:
            return stream
        stream.close()  # another process took it for abandoned before the lock was there


def _remove_abandoned() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
