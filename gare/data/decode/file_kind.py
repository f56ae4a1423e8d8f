"""The kind of a file by its first bytes, to explain why it is not a video if decoding cannot tell."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

#: Enough for all signatures here and for the header of an ASF file.
HEAD_BYTES = 1 << 16

#: Position, bytes, kind. The order matters if one signature begins another.
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (
        0,
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer; fetch the content with git lfs pull",
    ),
    (0, b"/annex/objects/", "a git-annex pointer; fetch the content with git annex get"),
    (0, b"../.git/annex/objects/", "a git-annex pointer; fetch the content with git annex get"),
    (0, b"PK\x03\x04", "a ZIP archive; unpack it"),
    (0, b"PK\x05\x06", "an empty ZIP archive"),
    (0, b"\x1f\x8b", "compressed with gzip; unpack it"),
    (0, b"\xfd7zXZ\0", "compressed with xz; unpack it"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it"),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4; unpack it"),
    (0, b"BZh", "compressed with bzip2; unpack it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it"),
    (0, b"Rar!\x1a\x07", "a RAR archive; unpack it"),
    (257, b"ustar", "a tar archive; unpack it"),
    (0, b"%PDF-", "a PDF document"),
    (0, b"PAR1", "a Parquet table"),
    (0, b"ARROW1", "an Arrow table"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"SQLite format 3\0", "an SQLite database"),
    (0, b"\x7fELF", "a program"),
    (0, b"d8:announce", "a BitTorrent file, which names a video and does not hold it"),
    (0, b"\x00\x05\x16\x07", "metadata of macOS (AppleDouble), which lies beside a video as ._NAME"),
    (0, b"L\0\0\0\x01\x14\x02\0", "a Windows shortcut"),
    (0, b"Salted__", "encrypted with OpenSSL"),
    (0, b"age-encryption.org/", "encrypted with age"),
    (0, b"-----BEGIN PGP MESSAGE", "encrypted with PGP"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (8, b"WEBP", "a WebP picture"),
    (0, b"II*\0", "a TIFF picture"),
    (0, b"MM\0*", "a TIFF picture"),
    (0, b"8BPS", "a Photoshop picture"),
    (4, b"ftypavi", "an AVIF picture"),
    *((4, b"ftyp" + brand, "a HEIF picture") for brand in (b"heic", b"heix", b"heim", b"heis", b"mif1")),
    (4, b"ftypmsf1", "a HEIF sequence of pictures"),
    (4, b"ftypM4A", "sound (M4A)"),
    (4, b"ftypM4B", "sound (M4B)"),
    (0, b"ID3", "sound (MP3)"),
    (0, b"fLaC", "sound (FLAC)"),
    (8, b"WAVE", "sound (WAV)"),
    (8, b"AIFF", "sound (AIFF)"),
    (0, b"#!AMR", "sound (AMR)"),
    (0, b"MThd", "music as notes (MIDI)"),
)
#: Beginnings of text, after spaces and a byte order mark, in lower case.
_TEXT_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"<!doctype html", "an HTML page, such as a login or error page that was saved in the video's place"),
    (b"<html", "an HTML page, such as a login or error page that was saved in the video's place"),
    (b"<svg", "an SVG picture"),
    (b"webvtt", "subtitles (WebVTT)"),
    (b"{\\rtf", "a text document (RTF)"),
    (b"{", "text (JSON)"),
    (b"[{", "text (JSON)"),
)
#: First bytes of video containers, to tell a damaged or unfinished one from other files.
_CONTAINERS: tuple[tuple[int, bytes, str], ...] = (
    *(
        (4, name, "MP4/MOV")
        for name in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"moof")
    ),
    (0, b"\x1aE\xdf\xa3", "Matroska/WebM"),
    (8, b"AVI ", "AVI"),
    (0, b"FLV\x01", "FLV"),
    (0, bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), "ASF/WMV"),
    (0, b"OggS", "Ogg"),
    (0, b"GIF8", "GIF"),
    (0, b".RMF", "RealMedia"),
    (0, b"\x00\x00\x01\xba", "MPEG-PS"),
)
_TS_PACKET = 188


def read_head(path: str, size: int = HEAD_BYTES) -> bytes | None:
    """Reads the first bytes of a file, fewer if it is shorter.

    Returns:
        the bytes; None if the file cannot be read or is not a regular file: a pipe can be read only once.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            return None
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - unbuffered: one read
            return file.read(size)
    except (OSError, ValueError):
        return None


