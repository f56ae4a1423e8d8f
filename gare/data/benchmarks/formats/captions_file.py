"""Rows of a captions file: the names that its columns may have, and checks of their values.

The first name of each role is the documented one, the others occur in people's files:

    video    video, video_id, file, filename, file_name, path
    caption  caption, captions, text, sentence
    split    split
    start_s  start_s, start, start_time, start_sec, start_seconds
    end_s    end_s, end, end_time, end_sec, end_seconds

Upper and lower case do not matter, blanks count as underscores. Other columns are ignored, unless their name
is close to one of these and its role is otherwise empty: that is taken for a misspelling.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gare.data.benchmarks.formats.records import Columns, read_records
from gare.data.benchmarks.formats.texts import clean_caption, parse_text_list, strip_invisible
from gare.data.collected_errors import CollectedErrors

ROLES = {
    "video": ("video", "video_id", "file", "filename", "file_name", "path"),
    "caption": ("caption", "captions", "text", "sentence"),
    "split": ("split",),
    "start_s": ("start_s", "start", "start_time", "start_sec", "start_seconds"),
    "end_s": ("end_s", "end", "end_time", "end_sec", "end_seconds"),
}
REQUIRED = ("video", "caption")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "validate", "validation", "valid", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}


@dataclass(frozen=True)
class CaptionRow:
    """One row of a captions file.

    Attributes:
        where: its place, such as ``line 12``.
        video: the video as the file names it.
        captions: its texts, without blanks around them.
        split: train, val, test or None.
        start_s: seconds; None if the clip starts with its file.
        end_s: seconds; None if it ends with its file.
    """

    where: str
    video: str
    captions: tuple[str, ...]
    split: str | None
    start_s: float | None
    end_s: float | None


def parse_captions(
    name: str,
    data: bytes,
    faults: CollectedErrors,
    names_video: Callable[[str], bool] | None = None,
) -> list[CaptionRow]:
    """Reads the content of a captions file.

    Args:
        name: its file name; the ending determines the format.
        data: its content.
        faults: collects the faults of single rows, which are then left out.
        names_video: returns True for the name of a video that is there; tells rows of a table from lines of
            a text.

    Raises:
        DataError: for a file that cannot be parsed at all.
    """
    columns_of: dict[tuple[str, ...], dict[str, str]] = {}
    rows = []
    for where, record in read_records(
        name, data, faults, Columns(_is_header, _is_used, _is_video, names_video)
    ):
        keys = tuple(record)
        if keys not in columns_of:
            columns_of[keys] = _find_columns(keys, where, faults)
        row = _to_row(where, record, columns_of[keys], faults)
        if row is not None:
            rows.append(row)
    return rows


def _is_header(columns: Sequence[str]) -> bool:
    found = {_ROLE_OF.get(_plain(column)) for column in columns}
    return found.issuperset(REQUIRED)


def _is_used(column: str) -> bool:
    return _plain(column) in _ROLE_OF


def _is_video(column: str) -> bool:
    return _ROLE_OF.get(_plain(column)) == "video"


@lru_cache(maxsize=256)
def _plain(column: str) -> str:
    return strip_invisible(column).lower().replace(" ", "_")


def _find_columns(columns: Iterable[str], where: str, faults: CollectedErrors) -> dict[str, str]:
    """Finds the column of each role; records repeated, misspelt and missing columns at their first row."""
    found: dict[str, str] = {}
    others = []
    for column in columns:
        role = _ROLE_OF.get(_plain(column))
        if role is None:
            others.append(column)
        elif role in found:
            faults.add("two columns of one meaning", f"{found[role]!r} and {column!r} ({where})")
        else:
            found[role] = column
    empty = [name for role, names in ROLES.items() if role not in found for name in names]
    misspelt = set()
    for column in others:
        near = difflib.get_close_matches(_plain(column), empty, n=1, cutoff=0.8)
        if near:
            faults.add("unknown column", f"{column!r} (nearest: {near[0]!r}; {where})")
            misspelt.add(_ROLE_OF[near[0]])
    for role in REQUIRED:
        if role not in found and role not in misspelt:
            faults.add(
                f"no {role} column, one of {', '.join(ROLES[role])} (in CSV, the first line names them)",
                f"{where} has {', '.join(map(repr, columns)) or 'none'}",
            )
    return found


def _to_row(
    where: str, record: dict[str, Any], columns: dict[str, str], faults: CollectedErrors
) -> CaptionRow | None:
    if not all(role in columns for role in REQUIRED):
        return None
    video = _to_name(record[columns["video"]])
    if video is None:
        faults.add("no video named", where)
    captions = _to_captions(record[columns["caption"]], columns["caption"], where, faults)
    if captions is not None and not all(captions or [""]):
        faults.add("blank caption", where)
    split, is_bad_split = None, False
    if "split" in columns and not _is_blank(value := record[columns["split"]]):
        split = SPLIT_NAMES.get(strip_invisible(value).lower()) if isinstance(value, str) else None
        if is_bad_split := split is None:
            faults.add("split is not one of train, val, test", f"{value!r} ({where})")
    times = [_to_time(record, columns.get(role), where, faults) for role in ("start_s", "end_s")]
    start_s, end_s = times
    if end_s is not None and end_s <= (start_s or 0.0):
        faults.add("start is not before end", f"{start_s} to {end_s} ({where})")
    if video is None or not captions or is_bad_split:
        return None
    # A clip has one form only: a start of 0 is the start of the file.
    if end_s is None:
        start_s = start_s or None
    elif start_s is None:
        start_s = 0.0
    return CaptionRow(where, video, captions, split, start_s, end_s)


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not clean_caption(value))


def _to_name(value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # a file called 17 in JSON
    if not isinstance(value, str) or _is_blank(value):
        return None
    if value.isascii():
        return value
    # Blanks may belong to the name of a file, zero-width characters around it do not.
    visible = strip_invisible(value)
    return value if value.strip() == visible else visible


def _to_captions(value: Any, column: str, where: str, faults: CollectedErrors) -> tuple[str, ...] | None:
    """Returns the texts; records a value that is none, and returns None.

    A cell of a column ``captions`` may hold a list. In a column of single texts it is refused, since a text
    that looks like a list may be meant.
    """
    if isinstance(value, str):
        is_plural = _plain(column) == "captions"
        try:
            parsed = parse_text_list(value)
        except ValueError as error:
            if is_plural:
                faults.add("captions that are not a list of texts", f"{where}: {error}")
                return None
            parsed = ["'"] if {"'", '"'} & set(value) and value.rstrip().endswith("]") else None
        if parsed and not is_plural:
            faults.add(
                f"a list in the column {column!r} of single texts; the column of lists is 'captions'", where
            )
            return None
        value = parsed if parsed is not None and is_plural else value
    texts = value if isinstance(value, list) else ["" if value is None else value]
    if not all(isinstance(text, str) for text in texts):
        faults.add("caption is neither a text nor a list of texts", where)
        return None
    return tuple(map(clean_caption, texts))


def _to_time(record: dict[str, Any], column: str | None, where: str, faults: CollectedErrors) -> float | None:
    if column is None or _is_blank(value := record[column]):
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str) or "_" in str(value):
            raise ValueError
        seconds = float(value)
        if not math.isfinite(seconds) or seconds < 0:
            raise ValueError
    except (ValueError, OverflowError):
        faults.add("not a time in seconds, such as 12.5", f"{column} {value!r} ({where})")
        return None
    return seconds + 0.0  # -0.0 is 0.0
