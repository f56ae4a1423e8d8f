"""gare/data/benchmarks/formats: captions files are read as they were meant, or refused with the line."""

from __future__ import annotations

import csv
import gzip
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from gare.data.benchmarks.formats import texts
from gare.data.benchmarks.formats.captions_file import parse_captions
from gare.data.collected_errors import CollectedErrors
from gare.errors import DataError
from tests.helpers.captions_files import FORMS, MUTATIONS, draw_captions, layouts, quoted_table

COLOURS = ("red", "green", "blue", "yellow", "white", "cyan", "magenta", "orange")


def read(name: str, content: str | bytes) -> dict[str, tuple[str, ...]]:
    """Reads a captions file; returns captions by video, or raises all faults."""
    faults = CollectedErrors()
    rows = parse_captions(name, content.encode() if isinstance(content, str) else content, faults)
    faults.raise_if_any(name)
    found: dict[str, tuple[str, ...]] = {}
    for row in rows:
        found[row.video] = found.get(row.video, ()) + row.captions
    return found


@pytest.fixture
def faulty(shared: Path) -> Path:
    """Captions files that were read wrongly."""
    return shared / "data" / "faults"


def test_unquoted_texts_with_quotes_at_their_ends(faulty: Path) -> None:
    """Rows between two such texts vanished into one caption of three lines."""
    found = read("captions.tsv", (faulty / "05" / "captions.tsv").read_bytes())
    expected = {f"{colour}.mp4": (f"a {colour} picture",) for colour in COLOURS}
    expected |= {"green.mp4": ('"a man says hello',), "yellow.mp4": ('a board of 5"',)}
    assert found == expected


def test_rows_within_a_quoted_text_are_refused_with_their_line() -> None:
    """With commas nothing says whether the quotes are a part of the texts."""
    rows = 'video,caption\na.mp4,x\nb.mp4,"he says\nc.mp4,y\nd.mp4,a board of 5"\n'
    with pytest.raises(DataError, match="from line 3 on: its text in quotes holds line 4, which is a row"):
        read("c.csv", rows)
    # Names without ending are known by the folder.
    plain = rows.replace(".mp4", "")
    faults = CollectedErrors()
    with pytest.raises(DataError, match="from line 3 on"):
        parse_captions("c.csv", plain.encode(), faults, names_video=set("abcd").__contains__)
    # Lines of a text, with commas, that name no video.
    text = 'video,caption\na.mp4,x\nb.mp4,"First, he\nthen, she"\n'
    assert read("c.csv", text)["b.mp4"] == ("First, he\nthen, she",)
    always = '"video","caption"\n"a.mp4","x"\n"b.mp4","he says\nc.mp4,y"\n'
    assert read("c.csv", always)["b.mp4"] == ("he says\nc.mp4,y",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('b.mp4,"a dog', "from line 3 on"),
        ('b.mp4,a dog"', "from line 3 on: a stray quote"),
        ('b.mp4,say ""hi""', "from line 3 on: a stray quote"),
        ('b.mp4,\u00a0"a dog"', "from line 3 on: a stray quote"),
        ('b.mp4,"Hello" he says', "from line 3 on: quotes that do not end with their cell"),
    ],
)
def test_stray_quotes_are_refused_with_their_line(row: str, message: str) -> None:
    """In a file that quotes its texts, a lost quote leaves another text."""
    with pytest.raises(DataError, match=message):
        read("c.csv", f'video,caption\na.mp4,"a cat, brown"\n{row}\n')


@pytest.mark.parametrize("text", ['"Hello" he says', 'he says "hi"', 'a board of 5"', "it's 'here'"])
def test_unquoted_tables_keep_their_quotes(text: str) -> None:
    """Dropped or doubled quotes are other tokens for the text tower."""
    assert read("c.tsv", f"video\tcaption\na.mp4\t{text}\nb.mp4\tx\n")["a.mp4"] == (text,)


def test_texts_in_single_quotes_are_refused() -> None:
    """Some tools quote with them; every caption would begin and end with one."""
    with pytest.raises(DataError, match=r"texts in single quotes, the first in line 2"):
        read("c.csv", "video,caption\na.mp4,'a dog'\nb.mp4,'a cat'\n")
    assert read("c.csv", "video,caption\na.mp4,'tis a dog'\nb.mp4,a cat\n")["a.mp4"] == ("'tis a dog'",)


def test_blanks_after_the_delimiter() -> None:
    """People type them; the quotes then became a part of the caption."""
    found = read("c.csv", 'video, caption\na.mp4, "a dog, brown"\nb.mp4,  "a cat" \n"c.mp4" ,"x"\n')
    assert found == {"a.mp4": ("a dog, brown",), "b.mp4": ("a cat",), "c.mp4": ("x",)}


def test_lists_as_pandas_writes_them(faulty: Path) -> None:
    """One caption with brackets in place of two is what nobody would notice."""
    found = read("captions.csv", (faulty / "06" / "captions.csv").read_bytes())
    assert found == {f"{colour}.mp4": (f"a {colour} picture", f"one {colour} thing") for colour in COLOURS}
    cell = str(['it\'s "here"', "a\\b\n", "日本"]).replace('"', '""')
    assert read("c.csv", f'video,captions\na,"{cell}"\n') == {"a": ('it\'s "here"', "a\\b", "日本")}


