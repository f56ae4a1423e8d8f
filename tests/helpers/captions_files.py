"""Captions files in all forms with captions that are hard to read, and files that broke on their way."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

Captions = Mapping[str, Sequence[str]]
#: Name and content.
File = tuple[str, bytes]

_PLAIN = (
    "a dog",
    "runs",
    "the man's hat",
    "it's",
    "café",
    "Zürich",
    "“big”",
    "don’t",
    "– so",
    "日本語",
    "🎬",
)
_EUROPEAN = (
    "a dog",
    "runs",
    "café",
    "naïve",
    "Zürich",
    "schön",
    "très",
    "mañana",
    "château",
    "Éva",
    "ça",
    "à",
)
_NASTY = (
    *_PLAIN,
    *('says "hi"', '"quoted"', '""', '5"', "'single'", "'", '"'),
    *(",", ", and then,", ";", "\t", "|", "a\nb", "a\r\nb", "x\n\ny", "two  blanks", "\\", "\\n", '\\"', "/"),
    *("[music]", "[", "]", "{x}", "(he)", "#1", "=SUM(A1)", "-1", "null", "NaN", "100 %", "<b>", "&amp;"),
    *("très", "mañana", "мама", "עברית", "👩\u200d👩\u200d👧", "a\u00a0b", "a\u200bb", "می\u200cخواهم"),
    *("e\u0301", "a\u2028b", "a\x85b", "ﬁ", "\u202eabc\u202c"),
)
#: Encodings that a file of any captions may have.
_ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")
_HEADER = ("video", "caption", "split")


def draw_captions(
    rng: np.random.Generator, count: int, pieces: Sequence[str] = _NASTY
) -> dict[str, tuple[str, ...]]:
    """Draws the captions of ``count`` videos, one to three each, of one to six pieces."""
    return {
        f"clip {number}.mp4": tuple(_draw_caption(rng, pieces) for _ in range(int(rng.integers(1, 4))))
        for number in range(count)
    }


def _draw_caption(rng: np.random.Generator, pieces: Sequence[str]) -> str:
    while True:
        chosen = (pieces[int(index)] for index in rng.integers(len(pieces), size=int(rng.integers(1, 7))))
        text = "".join(piece + (" " if rng.random() < 0.7 else "") for piece in chosen).strip()
        # Texts that look like lists of texts have a test of their own.
        if re.search(r"\w", text) and not text.startswith(("[", "(", "{")):
            return text


def quoted_table(
    rows: Sequence[Sequence[str]], delimiter: str, quoting: int, header: Sequence[str], end: str = "\r\n"
) -> str:
    """Writes a table as the csv module does."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator=end)  # type: ignore[arg-type]
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()


def _pairs(captions: Captions) -> list[tuple[str, str]]:
    return [(video, text) for video, texts in captions.items() for text in texts]


def _table(delimiter: str, quoting: int) -> Callable[[Captions], str]:
    return lambda captions: quoted_table(_pairs(captions), delimiter, quoting, ("video", "caption"))


def _lists(write: Callable[[list[str]], str]) -> Callable[[Captions], str]:
    def form(captions: Captions) -> str:
        rows = [(write(list(texts)), video) for video, texts in captions.items()]
        return quoted_table(rows, ",", csv.QUOTE_MINIMAL, ("captions", "file"))

    return form


def _records(captions: Captions) -> list[dict[str, object]]:
    return [{"video": video, "captions": list(texts)} for video, texts in captions.items()]


def _columns(captions: Captions) -> dict[str, list[str]]:
    videos, texts = zip(*_pairs(captions), strict=True)
    return {"video": list(videos), "caption": list(texts)}


