"""Encrypted videos, which decoders take for damaged ones and turn into garbage.

Source: ISO/IEC 14496-12 section 8.12 and 23001-7 (sample entries ``encv`` and their like; ``drmi`` is
Apple's), the ASF specification's section 3.14 (Content Encryption Object).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import av

from gare.data.file_kind import read_head

#: Sample entries of MP4 and MOV whose pictures are encrypted.
_ENTRIES = frozenset((b"encv", b"drmi"))
#: Boxes at the top of a file, or in one box, that are looked at; a film in fragments has its moov first.
_MAX_BOXES = 1000
#: An index of a day of video is smaller.
_MAX_MOOV_BYTES = 1 << 28
#: GUIDs of the Content Encryption Object and of its extended form.
_ASF = (
    bytes.fromhex("fbb3112223bdd211b4b700a0c955fc6e"),
    bytes.fromhex("14e68a292226174cb935dae07ee9289c"),
)


def is_encrypted(path: str, container: str, stream: av.VideoStream) -> bool:
    """True if the file says that the pictures of a stream are encrypted.

    Args:
        path: the file.
        container: short name of its container: mov, matroska, asf, …
        stream: of that file.
    """
    if container == "mov":
        return stream.id in _encrypted_tracks(path)
    if container == "matroska":
        return "enc_key_id" in stream.metadata
    head = read_head(path) if container == "asf" else None
    return any(guid in (head or b"") for guid in _ASF)


def _encrypted_tracks(path: str) -> frozenset[int]:
    """Ids of the tracks of an MP4 or MOV file that have an encrypted sample entry."""
    try:
        if not Path(path).is_file():
            return frozenset()
        with Path(path).open("rb") as file:
            moov = _moov(file)
    except (OSError, ValueError):
        return frozenset()
    found = set()
    for kind, trak in _boxes(moov):
        if kind != b"trak":
            continue
        track_id, header = 0, _inside(trak, b"tkhd")
        if len(header) >= 24:  # behind version, flags and two times of 4 or 8 bytes
            at = 20 if header[0] == 1 else 12
            track_id = int.from_bytes(header[at : at + 4], "big")
        entries = _inside(trak, b"mdia", b"minf", b"stbl", b"stsd")[8:]
        if any(name in _ENTRIES for name, _ in _boxes(entries)):
            found.add(track_id)
    return frozenset(found)


def _moov(file: BinaryIO) -> memoryview:
    """The content of the box with the tracks; empty if there is none."""
    at = 0
    for _ in range(_MAX_BOXES):
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            break
        size, start = int.from_bytes(head[:4], "big"), 8
        if size == 1:
            size, start = int.from_bytes(head[8:16], "big"), 16
        if head[4:8] == b"moov":
            file.seek(at + start)
            return memoryview(file.read(min(size - start, _MAX_MOOV_BYTES) if size else _MAX_MOOV_BYTES))
        if size < start:  # 0: to the end of the file
            break
        at += size
    return memoryview(b"")


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Name and content of each box."""
    at = 0
    for _ in range(_MAX_BOXES):
        size = int.from_bytes(data[at : at + 4], "big") or len(data) - at
        if at + 8 > len(data) or size < 8:
            return
        yield bytes(data[at + 4 : at + 8]), data[at + 8 : at + size]
        at += size


def _inside(data: memoryview, *names: bytes) -> memoryview:
    """The content of a box in a box in …; empty if there is none."""
    for name in names:
        data = next((content for kind, content in _boxes(data) if kind == name), memoryview(b""))
    return data
