"""Reads annotation files made of text rows: tables with or without a header, and plain lists of ids."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass

from gare.data.benchmarks.formats.tables import first_cells, named_delimiter, read_table
from gare.data.benchmarks.formats.texts import strip_invisible
from gare.data.benchmarks.formats.words import TEXTS, VIDEOS, find_key, normalise_key
from gare.data.collected_errors import CollectedErrors

_DELIMITERS = ("\t", ",", ";", "|")
_CLOCK = re.compile(r"\d{1,2}[.:]\d\d[.:]\d\d([.,:]\d+)?|\d+(\.\d+)?")


@dataclass(frozen=True, slots=True)
class RowRecord:
    """One row.

    Attributes:
        where: such as ``line 12``.
        video: the video as the file names it.
        fields: its columns by name; ``caption`` is the text of a table without header.
    """

    where: str
    video: str
    fields: Mapping[str, str]


def read_rows(name: str, text: str, faults: CollectedErrors) -> list[RowRecord]:
    """Parses rows of text; line ends have to be single line feeds.

    A table has a header that names the video column, or no header. Without one, the first column is the video
    and the last the text, separated by tabs, commas, semicolons or, before the text, a blank. If the columns
    between are times, commas in the text are kept. ``#`` starts a comment line.

    Args:
        name: of the file, for messages.
        text: its content.
        faults: collects rows that do not fit.

    Raises:
        DataError: for a table with quotes that cannot be parsed.
    """
    named, text = named_delimiter(text)
    first = next((line for line in text.split("\n") if line.strip()), "")
    for delimiter in [named] if named else _DELIMITERS:
        header = first_cells(first, delimiter)
        if find_key(header, VIDEOS) and (len(header) == 1 or find_key(header, TEXTS) or _is_list(header)):
            if len(header) == 1 and any(other in first for other in _DELIMITERS):
                continue
            return _with_header(name, text, delimiter, faults)
    lines = [
        (number, line.rstrip("\n"))
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    return _without_header(lines, faults)


def _is_list(header: list[str]) -> bool:
    # A list of videos with further columns.
    return len(header) > 1 and all(re.fullmatch(r"[\w :.]*", column) for column in header)


def _with_header(name: str, text: str, delimiter: str, faults: CollectedErrors) -> list[RowRecord]:
    last = first_cells(text, delimiter)[-1]
    table = read_table(
        name,
        text,
        delimiter,
        is_used=lambda column: normalise_key(column) in (*VIDEOS, *TEXTS),
        is_video_column=lambda column: normalise_key(column) in VIDEOS,
        # A text that was not quoted goes on to the end of its line.
        goes_on=(goes_on := normalise_key(last) in TEXTS),
    )
    header = table.header
    video, corpus = str(find_key(header, VIDEOS)), _corpus_keys(header)
    records = []
    for table_row in table.rows:
        fields, where = table_row.cells, f"line {table_row.line}"
        if len(fields) > len(header) and goes_on:
            fields[len(header) - 1 :] = [delimiter.join(fields[len(header) - 1 :])]
        if len(fields) < len(header) or any(field.strip() for field in fields[len(header) :]):
            faults.add(f"other than {len(header)} fields", f"{where} has {len(fields)}")
            continue
        row = dict(zip(header, fields, strict=False))
        if not strip_invisible(row[video]):
            faults.add("no video named", where)
            continue
        if corpus:
            clip, caption = _of_corpus(row, corpus)
            records += [RowRecord(where, clip, caption)] if clip else []
        else:
            records.append(RowRecord(where, strip_invisible(row[video]), row))
    return records


def _corpus_keys(header: list[str]) -> list[str]:
    """Returns the columns of MSVD's own table, which names clips by video, start and end; else empty."""
    keys = [find_key(header, (name,)) for name in ("videoid", "start", "end", "language", "description")]
    return [key for key in keys if key is not None] if None not in keys else []


def _of_corpus(row: dict[str, str], keys: list[str]) -> tuple[str, dict[str, str]]:
    """Returns clip name and text of a row of MSVD's own table; empty if the row is not English."""
    video, start, end, language, description = (row[key].strip() for key in keys)
    if language.lower() != "english" or not description:
        return "", {}
    return f"{video}_{start}_{end}", {"caption": description}


def _without_header(lines: list[tuple[int, str]], faults: CollectedErrors) -> list[RowRecord]:
    # An id has no blanks, so text before a comma is not taken for an id.
    delimiter = next(
        (
            mark
            for mark in "\t|;,"
            if all(mark in line and " " not in line.partition(mark)[0].strip() for _, line in lines)
        ),
        None,
    )
    if delimiter is None:
        # A line with a blank is an id and a text, as in MSVD's AvailableCorpus.txt.
        pairs = [(number, *line.strip().partition(" ")) for number, line in lines]
        if sum(bool(rest) for *_, rest in pairs) * 2 <= len(pairs):
            return [
                RowRecord(f"line {number}", line.strip().strip('"').strip(), {}) for number, line in lines
            ]
        return [RowRecord(f"line {number}", video, {"caption": rest}) for number, video, _, rest in pairs]
    records = []
    for number, line in lines:
        video, text = _cells(line, delimiter)
        if video:
            records.append(RowRecord(f"line {number}", video, {"caption": text} if text else {}))
        else:
            faults.add("no video named", f"line {number}")
    return records


def _cells(line: str, delimiter: str) -> tuple[str, str]:
    """Returns first cell and text of a line; the cells between are times."""
    cells = line.split(delimiter)
    if line.count('"') >= 2:
        try:
            quoted = next(csv.reader([line], delimiter=delimiter, strict=True))
        except csv.Error:
            quoted = cells  # quotes that belong to a text
        # A quoted text may hold the delimiter; a text with quotes inside keeps them.
        cells = quoted if any(cell.strip().startswith('"') for cell in cells) else cells
    first = 1
    while first < len(cells) - 1 and _CLOCK.fullmatch(cells[first].strip()):
        first += 1
    return cells[0].strip(), delimiter.join(cells[first:])