@pytest.mark.parametrize(
    "cell",
    [
        *(
            "['a dog' 'a cat']",
            "['a dog', ...]",
            "['a dog', 3]",
            "[b'a dog']",
            "('a dog', 'a cat')",
            "['a do",
        ),
        *("[{'caption': 'a dog'}]", "[['a dog'], ['a cat']]", "[('a dog', 1)]"),
        *("array(['a dog'], dtype=object)", "{'a dog'}", "[1, 2]", "[None]", "[r'a dog']", "['a\\d', 'b']"),
    ],
)
def test_other_lists_are_refused_with_their_line(cell: str) -> None:
    """NumPy's `['a' 'b']` is one text to Python, `aab`; a caption with brackets is none either."""
    with pytest.raises(DataError, match=r"line 2: not a list of texts"):
        read("c.csv", f'video,captions\na,"{cell}"\n')


def test_texts_in_brackets_are_texts() -> None:
    """Subtitles have them."""
    rows = {"a": ("[music] plays",), "b": ("(he) sings",), "c": ("[90s]",)}
    table = "video,captions\n" + "".join(f"{name},{text}\n" for name, (text,) in rows.items())
    assert read("c.csv", table) == rows
    assert read("c.csv", table.replace("captions", "caption")) == rows
    for cell in ("['a', 'b']", '["a", "b"]', "['a' 'b']"):
        with pytest.raises(DataError, match=r"a list in the column 'caption' .*: line 2"):
            read("c.csv", quoted_table([("a", cell)], ",", csv.QUOTE_ALL, ("video", "caption")))


def test_columns_that_are_not_used_do_not_matter() -> None:
    """A column of page text beside the captions must not cost the file."""
    page = "x, " * 50_000
    found = read("c.csv", f'video,caption,page\na.mp4,a dog,"{page}"\nb.mp4,a cat,5"\n')
    assert found == {"a.mp4": ("a dog",), "b.mp4": ("a cat",)}
    assert read("c.csv", f'video,caption\na.mp4,"{page}"\n') == {"a.mp4": (page.strip(),)}


@pytest.mark.parametrize(
    "name", ["j2_pandas_columns.json", "j2c_pandas_split.json", "j2d_hf_columnar.json", "j3_sep.csv"]
)
def test_forms_of_pandas_hugging_face_and_excel(faulty: Path, name: str) -> None:
    """They are what `to_json` and a German Excel write."""
    found = read(name, (faulty / "09" / name).read_bytes())
    assert found == {f"{colour}.mp4": (f"a {colour} picture",) for colour in COLOURS}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"video": ["a", "b"], "caption": ["x"]},
            r"columns 'video' and 'caption' with other rows \(2 and 1\)",
        ),
        ({"video": {"0": "a"}, "caption": {"1": "x"}}, "with other rows"),
        ({"columns": ["video", "caption"], "data": [["a", "x"], ["b"]]}, "other than 2 values in row 2"),
    ],
)
def test_columns_of_other_lengths_are_refused(tree: object, message: str) -> None:
    """Shifted by a row, every caption would belong to another video."""
    with pytest.raises(DataError, match=message):
        read("c.json", json.dumps(tree))


def test_rows_of_columns_by_their_names() -> None:
    """A column in another order, or one that is not used, changes nothing."""
    tree = {"video": {"0": "a", "1": "b"}, "text": {"1": "y", "0": ["x", "z"]}, "info": [1]}
    assert read("c.json", json.dumps(tree)) == {"a": ("x", "z"), "b": ("y",)}
    table = {"schema": {"fields": []}, "data": [{"index": 0, "video": "a", "caption": "x"}]}
    assert read("c.json", json.dumps(table)) == {"a": ("x",)}


def test_two_columns_of_one_name_are_refused() -> None:
    """The first of them was lost without a word."""
    with pytest.raises(DataError, match="has two columns 'caption'"):
        read("c.csv", "video,caption,caption\na.mp4,x,y\n")
    with pytest.raises(DataError, match="has two columns 'video'"):
        read("c.json", json.dumps({"columns": ["video", "video", "caption"], "data": [["a", "b", "x"]]}))
    assert read("c.csv", "video,caption,note,note\na.mp4,x,y,z\n") == {"a.mp4": ("x",)}


@pytest.mark.parametrize("blank", ["\u200b", "\ufeff\u2060", "\u00a0", "\u00ad", "\u2800\u3164", "\u200d"])
def test_captions_of_which_nothing_is_seen_are_blank(blank: str) -> None:
    """They are rows of a spreadsheet that somebody cleared."""
    with pytest.raises(DataError, match=r"blank caption \(1\): line 2"):
        read("c.csv", f"video,caption\na.mp4,{blank}\n")