#: Ending and writer of each form.
FORMS: dict[str, tuple[str, Callable[[Captions], str]]] = {
    **{
        f"{what} {quotes}": (ending, _table(delimiter, quoting))
        for what, delimiter, ending in (
            ("comma", ",", ".csv"),
            ("semicolon", ";", ".csv"),
            ("tab", "\t", ".tsv"),
        )
        for quotes, quoting in (("where needed", csv.QUOTE_MINIMAL), ("always", csv.QUOTE_ALL))
    },
    "lists of JSON": (".csv", _lists(json.dumps)),
    "lists of pandas": (".csv", _lists(str)),
    "records": (".json", lambda captions: json.dumps(_records(captions), ensure_ascii=False)),
    "escaped": (".json", lambda captions: json.dumps({"videos": _records(captions)})),
    "mapping": (".json", lambda captions: json.dumps(dict(captions), ensure_ascii=False, indent=1)),
    "Hugging Face": (".json", lambda captions: json.dumps(_columns(captions), ensure_ascii=False)),
    "pandas by columns": (
        ".json",
        lambda captions: json.dumps(
            {
                name: {str(row): text for row, text in enumerate(column)}
                for name, column in _columns(captions).items()
            }
        ),
    ),
    "pandas split": (
        ".json",
        lambda captions: json.dumps({"columns": ["video", "caption"], "data": _pairs(captions)}),
    ),
    "lines": (
        ".jsonl",
        lambda captions: "\n".join(json.dumps(row, ensure_ascii=False) for row in _records(captions)),
    ),
}


def layouts(form: str, captions: Captions) -> Iterator[File]:
    """Writes captions in one form and all encodings, plain and gzip-ed."""
    ending, write = FORMS[form]
    text = write(captions)
    for encoding in _ENCODINGS:
        data = text.encode(encoding)
        yield f"captions{ending}", data
        yield f"captions{ending}.gz", gzip.compress(data)