def broken_link(path: str) -> str:
    """Describes a broken link, such as git-annex leaves; empty for any other path."""
    try:
        if not os.path.islink(path):  # noqa: PTH114 - also of what is no ordinary path
            return ""
        target = os.readlink(path)  # noqa: PTH115
        os.stat(path)  # noqa: PTH116
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        return ""
    else:
        return ""
    is_annex = ".git/annex/objects/" in target
    hint = "content of git-annex that is not here; fetch it with git annex get" if is_annex else "nothing"
    return f"a link to {hint}"


def file_kind(head: bytes) -> str:
    """Describes a file that is not a playable video, in words that follow "it is".

    Args:
        head: its first bytes; all of them if it is shorter than ``HEAD_BYTES``.

    Returns:
        empty for videos and unknown kinds.
    """
    if not head:
        return "empty (0 bytes)"
    for place, magic, kind in _SIGNATURES:
        if head.startswith(magic, place):
            return kind
    if _is_scrambled(head):
        return "encrypted (a scrambled MPEG-TS broadcast)"
    if not any(head):
        return "nothing but zeros at its start, as downloads are that have not finished"
    return _text_kind(head)


def container_of_head(head: bytes) -> str:
    """Returns the container that a file's first bytes belong to: MP4/MOV, AVI, …; empty if unknown."""
    for place, magic, name in _CONTAINERS:
        if head.startswith(magic, place):
            return name
    return "MPEG-TS" if _ts_packets(head) else ""


def leading_text(head: bytes) -> bytes:
    """Returns the text that a file begins with: from its first letter to the first zero byte.

    An ID3 tag in front of it is left out, as FFmpeg does before it looks.
    """
    at = 0
    while head.startswith(b"ID3", at) and len(head) - at > 10:
        tag = head[at : at + 10]
        size = sum((byte & 0x7F) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
        at += 10 + size + (10 if tag[5] & 0x10 else 0)
    end = head.find(b"\0", at)
    return head[at : None if end < 0 else end].removeprefix(b"\xef\xbb\xbf").lstrip()


def _text_kind(head: bytes) -> str:
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    text = head.decode(encoding, "ignore")  # a letter may be cut at the end of what was read
    if len(text.encode(encoding)) < len(head) - 4 or re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]", text):
        return ""
    lowered = text.removeprefix("\ufeff").lstrip().lower().encode()
    if not lowered:
        return "empty but for spaces"
    for magic, kind in _TEXT_SIGNATURES:
        if lowered.startswith(magic):
            return kind
    if lowered.startswith((b"<?xml", b"<error")):
        if b"<html" in lowered:
            return _TEXT_SIGNATURES[0][1]
        code = re.search(r"<error>.{0,500}?<code>(\w{1,60})</code>", text, re.IGNORECASE | re.DOTALL)
        return (
            f"the error of a storage server ({code[1]}), saved in the video's place" if code else "text (XML)"
        )
    return "text"


def _ts_packets(head: bytes) -> list[bytes]:
    """Returns the whole packets at the start of an MPEG transport stream; empty for other files."""
    packets = [head[at : at + _TS_PACKET] for at in range(0, len(head) - _TS_PACKET + 1, _TS_PACKET)]
    is_stream = len(packets) > 4 and all(packet[0] == 0x47 for packet in packets)
    return packets if is_stream else []


def _is_scrambled(head: bytes) -> bool:
    """True if most packets of a transport stream say that their payload is scrambled."""
    packets = _ts_packets(head)
    return sum(packet[3] & 0xC0 != 0 for packet in packets) > len(packets) / 2
