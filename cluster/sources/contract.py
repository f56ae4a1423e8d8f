"""The contract of each kind of server that videos are fetched from, and the plain values of its answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

#: Bytes asked of a connection at once; the time is looked at after each.
CHUNK_BYTES = 64 * 1024

_MD5 = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
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
    """A body on its way.

    Attributes:
        start: position in the whole body of the first byte that comes.
        size_bytes: length of the whole body; None where it says itself where it ends.
        version: see ``RemoteVersion``.
        md5: of the whole body, hexadecimal; empty where it is not known.
        chunks: the bytes; raises TransientError where they break off.
    """

    start: int
    size_bytes: int | None
    version: str
    md5: str
    chunks: Iterator[bytes]


class Server(Protocol):
    """One kind of server. Every method may raise TransientError, and FetchError for what stays a fault."""

    def stat(self, uri: str, timeout_s: float) -> RemoteVersion:
        """Size and version without the content."""
        ...

    def get(self, uri: str, start: int, version: str, timeout_s: float) -> AbstractContextManager[Answer]:
        """The body from ``start``, if it is still that version; else, or where that cannot be had, all."""
        ...


class LocalSource(Protocol):
    """Reads files of this machine, as ``gare.data.videos.LocalVideos`` does."""

    def open(self, uri: str) -> AbstractContextManager[Any]:
        """The file where it is."""
        ...

    def stat(self, uris: Sequence[str]) -> dict[str, Any]:
        """Size and version, or a fault, of each."""
        ...


def md5_in(etag: str, encryption: str) -> str:
    """The MD5 that an ETag of S3 is, of an object uploaded at once, with no key of its own; else empty."""
    return etag if _MD5.fullmatch(etag) and encryption in ("", "AES256") else ""


def total_in(content_range: str) -> int | None:
    """The length of the whole body in ``bytes 0-0/1234``; None for ``*``."""
    total = content_range.rpartition("/")[2].strip()
    return int(total) if total.isascii() and total.isdigit() else None


def start_in(content_range: str) -> int | None:
    """The first position in ``bytes 5-9/10``; None where there is none."""
    found = re.match(r"bytes (\d+)-", content_range)
    return int(found[1]) if found else None