def _draw_table(
    rng: np.random.Generator, captions: Captions, quoting: int | None = None
) -> tuple[str, str, list[tuple[str, ...]]]:
    """Draws a table whose last column is the split; returns its delimiter, text and rows."""
    rows = [(video, text, "train") for video, text in _pairs(captions)]
    delimiter = str(rng.choice([",", ";", "\t"]))
    if quoting is None:
        quoting = int(rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    return delimiter, quoted_table(rows, delimiter, quoting, _HEADER), list(rows)


def _draw_place(rng: np.random.Generator, text: str, pattern: str) -> int:
    return int(rng.choice([found.start() for found in re.finditer(pattern, text)] or [0]))


def _draw_json(rng: np.random.Generator) -> str:
    return str(rng.choice([form for form, (ending, _) in FORMS.items() if "json" in ending]))


def _drop_quote(rng: np.random.Generator) -> tuple[Captions, File]:
    captions = draw_captions(rng, 8)
    _, text, _ = _draw_table(rng, captions)
    at = _draw_place(rng, text, '"')
    return captions, ("c.csv", (text[:at] + text[at + 1 :]).encode())


def _double_quote(rng: np.random.Generator) -> tuple[Captions, File]:
    captions = draw_captions(rng, 8, _PLAIN)
    _, text, _ = _draw_table(rng, captions, csv.QUOTE_ALL)
    at = _draw_place(rng, text, '"')
    return captions, ("c.csv", (text[:at] + '"' + text[at:]).encode())


def _use_single_quotes(rng: np.random.Generator) -> tuple[Captions, File]:
    captions = draw_captions(rng, 8, ["a dog", "runs, fast", "in Zürich", "日本語", 'says "hi"', "it's"])
    _, text, _ = _draw_table(rng, captions)
    head, _, rows = text.partition("\r\n")
    return captions, ("c.csv", (head.replace('"', "") + "\r\n" + rows.replace('"', "'")).encode())


def _cut(rng: np.random.Generator) -> tuple[Captions, File]:
    captions = draw_captions(rng, 8)
    if rng.random() < 0.5:
        _, text, _ = _draw_table(rng, captions)
        name, data = "c.csv", text.encode(str(rng.choice(_ENCODINGS)))
    else:
        files = list(layouts(_draw_json(rng), captions))
        name, data = files[int(rng.integers(len(files)))]
    return captions, (name, data[: int(rng.integers(1, len(data)))])


def _drop_cells(rng: np.random.Generator) -> tuple[Captions, File]:
    """Drops the cells of a column, in the header too, in all rows or in one."""
    captions = draw_captions(rng, 8)
    delimiter, _, rows = _draw_table(rng, captions)
    column, kind = int(rng.integers(2)), int(rng.integers(3))
    lines = [_HEADER, *rows]
    chosen = [range(len(lines)), range(1, len(lines)), [int(rng.integers(len(lines)))]][kind]
    lines = [
        line[:column] + line[column + 1 :] if number in chosen else line for number, line in enumerate(lines)
    ]
    return captions, ("c.csv", quoted_table(lines[1:], delimiter, csv.QUOTE_MINIMAL, lines[0]).encode())


def _change_delimiter(rng: np.random.Generator) -> tuple[Captions, File]:
    """Changes the delimiter everywhere, in the header, from a row on, or everywhere but in a line sep=."""
    captions = draw_captions(rng, 8)
    delimiter, text, rows = _draw_table(rng, captions)
    other = str(rng.choice([mark for mark in ",;\t|:" if mark != delimiter]))
    first = int(rng.integers(1, len(rows)))
    head, tail = (
        quoted_table(some, mark, csv.QUOTE_MINIMAL, header)
        for some, mark, header in ((rows[:first], delimiter, _HEADER), (rows[first:], other, rows[first]))
    )
    again = quoted_table(rows, other, csv.QUOTE_MINIMAL, _HEADER)
    mutated = (
        again,
        other.join(_HEADER) + text[text.index("\r\n") :],
        head + tail,
        f"sep={other}\r\n{again}",
        f"sep={delimiter}\r\n{again}",
    )
    return captions, ("c.csv", mutated[int(rng.integers(len(mutated)))].encode())


def _change_encoding(rng: np.random.Generator) -> tuple[Captions, File]:
    encodings = (
        "cp1252",
        "latin-1",
        "cp1250",
        "iso8859-2",
        "mac-roman",
        "cp850",
        "cp1254",
        "utf-16",
    )
    encoding = encodings[int(rng.integers(len(encodings)))]
    own = {"cp1250": ("koń", "řeka", "tůň", "pięć"), "iso8859-2": ("łoś", "škoda"), "cp1254": ("ağaç", "kuş")}
    pieces = [piece for piece in _EUROPEAN if piece.encode(encoding, "ignore").decode(encoding) == piece]
    # Some files have few of the letters that tell their encoding.
    pieces = [*pieces[:2], *rng.choice([*pieces[2:], *own.get(encoding, ())], int(rng.integers(1, 5)))]
    captions = draw_captions(rng, 8, list(map(str, pieces)))
    _, text, _ = _draw_table(rng, captions)
    return captions, ("c.csv", text.encode(encoding))


def _add_blanks(rng: np.random.Generator) -> tuple[Captions, File]:
    captions = draw_captions(rng, 8)
    delimiter, _, rows = _draw_table(rng, captions)
    mark = delimiter + (" ", "  ", "\u00a0")[int(rng.integers(3))]
    lines = [mark.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in (_HEADER, *rows)]
    return captions, ("c.csv", "\n".join([*lines, ""]).encode())


def _damage_gzip(rng: np.random.Generator) -> tuple[Captions, File]:
    captions = draw_captions(rng, 8)
    name, data = list(layouts(list(FORMS)[int(rng.integers(len(FORMS)))], captions))[1]
    broken = bytearray(data)
    broken[int(rng.integers(10, len(data)))] ^= 1 << int(rng.integers(8))
    return captions, (name, bytes(broken))


def _drop_from_json(rng: np.random.Generator) -> tuple[Captions, File]:
    captions = draw_captions(rng, 8, _PLAIN)
    ending, write = FORMS[_draw_json(rng)]
    text = write(captions)
    at = _draw_place(rng, text, r'["\[\]{}:,](?=["\[\]{}:,])')
    return captions, (f"c{ending}", (text[:at] + text[at + 1 :]).encode())


def _join_files(rng: np.random.Generator) -> tuple[Captions, File]:
    """Joins two tables as `cat` does: the second header is a row, a mark of order is within the file."""
    captions = draw_captions(rng, 8)
    delimiter, _, rows = _draw_table(rng, captions)
    first = int(rng.integers(1, len(rows)))
    one, two = (
        quoted_table(some, delimiter, csv.QUOTE_MINIMAL, _HEADER) for some in (rows[:first], rows[first:])
    )
    return captions, ("c.csv", one.encode("utf-8-sig") + two.encode("utf-8-sig"))


#: Name of each mutation, and the function that draws captions and their broken file.
MUTATIONS: tuple[tuple[str, Callable[[np.random.Generator], tuple[Captions, File]]], ...] = (
    ("dropped quote", _drop_quote),
    ("doubled quote", _double_quote),
    ("single quotes", _use_single_quotes),
    ("cut", _cut),
    ("dropped cells", _drop_cells),
    ("other delimiter", _change_delimiter),
    ("other encoding", _change_encoding),
    ("blanks after delimiters", _add_blanks),
    ("damaged gzip", _damage_gzip),
    ("dropped sign of JSON", _drop_from_json),
    ("joined files", _join_files),
)
