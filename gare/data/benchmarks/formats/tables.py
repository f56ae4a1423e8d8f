"""Tables of text: rows and cells of CSV and its kin, quoted or not.

Programs write tables in two dialects that look alike: texts in double quotes where they need it, quotes in
them doubled; or never quoted, and then a quote is a part of its text. Read in the wrong dialect, a table
gives other texts or fewer rows. So a table with quotes is read as quoted, and looked through for signs that
it is not: then one with tabs is read as unquoted if all of it fits, and any other is refused with the line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gare.data.benchmarks.formats.texts import strip_invisible
from gare.data.benchmarks.video_folder import is_video
from gare.errors import DataError
from gare.storage.uris import is_uri

_LINE_END = re.compile(r"\r\n|\r|\n")
#: First line of a table that Excel is to open with a certain delimiter.
_SEP_LINE = re.compile(r'\s*"?sep=([^\w"\s]|\t)"?[ ]*(?=\r|\n|\Z)', re.IGNORECASE)
_ACCEPTED = 'texts with quotes in double quotes, quotes in them doubled: "a ""big"" dog"'


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a table.

    Attributes:
        line: number of its first line in the file, from 1.
        cells: with blanks around them, but without quotes that only mark a text.
        quoted: numbers of the cells that were in quotes.
    """

    line: int
    cells: list[str]
    quoted: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Table:
    """A header and its rows; blank rows are left out.

    Attributes:
        header: names of the columns, stripped.
        quoted: numbers of the columns whose names were in quotes.
        rows: in the order of the file, some perhaps with other than the header's number of cells.
    """

    header: list[str]
    quoted: frozenset[int]
    rows: list[TableRow]


class _MisreadError(Exception):
    """A sign that a table is not quoted as it was read."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(line, what)
        self.line, self.what = line, what


def named_delimiter(text: str) -> tuple[str | None, str]:
    """Returns the delimiter that a line ``sep=;`` at the top names, and the text with that line blank."""
    found = _SEP_LINE.match(text)
    if not found:
        return None, text
    # Blank lines keep the numbers of the others.
    return found[1], "".join(_LINE_END.findall(found[0])) + text[found.end() :]


def first_cells(text: str, delimiter: str) -> list[str]:
    """Returns the cells of the first row that is not blank, stripped; none if its quotes are not closed."""
    try:
        rows = _quoted_rows(text, delimiter)
        return [strip_invisible(cell) for cell in next(rows, TableRow(1, [])).cells]
    except _MisreadError:
        return []


def read_table(
    name: str,
    text: str,
    delimiter: str,
    *,
    is_used: Callable[[str], bool],
    is_video_column: Callable[[str], bool],
    names_video: Callable[[str], bool] | None = None,
    goes_on: bool = False,
) -> Table:
    """Reads a table with a header.

    Args:
        name: of the file, for messages.
        text: its content, with any line ends.
        delimiter: one character.
        is_used: returns True for the name of a column whose quotes matter.
        is_video_column: returns True for the name of the column that names videos.
        names_video: returns True for the name of a video that is there.
        goes_on: True if a text in the last column may hold the delimiter without being quoted.

    Raises:
        DataError: for quotes that leave open what the texts are, with the line.
    """
    if '"' in text:
        table = _read_quotes(name, text, delimiter, is_used, is_video_column, names_video, goes_on)
    else:
        table = _table(list(_plain_rows(text, delimiter)))
    if "'" in text:
        _refuse_single_quotes(name, table, is_used)
    return table


def _read_quotes(
    name: str,
    text: str,
    delimiter: str,
    is_used: Callable[[str], bool],
    is_video_column: Callable[[str], bool],
    names_video: Callable[[str], bool] | None,
    goes_on: bool,
) -> Table:
    misread: _MisreadError | None = None
    try:
        table = _table(list(_quoted_rows(text, delimiter)))
        fits = _Fit(table, goes_on)
        _look_for_swallowed_rows(text, delimiter, fits, is_video_column, names_video)
        _look_for_stray_quotes(table, is_used)
        if all(map(fits, table.rows)):
            return table
    except _MisreadError as error:
        misread = error
    # A quote that is open in the last line may be that of a file that was cut off.
    if delimiter == "\t" and (text.endswith(("\n", "\r")) or '"' not in _LINE_END.split(text)[-1]):
        plain = _table(list(_plain_rows(text, delimiter)))
        if all(map(_Fit(plain, goes_on), plain.rows)) and not any(map(_is_marked, _all_cells(plain))):
            return plain
    if misread:
        raise DataError(
            f"is not CSV from line {misread.line} on: {misread.what}", where=name, accepted=_ACCEPTED
        )
    return table  # the caller reports rows of other lengths


class _Fit:
    """Test of rows for the header's number of cells."""

    def __init__(self, table: Table, goes_on: bool) -> None:
        self.table, self.goes_on = table, goes_on

    def __call__(self, row: TableRow) -> bool:
        length = len(self.table.header)
        return len(row.cells) >= length and (self.goes_on or not any(map(str.strip, row.cells[length:])))


def _table(rows: list[TableRow]) -> Table:
    header, *rest = rows or [TableRow(1, [])]
    return Table([strip_invisible(cell) for cell in header.cells], header.quoted, rest)


