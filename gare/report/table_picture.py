"""The table of scores as a picture."""

from __future__ import annotations

import textwrap

from matplotlib.figure import Figure

from gare.report.pictures import FAINT, INK, LINES, RIGHT, WRONG, as_png, drawable, ellipsis
from gare.retrieval.results.table import COLUMNS, ScoreTable

_LINE, _WIDTH = 0.3, 14.0  # inches
_FIRST = 0.25  # share of the width that the names take
_LOOK = {
    "run": (INK, "normal"),
    "mean": (INK, "bold"),
    "difference": (LINES[0], "bold"),
    "paper": (FAINT, "normal"),
}


def table_picture(table: ScoreTable) -> bytes:
    """Draws the table: one block for each kind of data that runs were measured on, notes below.

    Returns:
        A PNG.
    """
    notes = [
        [(line, *_look_of(note)) for note in section.notes for line in textwrap.wrap(note, 170)]
        for section in table.sections
    ]
    headings = [textwrap.wrap(section.heading, 135) for section in table.sections]
    count = 2 + sum(
        len(section.rows) + len(heading) + 1.8 + len(lines)
        for section, heading, lines in zip(table.sections, headings, notes, strict=True)
    )
    figure = Figure(figsize=(_WIDTH, count * _LINE), dpi=100, facecolor="white")

    def write(at: float, column: int, text: str, colour: str, weight: str, size: float = 9.5) -> None:
        step = (0.985 - _FIRST) / (len(COLUMNS) - 1)
        x = 0.012 if column == 0 else _FIRST + column * step
        figure.text(
            x, 1 - (at + 0.5) / count, drawable(text), color=colour, weight=weight, size=size, va="center",
            ha="left" if column == 0 else "right",
        )  # fmt: skip

    write(0.3, 0, table.title, INK, "bold", 14)
    at = 1.8
    for section, heading, lines in zip(table.sections, headings, notes, strict=True):
        for line in heading:
            write(at, 0, line, INK, "bold", 10.5)
            at += 1
        for column, name in enumerate(COLUMNS):
            write(at, column, name, FAINT, "normal")
        at += 1
        for row in section.rows:
            colour, weight = _LOOK[row.kind]
            for column, cell in enumerate(row.cells):
                wide = column > 0 and row.kind == "difference"
                marked = RIGHT if column in row.better else WRONG if column in row.worse else ""
                # Bold if marked; numbers with intervals leave no room for a whole bold row.
                thick = weight if not wide else "bold" if marked else "normal"
                text = cell if column else ellipsis(cell, 44)
                write(at, column, text, marked or colour, thick, 7.5 if wide else 9.5)
            at += 1
        for line, colour, weight in lines:
            write(at, 0, line, colour, weight, 9)
            at += 1
        at += 0.8
    return as_png(figure)


def _look_of(note: str) -> tuple[str, str]:
    """Returns colour and weight of a note: a warning, the verdict, or any other."""
    if "not comparable" in note.lower():
        return WRONG, "normal"
    return (INK, "bold") if " is better in " in note else (FAINT, "normal")
