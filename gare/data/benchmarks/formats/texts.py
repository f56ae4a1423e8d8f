"""Text in annotation files: from stored bytes to characters, and from cells to captions."""

from __future__ import annotations

import ast
import gzip
import io
import json
import logging
import re
import unicodedata
import warnings
import zlib

from gare.errors import DataError, without_secrets

logger = logging.getLogger(__name__)

#: Bytes that a gzip-ed annotation file may unpack to; the largest of the published ones has 0.2 GB.
MAX_UNPACKED_BYTES = 2 * 2**30
_CHUNK_BYTES = 2**20

_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig", "UTF-8"),
    (b"\xff\xfe\0\0", "utf-32", "UTF-32"),  # before UTF-16, whose mark it begins with
    (b"\0\0\xfe\xff", "utf-32", "UTF-32"),
    (b"\xff\xfe", "utf-16", "UTF-16"),
    (b"\xfe\xff", "utf-16", "UTF-16"),
)

# Windows-1252. The letters á â ä ç é ë í î ó ô ö ú ü ß have the same bytes in Windows-1250, -1252, -1254 and
# ISO-8859-1, -2, -9, -15. Within a word of small Latin letters no other encoding in use gives letters there.
_ASCII = re.compile(rb"[A-Za-z]")
_HIGH = re.compile(rb"[\x80-\xff]")
_WORD = re.compile(rb"[A-Za-z\x80-\xff]*[\x80-\xff][A-Za-z\x80-\xff]*")
_SURE_WORD = re.compile(
    rb"[A-Za-z]?(?:[a-z]|[\xe1\xe2\xe4\xe7\xe9\xeb\xed\xee\xf3\xf4\xf6\xfa\xfc\xdf])+"
    rb"|[A-Za-z]+n\x92t|[A-Za-z]+\x92(?:re|ve|ll)"
)
# Of these letters, Windows-1257 (Baltic) has only ä é ó ö ü ß at the same bytes: its ā is â, its ī is î.
_SURE_BYTE = re.compile(rb"[\xe4\xe9\xf3\xf6\xfc\xdf\x92]")
# In other encodings the apostrophe is a letter that may stand there: the rest of the file has to be sure.
_LIKELY_WORD = re.compile(rb"[A-Za-z]+\x92[sdm]?|[\x96\x97]")
_QUOTED = re.compile(rb"(?<![A-Za-z\x80-\xff])\x93([\x20-\x7e]+)\x94(?![A-Za-z\x80-\xff])")

_ZERO_WIDTH = "\u200b\u2060\ufeff"
_EDGES = re.compile(rf"^[\s{_ZERO_WIDTH}]+|[\s{_ZERO_WIDTH}]+$")
#: Letters and symbols that have no picture.
_BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0")

_STRING = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_STRING_LIST = re.compile(rf"\[\s*{_STRING}(?:\s*,\s*{_STRING})*\s*,?\s*\]", re.DOTALL)
_LIKE_A_LIST = re.compile(
    r"""\[\s*(?:[\[({]\s*)?(?:[bfru]?['"]|None\b|nan\b).*|[({]\s*[bfru]?['"].*[)}]|array\(\[.*""",
    re.IGNORECASE | re.DOTALL,
)