def _all_cells(table: Table) -> Iterator[str]:
    yield from table.header
    for row in table.rows:
        yield from row.cells


def _is_marked(cell: str) -> bool:
    """Returns True for a cell that is quoted as a text is that needs it."""
    cell = strip_invisible(cell)
    return '""' in cell or (len(cell) > 1 and cell[0] == cell[-1] == '"')


def _plain_rows(text: str, delimiter: str) -> Iterator[TableRow]:
    """Splits an unquoted table: each line that is not blank is a row."""
    for number, line in enumerate(_LINE_END.split(text), start=1):
        cells = line.split(delimiter)
        if any(map(str.strip, cells)):
            yield TableRow(number, cells)


def _quoted_rows(text: str, delimiter: str) -> Iterator[TableRow]:
    """Splits a quoted table; line ends in quotes stay as they are, and blanks around quotes do not matter.

    Raises:
        _MisreadError: for quotes that are not closed before the end of their cell.
    """
    mark = re.escape(delimiter)
    quoted = re.compile(rf'[ ]*"([^"]*+(?:""[^"]*+)*+)"[ ]*(?={mark}|\r|\n|\Z)')
    plain = re.compile(rf"[^{mark}\r\n]*")
    line = start = 1
    position, cells, marked = 0, list[str](), list[int]()
    while position <= len(text):
        if found := quoted.match(text, position):
            marked.append(len(cells))
            cells.append(found[1].replace('""', '"'))
            line += len(_LINE_END.findall(found[0]))
        else:
            found = plain.match(text, position)
            assert found is not None  # it matches an empty cell
            if found[0].lstrip(" ").startswith('"'):
                raise _MisreadError(line, f"quotes that do not end with their cell: {found[0].strip()[:60]}")
            cells.append(found[0])
        position = found.end()
        if text.startswith(delimiter, position):
            position += 1
            continue
        if any(map(str.strip, cells)):
            yield TableRow(start, cells, frozenset(marked))
        end = _LINE_END.match(text, position)
        if end is None:
            return
        position = end.end()
        line += 1
        start, cells, marked = line, [], []


def _look_for_swallowed_rows(
    text: str,
    delimiter: str,
    fits: _Fit,
    is_video_column: Callable[[str], bool],
    names_video: Callable[[str], bool] | None,
) -> None:
    """Raises _MisreadError for a text of several lines that are rows themselves.

    A quote at the begin of an unquoted text opens a text that ends where another one happens to end with a
    quote. If a column is quoted throughout, with its name, none can open by chance.
    """
    rows, header = fits.table.rows, fits.table.header
    video = next((index for index, name in enumerate(header) if is_video_column(name)), None)
    always = fits.table.quoted.intersection(*(row.quoted for row in rows))
    doubtful = [
        row
        for row in rows
        if any(_LINE_END.search(row.cells[index]) for index in row.quoted if index not in always)
    ]
    if video is None or not doubtful:
        return
    plain = {row.line: row for row in _plain_rows(text, delimiter)}
    others = {strip_invisible(row.cells[video]) for row in rows if len(row.cells) > video}
    for row in doubtful:
        if row.line not in plain or not fits(plain[row.line]):
            continue
        num_lines = sum(len(_LINE_END.findall(row.cells[index])) for index in row.quoted)
        for line in range(row.line + 1, row.line + num_lines + 1):
            if line not in plain or not fits(plain[line]):
                continue
            cell = strip_invisible(plain[line].cells[video])
            if cell in others or is_uri(cell) or is_video(cell) or (names_video and names_video(cell)):
                raise _MisreadError(row.line, f"its text in quotes holds line {line}, which is a row itself")


def _look_for_stray_quotes(table: Table, is_used: Callable[[str], bool]) -> None:
    """Raises _MisreadError for a quote that is not one of its text, as far as can be known."""
    is_quoted = any(row.quoted for row in table.rows)
    for index, name in enumerate(table.header):
        if not is_used(name):
            continue
        bare = [row for row in table.rows if len(row.cells) > index and index not in row.quoted]
        for row in bare:
            cell = row.cells[index]
            if '"' not in cell:
                continue
            if '""' in cell or strip_invisible(cell).startswith('"') or (is_quoted and cell.count('"') % 2):
                raise _MisreadError(row.line, f"a stray quote: {cell.strip()[:60]}")


def _refuse_single_quotes(name: str, table: Table, is_used: Callable[[str], bool]) -> None:
    """Raises an error if single quotes mark the texts of a column, and are no part of them.

    Raises:
        DataError: with the line of the first of them.
    """
    is_quoted = any(row.quoted for row in table.rows)
    for index, column in enumerate(table.header):
        if not is_used(column):
            continue
        bare = [
            (row.line, row.cells[index].strip())
            for row in table.rows
            if len(row.cells) > index and index not in row.quoted
        ]
        marked = [(line, cell) for line, cell in bare if len(cell) > 1 and cell[0] == cell[-1] == "'"]
        if not marked:
            continue
        is_doubled = not is_quoted and any("''" in cell for _, cell in marked)
        if is_doubled or len(marked) == sum(bool(cell) for _, cell in bare):
            raise DataError(
                f"has texts in single quotes, the first in line {marked[0][0]}",
                where=name,
                accepted=_ACCEPTED,
            )
