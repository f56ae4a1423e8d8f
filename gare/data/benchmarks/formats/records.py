"""Reads captions files in CSV, JSON Lines and JSON, plain or gzip-ed, into plain records.

JSON may be a list of records, ``{"videos": [records]}``, ``{video: caption or captions or record}``, or a
table by columns: ``{column: [values]}``, as Hugging Face writes it, ``{column: {row: value}}`` or
``{"columns": [...], "data": [rows]}``, as pandas does.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gare.data.benchmarks.formats.tables import first_cells, named_delimiter, read_table
from gare.data.benchmarks.formats.texts import decode_text
from gare.data.collected_errors import CollectedErrors
from gare.errors import DataError, without_secrets

logger = logging.getLogger(__name__)

#: Place of a record in its file, as a person looks it up, and its keys and values.
Record = tuple[str, dict[str, Any]]

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".json": "json",
}


@dataclass(frozen=True)
class Columns:
    """Tests of the columns of a captions file.

    Attributes:
        is_header: returns True if a header with these columns can be used; decides the delimiter.
        is_used: returns True for a column whose values are used.
        is_video: returns True for a column that names videos.
        names_video: returns True for the name of a video that is there.
    """

    is_header: Callable[[Sequence[str]], bool]
    is_used: Callable[[str], bool]
    is_video: Callable[[str], bool]
    names_video: Callable[[str], bool] | None = None


def read_records(name: str, data: bytes, faults: CollectedErrors, columns: Columns) -> list[Record]:
    """Parses a captions file.

    Args:
        name: its file name; the ending determines the format, ``.gz`` may follow.
        data: its content, as stored.
        faults: collects the faults of single records.
        columns: which columns are used, and for what.

    Raises:
        DataError: for a file that cannot be parsed at all.
    """
    base = name.lower().removesuffix(".gz")
    kind = next((kind for ending, kind in FORMATS.items() if base.endswith(ending)), None)
    if kind is None:
        raise DataError("is of no known format", where=name, accepted=f"{', '.join(FORMATS)}, also with .gz")
    text = decode_text(name, data)
    if not text.strip():
        raise DataError("is empty", where=name, accepted="at least one video with a caption")
    if kind == "csv":
        return _csv_records(name, text, faults, columns)
    if kind == "json lines":
        return _json_lines_records(text, faults)
    return _json_records(name, text, faults, columns)


def _csv_records(name: str, text: str, faults: CollectedErrors, columns: Columns) -> list[Record]:
    delimiter, text = named_delimiter(text)
    delimiter = delimiter or _sniff(name, text, columns)
    table = read_table(
        name,
        text,
        delimiter,
        is_used=columns.is_used,
        is_video_column=columns.is_video,
        names_video=columns.names_video,
    )
    header = table.header
    # Columns without a name, such as the index that pandas writes, are ignored.
    named = [(index, key) for index, key in enumerate(header) if key]
    _refuse_doubled(name, header, columns)
    records = []
    for row in table.rows:
        if len(row.cells) != len(header) and (
            len(row.cells) < len(header) or any(cell.strip() for cell in row.cells[len(header) :])
        ):
            faults.add(
                f"other than {len(header)} fields (a text that holds the delimiter has to be quoted)",
                f"line {row.line} has {len(row.cells)}",
            )
            continue
        records.append((f"line {row.line}", {key: row.cells[index] for index, key in named}))
    if records and not text.endswith(("\n", "\r", '"')):
        logger.warning(
            "%s does not end with a line end; if it was cut off, its last row is not whole (%s)",
            without_secrets(name),
            records[-1][0],
        )
    return records


def _refuse_doubled(name: str, header: Sequence[str], columns: Columns) -> None:
    doubled = [key for key in dict.fromkeys(header) if header.count(key) > 1 and columns.is_used(key)]
    if doubled:
        raise DataError(f"has two columns {doubled[0]!r}", where=name, accepted="one column of each name")


def _sniff(name: str, text: str, columns: Columns) -> str:
    """Finds the one delimiter with which the first line is a usable header."""
    headers = {delimiter: first_cells(text, delimiter) for delimiter in DELIMITERS}
    fitting = [delimiter for delimiter, header in headers.items() if columns.is_header(header)]
    if len(fitting) == 1:
        return fitting[0]
    # None fits: take the delimiter with most columns; what its header lacks is reported elsewhere.
    if fitting:
        raise DataError("its delimiter is unclear", where=name, accepted=", ".join(DELIMITERS.values()))
    return max(headers, key=lambda delimiter: len(headers[delimiter]))


def _json_lines_records(text: str, faults: CollectedErrors) -> list[Record]:
    records = []
    # Not splitlines(): JSON texts may hold other characters that it takes for line breaks.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            entry = parse_json(line, where, faults)
        except (ValueError, RecursionError) as error:
            faults.add("not JSON", f"{where}: {error}")
            continue
        if isinstance(entry, dict):
            records.append((where, entry))
        else:
            faults.add("not a JSON object", where)
    return records


def _json_records(name: str, text: str, faults: CollectedErrors, columns: Columns) -> list[Record]:
    own = CollectedErrors()
    try:
        tree = parse_json(text, "file", own)
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):  # JSON Lines under the name .json
            return _json_lines_records(text, faults)
        raise DataError(f"is not JSON: {error}", where=name, accepted="a JSON file in UTF-8") from error
    faults.update(own)
    if isinstance(tree, dict):
        if isinstance(tree.get("videos"), list):
            tree = tree["videos"]
        elif (table := _rows_of_columns(tree, columns, name)) is not None:
            return [(f"row {number}", row) for number, row in enumerate(table, start=1)]
        elif columns.is_header(list(tree)):
            tree = [tree]
        elif isinstance(tree.get("schema"), dict) and isinstance(tree.get("data"), list):
            tree = tree["data"]  # pandas' form "table"
        else:
            return [_record_of_pair(video, value) for video, value in tree.items()]
    if not isinstance(tree, list):
        raise DataError(
            f"holds a {type(tree).__name__}",
            where=name,
            accepted='a list of objects, {"videos": [objects]}, {video: caption or captions} or '
            '{"video": [videos], "caption": [captions]}',
        )
    records = []
    for number, entry in enumerate(tree, start=1):
        if isinstance(entry, dict):
            records.append((f"entry {number}", entry))
        else:
            faults.add("not a JSON object", f"entry {number}")
    return records


def _rows_of_columns(tree: dict[str, Any], columns: Columns, name: str) -> list[dict[str, Any]] | None:
    """Returns the rows of a table that is written by columns; None for any other tree.

    Raises:
        DataError: for columns that do not have a value for each row.
    """
    accepted = "columns with a value for each row"
    header, data = tree.get("columns"), tree.get("data")
    if isinstance(header, list) and isinstance(data, list) and columns.is_header(list(map(str, header))):
        names = list(map(str, header))
        _refuse_doubled(name, names, columns)
        for number, row in enumerate(data, start=1):
            if not isinstance(row, list) or len(row) != len(names):
                raise DataError(
                    f"has other than {len(names)} values in row {number}", where=name, accepted=accepted
                )
        return [dict(zip(names, row, strict=True)) for row in data]
    by_row = {
        key: column if isinstance(column, dict) else {str(row): value for row, value in enumerate(column)}
        for key, column in tree.items()
        if isinstance(column, (list, dict))
    }
    if not columns.is_header(list(by_row)):
        return None
    used = [key for key in by_row if columns.is_used(key)]
    for key in used[1:]:
        if by_row[key].keys() != by_row[used[0]].keys():
            sizes = f"{len(by_row[used[0]])} and {len(by_row[key])}"
            raise DataError(
                f"has columns {used[0]!r} and {key!r} with other rows ({sizes})",
                where=name,
                accepted=accepted,
            )
    rows = by_row[used[0]].keys()
    fitting = {key: column for key, column in by_row.items() if column.keys() == rows}
    return [{key: column[row] for key, column in fitting.items()} for row in rows]


def _record_of_pair(video: str, value: Any) -> Record:
    fields = value if isinstance(value, dict) else {"captions": value}
    return f"entry {without_secrets(video)!r}", {"video": video, **fields}


def parse_json(text: str, where: str, faults: CollectedErrors) -> Any:
    """Parses a JSON text; records a key that is used twice in one object as a fault.

    Raises:
        ValueError: for text that is not JSON.
        RecursionError: for JSON that is nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entry = dict(pairs)
        if len(entry) < len(pairs):  # json would silently keep the last one
            for key, times in Counter(key for key, _ in pairs).items():
                if times > 1:
                    faults.add("key used more than once in one object", f"{key!r} ({where})")
        return entry

    return json.loads(text, object_pairs_hook=unique)
