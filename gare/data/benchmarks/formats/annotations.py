"""Reads annotation files of published benchmarks, in any layout that is in circulation, into plain records.

A file may be JSON, JSON Lines or rows of text (``rows``), gzip-ed or not, with any line end. JSON may be

    [id, …]                                                        a list of videos
    [{"video": id, "caption": text or texts}, …]                   also description, desc, sentence, …
    {id: text or texts or {"sentences": […], "timestamps": […]}}   ActivityNet Captions and its kin
    {"videos": […], "sentences": [{"video_id", "caption"}, …]}     MSR-VTT
    {"database": {id: {"subset", "annotations": [{"segment", "sentence"}, …]}}}    YouCook2
    {"train": any of these, "val": …, "test": …}

This module knows no benchmark: each benchmark's reader checks the ids and their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gare.data.benchmarks.formats.records import parse_json
from gare.data.benchmarks.formats.rows import RowRecord, read_rows
from gare.data.benchmarks.formats.texts import decode_text
from gare.data.benchmarks.formats.words import (
    SPLIT_NAMES,
    Roles,
    normalise_key,
    normalise_spaces,
    roles_of,
    texts_of_cell,
)
from gare.data.collected_errors import CollectedErrors
from gare.errors import DataError

_BODIES = ("database", "annotations", "data", "videos", "metadata", "captions", "items")


@dataclass(frozen=True, slots=True)
class Annotation:
    """The captions of a video in one place of a file.

    Attributes:
        where: the place, such as ``line 12``.
        video: the video as the file names it.
        texts: texts with normalised whitespace, perhaps blank; empty in a list of videos.
        times: start and end in seconds of each text, if the file has them.
        duration_s: of the whole video, if the file has it.
        split: train, val, test or None.
    """

    where: str
    video: str
    texts: tuple[str, ...] = ()
    times: tuple[tuple[float, float], ...] = ()
    duration_s: float | None = None
    split: str | None = None


def read_annotations(name: str, data: bytes) -> list[Annotation]:
    """Parses an annotation file.

    Args:
        name: its name, for messages; the layout is recognised by the content.
        data: its content, as stored.

    Raises:
        DataError: for a file that cannot be parsed, with all faults in it.
    """
    text = decode_text(name, data).replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise DataError("is empty", where=name, accepted="an annotation file")
    faults = CollectedErrors()
    if text.lstrip()[0] in "[{":
        found = list(_Tree(faults).walk(_parse(name, text, faults)))
    else:
        found = [_of_row(row, faults) for row in read_rows(name, text, faults)]
    faults.raise_if_any(name)
    if not found:
        raise DataError("names no video", where=name, accepted="an annotation file")
    return found


def _parse(name: str, text: str, faults: CollectedErrors) -> Any:
    own = CollectedErrors()
    try:
        tree = parse_json(text, "file", own)
    except (ValueError, RecursionError) as error:
        if "Extra data" not in str(error):
            raise DataError(f"is not JSON: {error}", where=name, accepted="a whole JSON file") from error
    else:
        faults.update(own)
        return tree
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                lines.append(parse_json(line, f"line {number}", faults))
            except (ValueError, RecursionError) as error:
                faults.add("not JSON", f"line {number}: {error}")
    # A line may hold one record or, as in {id: …}, several.
    return [part for line in lines for part in (line if isinstance(line, list) else [line])]


def _of_row(row: RowRecord, faults: CollectedErrors) -> Annotation:
    fields = row.fields
    roles = roles_of(fields)
    texts = _texts_of_cell(fields[roles.text], row.where, faults) if roles.text else ()
    times: tuple[tuple[float, float], ...] = ()
    if roles.start and roles.end and len(texts) == 1:
        pair = _pair([fields[roles.start], fields[roles.end]])
        times = (pair,) if pair else ()  # values such as 00.23.23.000 are not seconds, and ignored
    return Annotation(row.where, row.video, texts, times, None, _split(fields, roles))


def _texts_of_cell(cell: str, where: str, faults: CollectedErrors) -> tuple[str, ...]:
    try:
        return texts_of_cell(cell)
    except ValueError as error:
        faults.add("neither a text nor a list of texts", f"{where}: {error}")
        return ()


class _Tree:
    """Walks through parsed JSON."""

    def __init__(self, faults: CollectedErrors) -> None:
        self.faults = faults

    def walk(self, tree: Any, split: str | None = None) -> Iterator[Annotation]:
        if isinstance(tree, Mapping):
            yield from self._mapping(tree, split)
        elif isinstance(tree, list):
            for number, entry in enumerate(tree, start=1):
                yield from self._entry(entry, f"entry {number}", split)
        else:
            self.faults.add("neither a list nor an object", f"a {type(tree).__name__}")

    def _mapping(self, tree: Mapping[str, Any], split: str | None) -> Iterator[Annotation]:
        if self._is_record(tree):
            yield from self._record(tree, "file", split, None)
            return
        sentences = tree.get("sentences")
        if isinstance(sentences, (list, Mapping)) and isinstance(tree.get("videos"), list):
            found = list(self.walk(sentences, split))
            yield from found
            known = {annotation.video for annotation in found}
            for annotation in self.walk(tree["videos"], split):
                if annotation.video not in known:
                    yield annotation
            return
        if tree and all(normalise_key(key) in SPLIT_NAMES for key in tree):
            for key, part in tree.items():
                yield from self.walk(part, SPLIT_NAMES[normalise_key(key)])
            return
        for body in _BODIES:
            if isinstance(tree.get(body), (list, Mapping)):
                yield from self.walk(tree[body], split)
                return
        if (rows := _rows_of_columns(tree)) is not None:
            yield from self.walk(rows, split)
            return
        for key, value in tree.items():
            if isinstance(value, Mapping) and value and all(number.isdigit() for number in value):
                value = list(value.values())  # numbered texts
            if isinstance(value, Mapping):
                yield from self._record(value, f"entry {key!r}", split, key)
            else:
                texts, _ = self._texts(value, f"entry {key!r}")
                yield Annotation(f"entry {key!r}", key, texts, split=split)

    def _entry(self, entry: Any, where: str, split: str | None) -> Iterator[Annotation]:
        if isinstance(entry, str) and entry.strip():
            yield Annotation(where, entry.strip(), split=split)
        elif isinstance(entry, Mapping):
            is_pair = len(entry) == 1 or all(isinstance(value, Mapping) for value in entry.values())
            if is_pair and roles_of(entry).video is None and roles_of(entry).text is None:
                yield from self._mapping(entry, split)  # a line {id: …}
            else:
                yield from self._record(entry, where, split, None)
        elif isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
            texts = _texts_of_cell(entry[1], where, self.faults)
            yield Annotation(where, entry[0].strip(), texts, split=split)
        else:
            self.faults.add("neither an id nor an object", f"{where}: {str(entry)[:60]!r}")

    @staticmethod
    def _is_record(entry: Mapping[str, Any]) -> bool:
        roles = roles_of(entry)
        return (
            roles.sure_video is not None
            and roles.text is not None
            and isinstance(entry[roles.sure_video], str)
        )

    def _record(
        self, entry: Mapping[str, Any], where: str, split: str | None, name: str | None
    ) -> Iterator[Annotation]:
        roles = roles_of(entry)
        key = roles.sure_video if name is not None else roles.video
        video = entry[key] if key is not None else name
        if isinstance(video, int) and not isinstance(video, bool):
            video = str(video)
        if not isinstance(video, str) or not video.strip():
            self.faults.add("no video named", where)
            return
        texts, times = self._texts(entry[roles.text], where) if roles.text is not None else ((), ())
        times = times or self._times(entry, roles, where, len(texts))
        duration = entry.get("duration")
        duration_s = float(duration) if isinstance(duration, (int, float)) else None
        yield Annotation(where, video.strip(), texts, times, duration_s, _split(entry, roles) or split)

    def _texts(self, value: Any, where: str) -> tuple[tuple[str, ...], tuple[tuple[float, float], ...]]:
        """Returns texts and, if each has its own segment, their times."""
        texts: list[str] = []
        times = []
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                roles = roles_of(item)
                times += [pair] if roles.times and (pair := _pair(item[roles.times])) else []
                item = item[roles.text] if roles.text is not None else None
            if isinstance(item, list) and item and all(isinstance(token, str) for token in item):
                item = " ".join(item)  # split into words
            if item is None:
                continue
            if not isinstance(item, str):
                self.faults.add("neither a text nor a list of texts", f"{where}: {str(item)[:60]!r}")
                return (), ()
            texts.append(normalise_spaces(item))
        return tuple(texts), tuple(times) if len(times) == len(texts) else ()

    @staticmethod
    def _bounds(entry: Mapping[str, Any], roles: Roles) -> Any:
        """Returns start and end, of one text or of each, if they have their own keys."""
        if roles.start is None or roles.end is None:
            return None
        starts, ends = entry[roles.start], entry[roles.end]
        if isinstance(starts, list) and isinstance(ends, list) and len(starts) == len(ends):
            return [list(pair) for pair in zip(starts, ends, strict=True)]
        return [starts, ends]

    def _times(
        self, entry: Mapping[str, Any], roles: Roles, where: str, count: int
    ) -> tuple[tuple[float, float], ...]:
        raw = entry[roles.times] if roles.times is not None else self._bounds(entry, roles)
        if not isinstance(raw, list):
            return ()
        pairs = [_pair(raw)] if _pair(raw) else [_pair(item) for item in raw]
        if roles.times is None and (None in pairs or len(pairs) != count):
            return ()  # another meaning of these keys
        if None in pairs:
            self.faults.add("not a start and an end in seconds", f"{where}: {str(raw)[:60]}")
        elif len(pairs) != count:
            self.faults.add("not one time for each text", f"{where}: {count} texts, {len(pairs)} times")
        else:
            return tuple(pair for pair in pairs if pair is not None)
        return ()


def _rows_of_columns(tree: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Returns the rows of a table written by columns, as pandas writes it; None for any other tree."""
    roles = roles_of(tree)
    if roles.video is None or roles.text is None:
        return None
    columns = {
        key: list(column.values()) if isinstance(column, Mapping) else column
        for key, column in ((key, tree[key]) for key in (roles.video, roles.text))
        if isinstance(column, (list, Mapping))
    }
    if len(columns) < 2 or len({len(column) for column in columns.values()}) > 1:
        return None
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _split(entry: Mapping[str, Any], roles: Roles) -> str | None:
    # A split of another name is ignored: the counts then show that its videos are missing.
    return SPLIT_NAMES.get(normalise_key(str(entry[roles.split]))) if roles.split is not None else None


def _pair(value: Any) -> tuple[float, float] | None:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or any(isinstance(part, (list, bool)) for part in value)
    ):
        return None
    try:
        start_s, end_s = (float(part) for part in value)
    except (TypeError, ValueError):
        return None
    return (start_s, end_s) if math.isfinite(start_s) and math.isfinite(end_s) else None
