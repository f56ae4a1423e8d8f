"""Reads captions files in CSV, JSON Lines and JSON, plain or gzip-ed, into plain records."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable
from typing import Any

from gare.data.collected_errors import CollectedErrors
from gare.errors import DataError, without_secrets

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


def read_records(
    name: str, data: bytes, faults: CollectedErrors, *, is_header: Callable[[list[str]], bool]
) -> list[Record]:
    """Parses a captions file.

    Args:
        name: its file name; the ending determines the format, ``.gz`` may follow.
        data: its content, as stored.
        faults: collects the faults of single records.
        is_header: returns True if a CSV header with these columns can be used; decides the delimiter.

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
        return _csv_records(name, text, faults, is_header)
    if kind == "json lines":
        return _json_lines_records(text, faults)
    return _json_records(name, text, faults)


def decode_text(name: str, data: bytes, *, may_be_utf16: bool = False) -> str:
    """Returns the text of a file, unpacked if it is gzip-ed, without a byte order mark.

    Args:
        name: its name, for messages.
        data: its content, as stored.
        may_be_utf16: also accept UTF-16 with a byte order mark, as spreadsheets save "Unicode text".

    Raises:
        DataError: for a damaged gzip file, and for content that is not UTF-8 text.
    """
    # By content, not by name: browsers and download tools unpack .gz files and keep the name.
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"is damaged: {error}", where=name, accepted="a whole gzip file") from error
    is_utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    if is_utf16 and not may_be_utf16:
        raise DataError("is UTF-16", where=name, accepted="the same text saved as UTF-8")
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"is not {'UTF-16' if is_utf16 else 'UTF-8'}: byte {data[error.start]:#04x} in line {line}",
            where=name,
            accepted="the same text saved as UTF-8",
        ) from error
    if "\0" in text:
        raise DataError("holds NUL characters", where=name, accepted="plain UTF-8 text")
    return text


def _csv_records(
    name: str, text: str, faults: CollectedErrors, is_header: Callable[[list[str]], bool]
) -> list[Record]:
    delimiter = _sniff(name, text, is_header)
    # newline="": line breaks inside quotes stay as they are.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    records = []
    line = 1
    try:
        for fields in reader:
            start, line = line, reader.line_num + 1
            if not any(field.strip() for field in fields):
                continue
            if header is None:
                header = [field.strip() for field in fields]
                continue
            extra = any(field.strip() for field in fields[len(header) :])
            if len(fields) < len(header) or extra:
                faults.add(
                    f"other than {len(header)} fields (a text that holds the delimiter has to be quoted)",
                    f"line {start} has {len(fields)}",
                )
                continue
            # Columns without a name, such as the index that pandas writes, are ignored.
            pairs = zip(header, fields, strict=False)
            records.append((f"line {start}", {key: value for key, value in pairs if key}))
    except csv.Error as error:
        raise DataError(
            f"is not CSV from line {line} on: {error}",
            where=name,
            accepted='texts with quotes in double quotes, quotes in them doubled: "a ""big"" dog"',
        ) from error
    return records


def _sniff(name: str, text: str, is_header: Callable[[list[str]], bool]) -> str:
    """Finds the one delimiter with which the first line is a usable header."""
    first = text.lstrip("\r\n\t ")
    headers = {}
    for delimiter in DELIMITERS:
        try:
            header = next(csv.reader(io.StringIO(first, newline=""), delimiter=delimiter))
        except csv.Error:
            continue
        headers[delimiter] = [field.strip() for field in header]
    fitting = [delimiter for delimiter, header in headers.items() if is_header(header)]
    if len(fitting) == 1:
        return fitting[0]
    # None fits: take the delimiter with most columns; what its header lacks is reported elsewhere.
    most = max(headers, key=lambda delimiter: len(headers[delimiter]), default=None)
    if fitting or most is None:
        raise DataError("its delimiter is unclear", where=name, accepted=", ".join(DELIMITERS.values()))
    return most


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


def _json_records(name: str, text: str, faults: CollectedErrors) -> list[Record]:
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
        elif {"video", "caption"} <= {key.lower() for key in tree}:
            tree = [tree]
        else:
            return [_record_of_pair(video, value) for video, value in tree.items()]
    if not isinstance(tree, list):
        raise DataError(
            f"holds a {type(tree).__name__}",
            where=name,
            accepted='a list of objects, {"videos": [objects]} or {video: caption or captions}',
        )
    records = []
    for number, entry in enumerate(tree, start=1):
        if isinstance(entry, dict):
            records.append((f"entry {number}", entry))
        else:
            faults.add("not a JSON object", f"entry {number}")
    return records


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
            keys = [key for key, _ in pairs]
            for key in entry:
                if keys.count(key) > 1:
                    faults.add("key used more than once in one object", f"{key!r} ({where})")
        return entry

    return json.loads(text, object_pairs_hook=unique)