def test_characters_without_width_around_names_and_texts() -> None:
    """Copied from a web page or joined by `cat`, they hide a column or a video."""
    found = read(
        "c.csv", "\ufeffvideo,\u200bcaption\n\ufeffa.mp4,\u200ba dog\u00a0\nb.mp4\u200b,a\u200bcat\n"
    )
    assert found == {"a.mp4": ("a dog",), "b.mp4": ("a\u200bcat",)}


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (text, encoding)
        for text in (
            "a café in Zürich",
            "a château with a café",
            "they’re here",
            "a “big” dog",
            "he won’t – it’s John’s",
        )
        for encoding in ("utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252")
    ],
)
def test_encodings_of_spreadsheets(text: str, encoding: str, caplog: pytest.LogCaptureFixture) -> None:
    """Excel's plain CSV is Windows-1252, its Unicode text UTF-16."""
    with caplog.at_level(logging.WARNING):
        assert read("c.csv", f"video,caption\na.mp4,{text}\n".encode(encoding)) == {"a.mp4": (text,)}
    assert ("Windows-1252" in caplog.text) == (encoding == "cp1252")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        *(("très bien", "cp1252"), ("koń", "cp1250"), ("café", "mac-roman"), ("schön", "cp850")),
        *(("кот спит", "cp1251"), ("país", "mac-roman"), ("řeka café", "cp1250"), ("猫がいる", "shift-jis")),
        *(("māte un vīrs", "cp1257"), ("Straße", "cp850"), ("ein café, Straße", "cp850")),
        *(("狗在跑", "gbk"), ("sjö", "cp850"), ("Éva", "cp1252"), ("mañana", "mac-roman")),
    ],
)
def test_encodings_that_are_not_sure_are_refused(text: str, encoding: str) -> None:
    """The same byte is è in Paris and č in Prague: another word, in every caption."""
    with pytest.raises(DataError, match=r"is not UTF-8: byte 0x\w\w in line 2"):
        read("c.csv", f"video,caption\na.mp4,{text}\nb.mp4,x\n".encode(encoding))


def test_a_doubled_key_among_many_is_named() -> None:
    """To count each key among all others takes hours for a million videos."""
    pairs = ",".join(f'"{number}": "a dog"' for number in range(300_000))
    with pytest.raises(DataError, match=r"key used more than once in one object \(1\): '7' \(file\)"):
        read("c.json", f'{{{pairs}, "7": "a cat"}}')


def test_limit_of_unpacked_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a few kilobytes must not take all memory of the machine."""
    monkeypatch.setattr(texts, "MAX_UNPACKED_BYTES", 3_000_000)
    data = b"video,caption\n" + b"a.mp4,a dog\n" * 500_000
    read_bytes: list[int] = []

    class Stream(gzip.GzipFile):
        def read(self, size: int | None = -1) -> bytes:
            read_bytes.append(len(chunk := super().read(size)))
            return chunk

    monkeypatch.setattr(gzip, "GzipFile", Stream)
    with pytest.raises(DataError, match=r"c\.csv\.gz: unpacks to more than 0\.0027\d* GiB"):
        read("c.csv.gz", gzip.compress(data))
    assert sum(read_bytes) < 4_100_000
    assert len(read("c.csv.gz", gzip.compress(data[: 14 + 12 * 1000]))["a.mp4"]) == 1000


def test_a_table_that_may_be_cut_off_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Half a caption is a caption, too; only the missing line end tells."""
    with caplog.at_level(logging.WARNING):
        read("c.csv", "video,caption\na.mp4,a dog\n")
        assert not caplog.records
        read("c.csv", "video,caption\na.mp4,a dog\nb.mp4,a gre")
    assert "c.csv does not end with a line end" in caplog.text
    assert "line 3" in caplog.text


@pytest.mark.parametrize("form", FORMS)
def test_nasty_captions_come_back(form: str, rng: np.random.Generator) -> None:
    """A caption is the one that was written, in any form and encoding."""
    expected = draw_captions(rng, 200)
    for name, content in layouts(form, expected):
        found = read(name, content)
        assert found == expected, (name, content[:20])


def test_mutated_files_are_the_truth_or_refused(rng: np.random.Generator) -> None:
    """A file that broke on its way must not train a model on texts that nobody wrote."""
    outcomes: dict[str, list[int]] = {}
    for number in range(500):
        what, mutate = MUTATIONS[number % len(MUTATIONS)]
        truth, (name, content) = mutate(rng)
        count = outcomes.setdefault(what, [0, 0])
        try:
            found = read(name, content)
        except DataError:
            count[1] += 1
            continue
        count[0] += 1
        for video, said in found.items():
            # What was cut off between two rows leaves no trace; what is there is true.
            assert said == truth[video][: len(said)], (what, name, video, content)
        if what != "cut":
            assert found == truth, (what, name, content)
    print(
        "\n".join(f"{what}: {read_} read, {refused} refused" for what, (read_, refused) in outcomes.items())
    )
    assert sum(read_ for read_, _ in outcomes.values()) > 20
    assert sum(refused for _, refused in outcomes.values()) > 100
