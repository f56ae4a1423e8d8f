"""The names that keys, columns and splits have in annotation files, and the form that texts get."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache

from gare.data.benchmarks.captions_file import SPLIT_NAMES as _SPLIT_NAMES

#: Keys by role, the surest first; written as ``plain`` gives them.
VIDEOS = (
    *("videoid", "video", "vid", "videoname", "videopath", "videofile", "clipid", "clip", "clipname"),
    *("filename", "file", "path", "imageid", "image", "id", "name", "key"),
)
TEXTS = (
    *("captions", "caption", "sentences", "sentence", "texts", "text", "descriptions", "description"),
    *("descs", "desc", "cap", "caps", "encap", "annotations"),
)
TIMES = ("timestamps", "timestamp", "segments", "segment")
#: Start and end of a clip in its video; a bare ``start time`` is, in MSR-VTT, a place in another video.
BOUNDS = (("start", "starts", "startsec", "startseconds"), ("end", "ends", "endsec", "endseconds"))
SPLITS = ("split", "subset")
SPLIT_NAMES = {
    **_SPLIT_NAMES,
    "val1": "val",
    "publictest": "test",
}


@lru_cache(maxsize=4096)
def plain(key: str) -> str:
    """A key without case, blanks and underscores: ``Video_ID`` and ``videoID`` are the same."""
    return "".join(sign for sign in key.strip().lower() if sign not in "_- ")


def find_key(keys: Iterable[str], names: Sequence[str]) -> str | None:
    """The first of some names that is among the keys, as it is written there."""
    return _find_key(tuple(keys), tuple(names))


@lru_cache(maxsize=4096)
def _find_key(keys: tuple[str, ...], names: tuple[str, ...]) -> str | None:
    # All records of a file have the same few keys.
    written: dict[str, str] = {}
    for key in keys:
        written.setdefault(plain(key), key)
    return next((written[name] for name in names if name in written), None)


def fold(text: str) -> str:
    """A text without blanks around it and with one blank for each run of whitespace, as the tokeniser has it.

    Copies of the same captions differ in just this: double blanks, line ends, a blank before a sentence.
    """
    return " ".join(text.split())


def texts_of_cell(cell: str) -> tuple[str, ...]:
    """The texts of a field of text: one, or the list that JSON or pandas writes."""
    written = cell.strip()
    if written.startswith("[") and written.endswith("]"):
        for parse in (json.loads, ast.literal_eval):  # both take literals alone
            try:
                parsed = parse(written)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue  # a caption such as "[music] plays"
            if isinstance(parsed, list) and parsed and all(isinstance(text, str) for text in parsed):
                return tuple(fold(text) for text in parsed)
    return (fold(cell),)
