"""Chunks of a video stream in an AVI file, including those without data, which FFmpeg does not report.

Source: Microsoft, "AVI RIFF File Reference"; "OpenDML AVI File Format Extensions" 1.02, section 3 (several
RIFF chunks). A chunk without data means that the picture before it is still shown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

#: Most chunks that are read; a day of pictures and sound has fewer.
_MAX_CHUNKS = 1 << 23
#: Lists that are entered; others are skipped.
_LISTS = frozenset((b"movi", b"rec "))
#: Names of chunks: of a stream (number and kind), of an index, and of headers.
_NAME = re.compile(rb"[0-9A-Za-z]{3}[0-9A-Za-z ]")
#: Kinds of a stream's chunks that are not pictures: changes of palette.
_ASIDE = frozenset((b"pc", b"wc"))


@dataclass(frozen=True)
class AviChunks:
    """Chunks of one stream, in the order of the file.

    Attributes:
        num_full: number of chunks with data.
        num_empty: number of chunks without data.
        num_held: number of chunks without data after the last one with data.
    """

    num_full: int
    num_empty: int
    num_held: int


def avi_chunks(path: str, stream_index: int) -> AviChunks:
    """Counts a stream's chunks up to the end of a file, or to where it is cut off or damaged."""
    mine = b"%02d" % stream_index
    num_full = num_empty = num_held = at = 0
    try:
        size = Path(path).stat().st_size
        with Path(path).open("rb") as file:
            for _ in range(_MAX_CHUNKS):
                file.seek(at)
                head = file.read(12)
                name, length = head[:4], int.from_bytes(head[4:8], "little")
                if name == b"RIFF" or (name == b"LIST" and head[8:12] in _LISTS):
                    at += 12
                    continue
                at += 8 + length + length % 2
                if len(head) < 8 or not _NAME.fullmatch(name) or at - length % 2 > size:
                    break
                if name[:2] == mine and name[2:] not in _ASIDE:
                    num_full += length > 0
                    num_empty += not length
                    num_held = 0 if length else num_held + 1
    except (OSError, ValueError):
        pass
    return AviChunks(num_full, num_empty, num_held)
