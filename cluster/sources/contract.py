"""Interface of the servers that videos are fetched from, and plain classes for their answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

#: Bytes read from a connection at once; the time limit is checked after each read.
CHUNK_BYTES = 64 * 1024

_MD5 = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class RemoteVersion:
    """Size and version of a remote file, as ``gare.data.videos.FileVersion``, which is unknown here."""

    size_bytes: int
    version: str


@dataclass(frozen=True)
class FetchedVideo:
    """A fetched video; like ``gare.data.videos.LocalVideo``."""

    path: str
    size_bytes: int
    version: str


@dataclass(frozen=True)
class Answer:
    """Answer of a server whose body is being received.

    Attributes:
        start: position in the whole body of the first byte received.
        size_bytes: length of the whole body; None if unknown until its end.
        version: see ``RemoteVersion``.
        md5: MD5 of the whole body, hexadecimal; empty if unknown.
        chunks: the bytes; raises TransientError if they break off.
    """

    start: int
    size_bytes: int | None
    version: str
    md5: str
    chunks: Iterator[bytes]


class Server(Protocol):
    """One kind of server. Every method may raise TransientError, or FetchError for a lasting error."""

    def stat(self, uri: str, timeout_s: float) -> RemoteVersion:
        """Returns size and version without the content."""
        ...

    def get(self, uri: str, start: int, version: str, timeout_s: float) -> AbstractContextManager[Answer]:
        """Returns the body from ``start`` if that version can still be had in part, else the whole body."""
        ...


class LocalSource(Protocol):
    """Reads files of this machine, as ``gare.data.videos.LocalVideos`` does."""

    def open(self, uri: str) -> AbstractContextManager[Any]:
        """Opens the file in place."""
        ...

    def stat(self, uris: Sequence[str]) -> dict[str, Any]:
        """Returns size and version of each file, or its error."""
        ...


def md5_in(etag: str, encryption: str) -> str:
    """Returns an S3 ETag that is an MD5 (uploaded in one piece, without a KMS key); else an empty string."""
    return etag if _MD5.fullmatch(etag) and encryption in ("", "AES256") else ""


def total_in(content_range: str) -> int | None:
    """Returns the length of the whole body in ``bytes 0-0/1234``; None for ``*``."""
    total = content_range.rpartition("/")[2].strip()
    return int(total) if total.isascii() and total.isdigit() else None


def start_in(content_range: str) -> int | None:
    """Returns the first position in ``bytes 5-9/10``; None if there is none."""
    found = re.match(r"bytes (\d+)-", content_range)
    return int(found[1]) if found else None
