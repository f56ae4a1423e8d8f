"""Videos on a mounted disk: which version of a file is there, and the file itself."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gare.errors import DataError


@dataclass(frozen=True)
class FileVersion:
    """What tells one content of a file from another without reading it.

    Attributes:
        size_bytes: its size.
        version: modification time or ETag, to be compared for equality alone.
    """

    size_bytes: int
    version: str


@dataclass(frozen=True)
class LocalVideo:
    """A video as a file that a decoder can open, and the version that was opened."""

    path: str
    size_bytes: int
    version: str


class LocalSource:
    """Local paths and ``file://`` URIs."""

    @contextmanager
    def open(self, uri: str) -> Iterator[LocalVideo]:
        """The file, as long as the context lasts.

        Raises:
            DataError: if it is not there or is not on this machine.
        """
        found = _stat(uri)
        yield LocalVideo(_local_path(uri), found.size_bytes, found.version)

    def stat(self, uris: Iterable[str]) -> dict[str, FileVersion | DataError]:
        """The version of each file, or why there is none; caused by FileNotFoundError where it is gone."""
        found: dict[str, FileVersion | DataError] = {}
        for uri in uris:
            try:
                found[uri] = _stat(uri)
            except DataError as error:
                found[uri] = error
        return found


def _stat(uri: str) -> FileVersion:
    path = _local_path(uri)
    try:
        info = Path(path).stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"cannot be read: {reason}", where=uri, accepted="a video file") from error
    return FileVersion(info.st_size, f"mtime {info.st_mtime_ns}")


def _local_path(uri: str) -> str:
    if "://" not in uri:
        return uri
    if not uri.startswith("file://"):
        raise DataError("is not on this machine", where=uri, accepted="a local path or a file:// URI")
    path = uri.removeprefix("file://")
    return path if Path(path).exists() else urllib.parse.unquote(path)
