"""Times below zero of blocks in a Matroska file, which FFmpeg does not report.

Source: RFC 9559, sections 5.1.3 (Cluster) and 10 (Block); RFC 8794, section 4 (numbers of variable size).
"""

from __future__ import annotations

from pathlib import Path

_SEGMENT, _CLUSTER, _TIME, _GROUP = (bytes.fromhex(name) for name in ("18538067", "1F43B675", "E7", "A0"))
_BLOCKS = frozenset((b"\xa3", b"\xa1"))
#: Elements that are entered; others are skipped.
_OPENED = frozenset((_SEGMENT, _CLUSTER, _GROUP))
#: A block's time is a signed 16-bit offset from its cluster's time: no block of a later cluster is below
#: zero.
_REACH = 1 << 15
#: Most elements that are read; more than there are in that time.
_MAX_ELEMENTS = 1 << 17


def times_below_zero(path: str) -> dict[int, int]:
    """Reads the times of blocks that lie before the zero of a file's clock.

    Returns:
        Position of each block in the file (FFmpeg's position of its packet) → ticks, negative. Empty if there
        are no such blocks or the file cannot be read; of a damaged file, the blocks before the damage.
    """
    found: dict[int, int] = {}
    try:
        with Path(path).open("rb") as file:
            at = cluster = 0
            for _ in range(_MAX_ELEMENTS):
                file.seek(at)
                name, size, start = _element(file.read(12))
                file.seek(at + start)
                if name == _TIME:
                    cluster = int.from_bytes(file.read(min(size or 0, 8)), "big")
                    if cluster >= _REACH:
                        break
                elif name in _BLOCKS:
                    time = _time(file.read(11), cluster)
                    if time < 0:
                        found[at + start] = time
                if name in _OPENED:
                    size = 0
                if not name or size is None:
                    break
                at += start + size
    except (OSError, ValueError):
        pass
    return found


def _element(head: bytes) -> tuple[bytes, int | None, int]:
    """Parses the first bytes of an element: its name, the size of its content, and where that starts.

    The size is None if it is not stated, the name is empty if there is no element.
    """
    length = 9 - head[0].bit_length() if head else 0
    if not 1 <= length <= 4 or len(head) <= length or not head[length]:
        return b"", None, 0
    rest = head[length:]
    width = 9 - rest[0].bit_length()
    size = int.from_bytes(rest[:width], "big") & ((1 << 7 * width) - 1)
    return head[:length], None if size == (1 << 7 * width) - 1 else size, length + width


def _time(block: bytes, cluster: int) -> int:
    """Returns the ticks of a block from its first bytes: track number, time from its cluster's, flags."""
    width = 9 - block[0].bit_length() if block else 9
    return cluster + int.from_bytes(block[width : width + 2], "big", signed=True)
