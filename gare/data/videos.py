"""Sources of videos' bytes: the contract, and the source of files of this machine.

Sources of other machines are the business of ``cluster``; extraction knows this contract alone.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from gare.data.decode.file_kind import broken_link
from gare.errors import DataError, FetchError, GoneError, shown
from gare.storage.uris import local_path, scheme_of

_CHUNK_BYTES = 1 << 20
#: Faults of a path that names nothing, now and later; all others are of the disk, the mount or the rights.
_OF_THE_NAME = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL))


@dataclass(frozen=True)
class FileVersion:
    """Size and version of a file, which tell one state of it from another without reading it.

    Attributes:
        size_bytes: length of its content.
        version: nanoseconds of its last change (local), its ETag (S3, HTTP) or its Last-Modified; empty where
            a server says neither, and then the length alone can tell.
    """

    size_bytes: int
    version: str


@dataclass(frozen=True)
class LocalVideo:
    """A video as a file of this machine, for as long as its context lasts.

    Attributes:
        path: of the file.
        size_bytes: length of its content.
        version: as in ``FileVersion``, of where it came from.
    """

    path: str
    size_bytes: int
    version: str


class VideoSource(Protocol):
    """Brings videos to where they are decoded. What it gives has the attributes of the classes above."""

    def open(self, uri: str) -> AbstractContextManager[LocalVideo]:
        """The video as a local file, whole; what was fetched is removed when the context ends.

        Raises:
            FetchError: where it cannot be had, or is another file at the end of the context.
        """
        ...

    def stat(self, uris: Sequence[str]) -> dict[str, FileVersion | DataError]:
        """Size and version of each, without its content; a fault is that of one URI and returned for it."""
        ...


class LocalVideos:
    """Local paths and ``file://`` URIs; files are read where they are."""

    @contextmanager
    def open(self, uri: str) -> Iterator[LocalVideo]:
        """The file itself.

        Raises:
            FetchError: where there is none, or where it has changed when the context ends: what was decoded
                would be neither the old nor the new video.
        """
        before = _version(uri)
        try:
            yield LocalVideo(local_path(uri), before.size_bytes, before.version)
        except DataError as error:
            _check_unchanged(uri, before, error)
            raise
        _check_unchanged(uri, before, None)

    def stat(self, uris: Sequence[str]) -> dict[str, FileVersion | DataError]:
        """Size and time of the last change in nanoseconds."""
        found: dict[str, FileVersion | DataError] = {}
        for uri in uris:
            try:
                found[uri] = _version(uri)
            except FetchError as error:
                found[uri] = error
        return found


def _version(uri: str) -> FileVersion:
    if scheme_of(uri) != "file":
        raise FetchError("is not on this machine", where=shown(uri), accepted="a local path or a file:// URI")
    try:
        status = os.stat(local_path(uri))  # noqa: PTH116 - also of what is no ordinary path, such as one with NUL
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        kind = FetchError
        if isinstance(error, FileNotFoundError):
            kind, link = GoneError, broken_link(local_path(uri))
            reason = f"is {link}" if link else reason
        fault = kind(reason, where=shown(uri), accepted="a file that exists and may be read")
        is_final = not isinstance(error, OSError) or error.errno in _OF_THE_NAME
        raise fault if is_final else fault.passing() from error
    return FileVersion(status.st_size, str(status.st_mtime_ns))


def _check_unchanged(uri: str, before: FileVersion, cause: DataError | None) -> None:
    try:
        same = _version(uri) == before
    except FetchError:
        same = False
    if not same:
        raise FetchError(
            "changed while it was read", where=shown(uri), accepted="a file that is complete"
        ).passing() from cause


def check_readable(path: str) -> None:
    """Reads a file to its end, to tell a storage that does not give it from a file that is bad.

    Decoders take a fault of reading for the end of the file, or for damage.

    Raises:
        FetchError: where it cannot be read; it may pass.
    """
    try:
        if stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - as above
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                while file.read(_CHUNK_BYTES):
                    pass
    except OSError as error:
        raise FetchError(
            f"cannot be read to its end: {error.strerror or error}",
            where=path,
            accepted="a disk or mount that gives the file",
        ).passing() from error
