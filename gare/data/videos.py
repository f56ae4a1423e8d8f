"""Sources of video files: the interface, and the source for files of this machine.

``cluster`` implements sources of other machines; extraction knows only this interface.
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
from gare.errors import DataError, FetchError, GoneError, without_secrets
from gare.storage.uris import local_path, scheme_of

_CHUNK_BYTES = 1 << 20
#: Errors of a path that names no file, now or later; all others come from disk, mount or permissions.
_OF_THE_NAME = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL))


@dataclass(frozen=True, slots=True)
class FileVersion:
    """Size and version of a file, which tell its states apart without reading it.

    Attributes:
        size_bytes: length of its content.
        version: nanoseconds of its last change (local), its ETag (S3, HTTP) or its Last-Modified; empty if a
            server states neither: only the length tells them apart then.
    """

    size_bytes: int
    version: str


@dataclass(frozen=True)
class LocalVideo:
    """A video as a file of this machine, valid as long as its context lasts.

    Attributes:
        path: of the file.
        size_bytes: length of its content.
        version: version of its source, as in ``FileVersion``.
    """

    path: str
    size_bytes: int
    version: str


class VideoSource(Protocol):
    """Interface of a source that fetches videos for decoding; results have the attributes of the above."""

    def open(self, uri: str) -> AbstractContextManager[LocalVideo]:
        """Opens the video as a whole local file; a fetched copy is removed when the context ends.

        Raises:
            FetchError: if it cannot be fetched, or is another file at the end of the context.
        """
        ...

    def stat(self, uris: Sequence[str]) -> dict[str, FileVersion | DataError]:
        """Reads size and version of each URI without its content; returns a fault in place of a version."""
        ...


class LocalVideos:
    """Source for local paths and ``file://`` URIs; files are read in place."""

    @contextmanager
    def open(self, uri: str) -> Iterator[LocalVideo]:
        """Opens the file itself.

        Raises:
            FetchError: if it does not exist, or has changed when the context ends: what was decoded would be
                neither the old nor the new video.
        """
        before = _version(uri)
        try:
            yield LocalVideo(local_path(uri), before.size_bytes, before.version)
        except DataError as error:
            _check_unchanged(uri, before, error)
            raise
        _check_unchanged(uri, before, None)

    def stat(self, uris: Sequence[str]) -> dict[str, FileVersion | DataError]:
        """Reads size and time of the last change in nanoseconds."""
        found: dict[str, FileVersion | DataError] = {}
        for uri in uris:
            try:
                found[uri] = _version(uri)
            except FetchError as error:
                found[uri] = error
        return found


def _version(uri: str) -> FileVersion:
    if scheme_of(uri) != "file":
        raise FetchError(
            "is not on this machine", where=without_secrets(uri), accepted="a local path or a file:// URI"
        )
    try:
        status = os.stat(local_path(uri))  # noqa: PTH116 - also of what is no ordinary path, such as one with NUL
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        kind = FetchError
        if isinstance(error, FileNotFoundError):
            kind, link = GoneError, broken_link(local_path(uri))
            reason = f"is {link}" if link else reason
        fault = kind(reason, where=without_secrets(uri), accepted="a file that exists and may be read")
        is_final = not isinstance(error, OSError) or error.errno in _OF_THE_NAME
        raise fault if is_final else fault.as_transient() from error
    return FileVersion(status.st_size, str(status.st_mtime_ns))


def _check_unchanged(uri: str, before: FileVersion, cause: DataError | None) -> None:
    try:
        same = _version(uri) == before
    except FetchError:
        same = False
    if not same:
        raise FetchError(
            "changed while it was read", where=without_secrets(uri), accepted="a file that is complete"
        ).as_transient() from cause


def check_readable(path: str) -> None:
    """Reads a file to its end, to tell a storage that fails from a file that is bad.

    Decoders take a read error for the end of the file, or for damage.

    Raises:
        FetchError: if it cannot be read; the error may pass.
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
        ).as_transient() from error