def decode_text(name: str, data: bytes) -> str:
    """Returns the text of a file, unpacked if it is gzip-ed, without a byte order mark.

    Encodings are UTF-8, UTF-16 and UTF-32 with a byte order mark, UTF-16 without one, and Windows-1252 where
    each of its characters can be nothing else.

    Args:
        name: its name, for messages.
        data: its content, as stored.

    Raises:
        DataError: for a damaged gzip file, one that unpacks to more than ``MAX_UNPACKED_BYTES``, and content
            of another encoding, with the line.
    """
    # By content, not by name: browsers and download tools unpack .gz files and keep the name.
    if data.startswith(b"\x1f\x8b"):
        data = _unpack(name, data)
    codec, encoding = next(
        ((codec, encoding) for mark, codec, encoding in _MARKS if data.startswith(mark)),
        _without_mark(data),
    )
    try:
        text = data.decode(codec)
    except UnicodeDecodeError as error:
        position = error.start
        # A file that ends within a character was cut off, whatever its encoding.
        if encoding == "UTF-8" and error.reason != "unexpected end of data":
            unsure = _first_unsure(data)
            if unsure is None:
                logger.warning("%s is not UTF-8 and was read as Windows-1252", without_secrets(name))
                return data.decode("cp1252")
            position = unsure
        raise DataError(
            f"is not {encoding}: byte {data[position]:#04x} in line {data[:position].count(10) + 1}",
            where=name,
            accepted="the same text saved as UTF-8",
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(f"holds NUL characters from line {line} on", where=name, accepted="plain UTF-8 text")
    return text.lstrip("\ufeff")


def _unpack(name: str, data: bytes) -> bytes:
    unpacked = bytearray()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                unpacked += chunk
                if len(unpacked) > MAX_UNPACKED_BYTES:
                    raise DataError(
                        f"unpacks to more than {MAX_UNPACKED_BYTES / 2**30:g} GiB",
                        where=name,
                        accepted="a smaller gzip file, or the file unpacked",
                    )
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"is damaged: {error}", where=name, accepted="a whole gzip file") from error
    return bytes(unpacked)


def _without_mark(data: bytes) -> tuple[str, str]:
    """Returns codec and name of the encoding of data without a mark; all files begin with ASCII."""
    head = data[:4096]
    for parity, codec in ((1, "utf-16-le"), (0, "utf-16-be")):
        zeros, others = head[parity::2].count(0), head[1 - parity :: 2].count(0)
        if head[parity : parity + 1] == b"\0" and len(data) % 2 == 0 and not others and zeros * 5 > len(head):
            return codec, "UTF-16"
    return "utf-8", "UTF-8"


def _first_unsure(data: bytes) -> int | None:
    """Returns the first byte that need not be Windows-1252; None if all of the text surely is."""
    # Unlike ö and ô, which have these bytes in older encodings, quotes stand around a text.
    plain = _QUOTED.sub(rb"'\1'", data)
    first, is_sure = 0, plain != data
    for word in _WORD.finditer(plain):
        num_ascii = len(_ASCII.findall(word[0]))
        if _SURE_WORD.fullmatch(word[0]) and num_ascii >= max(2, len(word[0]) - num_ascii):
            is_sure = is_sure or bool(_SURE_BYTE.search(word[0]))
        elif not _LIKELY_WORD.fullmatch(word[0]):
            first, is_sure = word.start(), False
            break
    # Replacing quotes kept all positions.
    high = _HIGH.search(plain, first)
    return None if is_sure or high is None else high.start()


def strip_invisible(text: str) -> str:
    """Strips whitespace and zero-width characters around a text."""
    text = text.strip()
    return text if text.isascii() else _EDGES.sub("", text)


def clean_caption(text: str) -> str:
    """Strips a caption; returns an empty text for one of which nothing can be seen."""
    text = strip_invisible(text)
    return text if text.isascii() or any(map(_is_visible, text)) else ""


def _is_visible(sign: str) -> bool:
    return unicodedata.category(sign) not in ("Cc", "Cf", "Zs", "Zl", "Zp") and sign not in _BLANKS


def parse_text_list(cell: str) -> list[str] | None:
    """Returns the texts of a list that JSON or Python wrote into a cell; None if the cell holds a text.

    Raises:
        ValueError: for a cell that begins like a list and is none of texts, such as one that NumPy wrote
            (``['a' 'b']``, two texts that Python reads as one).
    """
    written = strip_invisible(cell)
    if not written.startswith(("[", "(", "{", "array([")):
        return None
    parsed = _parse_list(written)
    if parsed is None and not _LIKE_A_LIST.fullmatch(written):
        return None  # a caption such as "[music] plays"
    if not isinstance(parsed, list) or not all(isinstance(text, str) for text in parsed):
        raise ValueError(f"not a list of texts: {written[:60]}")
    return parsed


def _parse_list(written: str) -> object | None:
    """Returns the list in a cell, or other values in brackets; None for a text."""
    if written.startswith("["):
        try:
            parsed: object = json.loads(written)
        except (ValueError, RecursionError):
            if not _STRING_LIST.fullmatch(written):
                return None
        else:
            return parsed
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an unknown escape, which Python would keep
            try:
                return ast.literal_eval(written)  # type: ignore[no-any-return]
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                return None
    return None
