"""Tracks of an MP4 or MOV file as described by its boxes, for facts that FFmpeg does not report.

Source: ISO/IEC 14496-12, sections 8.3 to 8.7 (trak, tkhd, stsd, dref).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gare.errors import DataError

#: Most boxes of one level that are read. A fragmented recording of a day has a quarter as many, and its index
#: may come after them.
MAX_BOXES = 1 << 20
#: Most bytes of an index that are read; that of a day of video is smaller.
_MAX_MOOV_BYTES = 1 << 28


@dataclass(frozen=True)
class MovTrack:
    """A track of the file.

    Attributes:
        track_id: its number in the file, FFmpeg's id of the stream.
        entries: four-letter names of its sample entries: avc1, hvc1, mp4a, encv, …
        is_external: True if all of its pictures or sounds lie in other files.
    """

    track_id: int
    entries: frozenset[bytes]
    is_external: bool


def mov_tracks(path: str) -> list[MovTrack]:
    """Reads the tracks, in their order; empty if the file cannot be read or has no index.

    Raises:
        DataError: if it has too many boxes before its index.
    """
    try:
        if not Path(path).is_file():  # a pipe can be read only once
            return []
        with Path(path).open("rb") as file:
            moov = _moov(file, path)
    except (OSError, ValueError):
        return []
    return [_track(trak) for name, trak in _boxes(moov) if name == b"trak"]


def _track(trak: memoryview) -> MovTrack:
    header, media = _inside(trak, b"tkhd"), _inside(trak, b"mdia", b"minf")
    at = 20 if bytes(header[:1]) == b"\1" else 12  # after version, flags and two times of 8 or 4 bytes
    entries = _boxes(_inside(media, b"stbl", b"stsd")[8:])
    # Bit 0 of an entry's flags: the data lie in this file.
    is_inside = [
        bool(content[3] & 1)
        for _, content in _boxes(_inside(media, b"dinf", b"dref")[8:])
        if len(content) > 3
    ]
    return MovTrack(
        int.from_bytes(header[at : at + 4], "big"),
        frozenset(name for name, _ in entries),
        bool(is_inside) and not any(is_inside),
    )


def _moov(file: BinaryIO, path: str) -> memoryview:
    """Returns the content of the box with the tracks, or empty; reads only 16 bytes of other boxes."""
    at = 0
    for _ in range(MAX_BOXES):
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            return memoryview(b"")
        size, start = int.from_bytes(head[:4], "big"), 8
        if size == 1:
            size, start = int.from_bytes(head[8:16], "big"), 16
        if head[4:8] == b"moov":
            file.seek(at + start)
            left = size - start if size else _MAX_MOOV_BYTES  # 0: to the end of the file
            return memoryview(file.read(max(0, min(left, _MAX_MOOV_BYTES))))
        if size < start:
            return memoryview(b"")
        at += size
    what = f"has more than {MAX_BOXES} boxes before its index (moov)"
    raise DataError(what, where=path, accepted="an MP4 or MOV file with fewer fragments")


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yields name and content of each box."""
    at = 0
    for _ in range(MAX_BOXES):
        size = int.from_bytes(data[at : at + 4], "big") or len(data) - at
        if at + 8 > len(data) or size < 8:
            return
        yield bytes(data[at + 4 : at + 8]), data[at + 8 : at + size]
        at += size


def _inside(data: memoryview, *names: bytes) -> memoryview:
    """Returns the content of the box at a path of nested names; empty if it does not exist."""
    for name in names:
        data = next((content for kind, content in _boxes(data) if kind == name), memoryview(b""))
    return data
