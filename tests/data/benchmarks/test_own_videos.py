"""gare/data/benchmarks/own_videos.py: a new user's own videos and captions."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import logging
import os
import tempfile
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gare.data.benchmarks.own_videos import read_folder, read_videos
from gare.data.benchmarks.split import split_by_video
from gare.data.manifest import Manifest, read_manifest, write_manifest
from gare.errors import ConfigError, DataError

AWKWARD = [
    "plain.mp4",
    "-dash first.avi",
    "10186213@N07_8721409729_15f7bde569.",
    "3086_UGLY_TRUTH_00.23.23.000-00.23.28.886.mp4",
    "naïve café 日本語 clip 🎬 (final).mp4",
    "100_0306.AVI",
    "100%25 #1?.webm",
    "sub folder/deep/er.mov",
    'quote\'s "clip".mkv',
    "~tilde.m2ts",
    "no ending",
]


class Case:
    """A folder of (empty) videos and a way to write captions for it."""

    def __init__(self, root: Path) -> None:
        self.videos = root / "videos"
        self.videos.mkdir()
        self.root = root

    def add(self, *names: str) -> Case:
        for name in names:
            (self.videos / name).parent.mkdir(parents=True, exist_ok=True)
            (self.videos / name).write_bytes(b"video")
        return self

    def read(self, name: str, content: str | bytes | object, seed: int = 0) -> Manifest:
        if isinstance(content, str):
            content = content.encode()
        elif not isinstance(content, bytes):
            content = json.dumps(content).encode()
        (self.root / name).write_bytes(content)
        return read_folder(self.videos, str(self.root / name), seed=seed, val_fraction=0.1, test_fraction=0.2)

    def fault(self, name: str, content: str | bytes | object) -> str:
        with pytest.raises(DataError) as caught:
            self.read(name, content)
        return str(caught.value)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def captions_of(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    return {row.video_id: row.captions for row in manifest.rows}


def test_real_clips(shared: Path, tmp_path: Path) -> None:
    """The layout of the shared captions.json is what the first real run reads."""
    annotations = shared / "data" / "captions.json"
    manifest = read_folder(
        shared / "data" / "videos", annotations, seed=0, val_fraction=0.1, test_fraction=0.2
    )
    assert len(manifest.rows) == 58
    assert all(len(row.captions) == 3 for row in manifest.rows)
    assert {split: count["videos"] for split, count in manifest.counts.items()} == {
        "train": 40,
        "val": 6,
        "test": 12,
    }
    by_id = {row.video_id: row for row in manifest.rows}
    assert by_id["video7010"].captions[0] == (
        "a computer screen shows a text window with steps for downloading a song"
    )
    assert Path(by_id["100_0306"].uri).name == "100_0306.AVI"
    assert all(Path(row.uri).is_file() for row in manifest.rows)
    assert manifest.left_out == ()
    assert manifest.protocol == "seeded split by video (seed 0, val 0.1, test 0.2)"
    sha256 = hashlib.sha256(annotations.read_bytes()).hexdigest()
    assert manifest.annotation_sha256 == {"captions.json": sha256}
    write_manifest(manifest, str(tmp_path / "manifest.parquet"))
    assert read_manifest(str(tmp_path / "manifest.parquet")) == manifest


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("ending", [True, False])
def test_awkward_names(case: Case, name: str, ending: bool) -> None:
    """Real collections have such names; each lost one is a video missing from the scores."""
    case.add(*AWKWARD)
    known = Path(name).suffix.lower() in {".mp4", ".avi", ".webm", ".mov", ".mkv", ".m2ts"}
    stem = name[: -len(Path(name).suffix)] if known else name
    row = case.read("captions.json", {name if ending else stem: "a dog"}).rows[0]
    assert row.video_id == stem
    assert row.uri == str(case.videos.resolve() / name)


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(
    lambda text: any(unicodedata.category(sign) not in ("Cc", "Cf", "Zs", "Zl", "Zp") for sign in text)
)


def without_edges(text: str) -> str:
    """Strips blanks and characters without width."""
    edges = "".join(sign for sign in set(text) if sign.isspace() or sign in "\u200b\u2060\ufeff")
    return text.strip(edges)


CAPTIONS = st.lists(
    st.tuples(st.sampled_from(AWKWARD), st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=6
)


@settings(max_examples=40, deadline=None)
@given(captions=CAPTIONS, delimiter=st.sampled_from(",;\t"), crlf=st.booleans(), bom=st.booleans())
def test_every_layout_says_the_same(
    captions: list[tuple[str, list[str]]], delimiter: str, crlf: bool, bom: bool
) -> None:
    """A user who converts a file must not get other data, whatever the texts hold."""
    expected: dict[str, list[str]] = {}
    for name, texts in captions:
        expected.setdefault(name, []).extend(map(without_edges, texts))
    plain, nested = io.StringIO(newline=""), io.StringIO(newline="")
    rows, lists = (
        csv.writer(out, delimiter=delimiter, lineterminator="\r\n" if crlf else "\n", quoting=csv.QUOTE_ALL)
        for out in (plain, nested)
    )
    rows.writerow(["Video_ID", "Sentence"])
    rows.writerows((name, text) for name, texts in captions for text in texts)
    lists.writerow(["captions", "FILE"])
    lists.writerows((json.dumps(texts), name) for name, texts in captions)
    entries = [{"file": name, "captions": texts} for name, texts in captions]
    lines = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    layouts: dict[str, str] = {
        "a.csv": plain.getvalue(),
        "b.tsv": nested.getvalue(),
        "c.jsonl": lines,
        "d.json": json.dumps(entries),
        "e.json": json.dumps({"videos": entries, "info": 1}),
        "f.json": json.dumps(expected),
        "g.NDJSON.gz": lines,
    }
    with tempfile.TemporaryDirectory() as folder:
        case = Case(Path(folder)).add(*AWKWARD)
        fingerprints = set()
        for name, text in layouts.items():
            data = ("\ufeff" * bom + text).encode()
            manifest = case.read(name, gzip.compress(data) if name.endswith(".gz") else data)
            found = {os.path.relpath(row.uri, case.videos.resolve()): row.captions for row in manifest.rows}
            assert found == {file: tuple(texts) for file, texts in expected.items()}, name
            fingerprints.add(manifest.fingerprint)
    assert len(fingerprints) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.csv", "Video;Caption;note\r\na.mp4;a dog, brown;x\r\n\r\nb;a cat;\r\n"),
        ("c.csv", ',video,caption\n0,a,"a dog, brown"\n1,b.mp4,a cat\n'),
        ("c.txt", "text\tpath\na dog, brown\t./a.mp4\na cat\tsub/../b.mp4\n"),
        ("c.json", '{"video": "a", "caption": "a dog, brown"}\n{"video": "b", "caption": " a cat"}'),
        ("c.json", {"a": {"text": "a dog, brown"}, "b": {"sentence": "a cat", "title": "x"}}),
        ("c.jsonl.gz", b'{"path": "a", "text": "a dog, brown"}\n{"path": "b", "captions": ["a cat"]}\n'),
    ],
)
def test_lenient_about_form(case: Case, name: str, content: str | bytes | object) -> None:
    """Spreadsheets, pandas and download tools each write these files in their own way."""
    manifest = case.add("a.mp4", "b.mp4").read(name, content)
    assert captions_of(manifest) == {"a": ("a dog, brown",), "b": ("a cat",)}


def test_quoted_line_breaks_and_lines_of_faults(case: Case) -> None:
    """With a line number that is off, a person searches a file of 9,000 rows in vain."""
    case.add("a.mp4")
    text = 'video,caption\na,"two\nlines"\na,\nlost,x\n'
    fault = case.fault("c.csv", text)
    assert "blank caption (1): line 4" in fault
    assert "'lost' (line 5)" in fault
    assert captions_of(case.read("c.csv", text.replace("a,\nlost,x\n", ""))) == {"a": ("two\nlines",)}


def test_absolute_paths_inside_the_folder(case: Case, tmp_path: Path) -> None:
    """Lists made with `find $PWD` hold them, also where the folder is reached through a link."""
    case.add("sub/a.mp4")
    assert case.read("c.json", {str(case.videos / "sub" / "a.mp4"): "x"}).rows[0].video_id == "sub/a"
    (tmp_path / "link").symlink_to(case.videos)
    case.videos = tmp_path / "link"
    assert case.read("c.json", {str(case.videos / "sub" / "a.mp4"): "x"}).rows[0].video_id == "sub/a"


@pytest.mark.parametrize(
    "name", ["../secret.mp4", "sub/../../secret.mp4", "..\\secret.mp4", "{root}/secret.mp4", "/", ".."]
)
def test_nothing_outside_the_folder_is_read(case: Case, tmp_path: Path, name: str) -> None:
    """A captions file from somebody else must not make us open, and show in MLflow, a private file."""
    case.add("a.mp4", "sub/b.mp4")
    (tmp_path / "secret.mp4").write_bytes(b"private")
    assert "video outside the folder (1)" in case.fault("c.json", {name.format(root=tmp_path): "x"})


@pytest.mark.parametrize("name", ["secret", "~", ".", "sub", "a\0.mp4", "broken"])
def test_names_of_no_video(case: Case, tmp_path: Path, name: str) -> None:
    """A folder or a home is not one of the folder's files."""
    case.add("a.mp4", "sub/b.mp4")
    (tmp_path / "secret.mp4").write_bytes(b"private")
    (case.videos / "broken.mp4").symlink_to(tmp_path / "nowhere")
    assert "caption without video file (1)" in case.fault("c.json", {name: "x"})


def test_links_in_the_folder_are_followed(case: Case, tmp_path: Path) -> None:
    """Download caches keep videos as links to files elsewhere; a link in a circle must not hang the run."""
    case.add("a.mp4")
    (tmp_path / "blob").write_bytes(b"video")
    (case.videos / "linked.mp4").symlink_to(tmp_path / "blob")
    (case.videos / "circle").symlink_to(case.videos)
    manifest = case.read("c.json", {"a": "x", "linked": "y"})
    assert [row.uri for row in manifest.rows] == [
        str(case.videos.resolve() / name) for name in ("a.mp4", "linked.mp4")
    ]
    assert manifest.left_out == ()


def test_same_name_different_endings(case: Case) -> None:
    """Two videos under one id would be scored as one."""
    case.add("a.mp4", "a.avi", "a.mp4.mov", "b.mp4", "x/c.mp4", "y/c.mp4")
    ids = captions_of(
        case.read("c.json", {"a.mp4": "1", "a.avi": "2", "a.mp4.mov": "3", "b": "4", "x/c": "5"})
    )
    assert ids == {"a.mp4": ("1",), "a.avi": ("2",), "a.mp4.mov": ("3",), "b": ("4",), "x/c": ("5",)}
    fault = case.fault("c.json", {"a": "1", "c": "2"})
    assert "several files of that name (2): 'a' (entry 'a'; 'a.avi' or 'a.mp4'); 'c'" in fault


def test_a_file_that_no_caption_names_renames_no_clip(case: Case) -> None:
    """A copy in another container, left beside the video, made a store of the whole folder anew."""
    case.add("a.mp4", "b.mp4", "c.mp4", "d.mp4")
    captions = {f"{name}.mp4": "x" for name in "abcd"}
    before = case.read("c.json", captions)
    after = case.add("a.mkv", "b.avi").read("c.json", captions)
    assert after.rows == before.rows
    assert after.left_out == ("a.mkv", "b.avi")
    assert "several files of that name (1): 'a' (entry 'a'; 'a.mkv' or 'a.mp4')" in case.fault(
        "c.json", {"a": "x"}
    )


def test_videos_without_captions(case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """People who only want to search have a folder; captions that come later find the same clips."""
    case.add("a.mp4", "sub/b.mkv", "c.avi", "c.mp4", "notes.txt", "._a.mp4")
    (case.videos / "broken.mp4").symlink_to(tmp_path / "nowhere")
    with caplog.at_level(logging.WARNING):
        manifest = read_videos(case.videos, seed=0, val_fraction=0.2, test_fraction=0.3)
    assert captions_of(manifest) == {"a": (), "c.avi": (), "c.mp4": (), "sub/b": ()}
    assert manifest.left_out == ("broken.mp4",)
    assert "1 of 5 videos" in caplog.text
    assert {split: count["videos"] for split, count in manifest.counts.items()} == {
        "train": 2,
        "val": 1,
        "test": 1,
    }
    (case.root / "c.json").write_text(
        json.dumps(dict.fromkeys(("a.mp4", "sub/b.mkv", "c.avi", "c.mp4"), "x"))
    )
    captioned = read_folder(case.videos, case.root / "c.json", seed=0, val_fraction=0.2, test_fraction=0.3)
    assert tuple(replace(row, captions=()) for row in captioned.rows) == manifest.rows
    write_manifest(manifest, str(tmp_path / "manifest.parquet"))
    assert read_manifest(str(tmp_path / "manifest.parquet")) == manifest


def test_folders_of_an_object_store_without_captions(tmp_path: Path) -> None:
    """Large collections are there."""
    manifest = read_videos(
        "s3://bucket/clips",
        seed=0,
        val_fraction=0.1,
        test_fraction=0.2,
        list_remote=lambda uri: ["b 1.mp4", "a.mp4", "readme.md"],
    )
    assert [(row.video_id, row.uri) for row in manifest.rows] == [
        ("a", "s3://bucket/clips/a.mp4"),
        ("b 1", "s3://bucket/clips/b%201.mp4"),
    ]


def test_folders_without_videos(case: Case) -> None:
    """A mount that did not come up, or a wrong folder."""
    settings = {"seed": 0, "val_fraction": 0.1, "test_fraction": 0.2}
    with pytest.raises(DataError, match="is empty"):
        read_videos(case.videos, **settings)
    with pytest.raises(DataError, match=r"holds no video \(files that end in \.3g2"):
        read_videos(case.add("notes.txt").videos, **settings)
    with pytest.raises(DataError, match="none' is missing"):
        read_videos(case.root / "none", **settings)


def test_accents_in_another_unicode_form(case: Case) -> None:
    """A folder copied from a Mac has its accents in two characters; its captions have them in one."""
    case.add("cafe\u0301.mp4")
    assert captions_of(case.read("c.json", {"caf\u00e9.mp4": "x"})) == {"caf\u00e9": ("x",)}


def test_clips_of_one_file(case: Case) -> None:
    """Each clip has its own id, stable when others are added, and never straddles two splits."""
    case.add("a.mp4", "b.mp4", "c.mp4", "d.mp4")
    manifest = case.read(
        "c.csv",
        "file,start,End_Seconds,text\na,12.5,20,one\na,20,,two\na,,5,three\na,12.50,20.0,four\nb,0,,whole\n"
        "b,,,file\nc,,,x\nd,,,y\n",
    )
    clips = [row for row in manifest.rows if row.video_id.startswith("a")]
    assert [(row.video_id, row.start_s, row.end_s, row.captions) for row in clips] == [
        ("a#0-5", 0.0, 5.0, ("three",)),
        ("a#12.5-20", 12.5, 20.0, ("one", "four")),
        ("a#20-", 20.0, None, ("two",)),
    ]
    assert len({row.split for row in clips}) == 1
    assert captions_of(manifest)["b"] == ("whole", "file")
    assert {split for split, count in manifest.counts.items() if count["videos"]} == {"train", "val", "test"}


def test_given_split(case: Case) -> None:
    """A published split has to be kept as it is."""
    case.add("a.mp4", "b.mp4", "c.mp4")
    manifest = case.read("c.csv", "video,split,caption\na,Training,x\nb,validate,y\nc, TEST ,z\na,train,w\n")
    assert [row.split for row in manifest.rows] == ["train", "val", "test"]
    assert manifest.protocol == "own split"


def test_bad_splits(case: Case) -> None:
    """One video in train and test would make the score a lie."""
    case.add("a.mp4", "b.mp4", "c.mp4")
    fault = case.fault("c.csv", "video,split,caption\na,train,x\na.mp4,test,y\nb,,z\nc,holdout,q\n")
    assert "one video in two splits (1): 'a.mp4': train (line 2), test (line 3)" in fault
    assert "rows without a split where others have one (1): line 4" in fault
    assert "split is not one of train, val, test (1): 'holdout' (line 5)" in fault


def test_seeded_split_ignores_the_order_of_rows(case: Case, rng: np.random.Generator) -> None:
    """Sorting a captions file must not move videos from train to test."""
    names = [f"v{number}" for number in range(30)]
    case.add(*(f"{name}.mp4" for name in names))
    manifest = case.read("c.json", [{"video": name, "caption": "x"} for name in names])
    shuffled = [{"video": name, "caption": "x"} for name in rng.permutation(names)]
    assert case.read("c.json", shuffled).rows == manifest.rows
    assert manifest.counts["val"]["videos"] == 3
    assert manifest.counts["test"]["videos"] == 6
    assert case.read("c.json", shuffled, seed=1).fingerprint != manifest.fingerprint


def test_split_sizes() -> None:
    """Every split that was asked for needs a video, and train always has one."""
    for count in range(1, 40):
        ids = [f"v{number}" for number in range(count)]
        for val, test in ((0.0, 0.0), (0.01, 0.01), (0.1, 0.2), (0.45, 0.5), (0.0, 0.99)):
            split = split_by_video(ids, seed=count, val_fraction=val, test_fraction=test)
            assert set(split) == set(ids)
            names = list(split.values())
            assert names.count("train") >= 1
            if count >= 3:
                assert (names.count("val") >= 1) == (val > 0)
                assert (names.count("test") >= 1) == (test > 0)
    # Pinned: results of earlier versions stay comparable only with the same split.
    split = split_by_video("abcdef", seed=0, val_fraction=0.2, test_fraction=0.3)
    assert {name: part for name, part in split.items() if part != "train"} == {
        "f": "val",
        "c": "test",
        "d": "test",
    }
    for val, test in ((0.5, 0.5), (-0.1, 0.2), (0.0, 1.0), (float("nan"), 0.1)):
        with pytest.raises(ConfigError, match="leave no videos to train"):
            split_by_video("abc", seed=0, val_fraction=val, test_fraction=test)


def test_video_without_caption_is_reported(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    """People caption a part of a folder: the run goes on, and says what it left out."""
    case.add("a.mp4", *(f"u{number:02}.MP4" for number in range(12)), "._a.mp4", "notes.pdf")
    with caplog.at_level(logging.WARNING):
        manifest = case.read("c.json", {"a": "x"})
    assert manifest.left_out == tuple(f"u{number:02}.MP4" for number in range(12))
    assert "12 of 13 videos" in caplog.text
    assert "u09.MP4 … and 2 more" in caplog.text


def test_file_names_that_are_not_utf8(case: Case, tmp_path: Path) -> None:
    """One file of an old disk must not stop the run, nor crash the log."""
    case.add("a.mp4")
    try:
        (case.videos / os.fsdecode(b"caf\xe9.mp4")).touch()
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    manifest = case.read("c.json", {"a": "x"})
    assert manifest.left_out == ("caf\\udce9.mp4",)
    write_manifest(manifest, str(tmp_path / "manifest.parquet"))


def test_all_faults_come_at_once(case: Case) -> None:
    """Found one by one, these are nine runs."""
    case.add("a.mp4", "apple.mp4")
    rows = [
        {"video": "a", "caption": " "},
        {"video": "a", "caption": 5},
        {"video": "a", "captions": []},
        {"video": "appel.mp4", "caption": "x"},
        {"video": "appel.mp4", "caption": "y"},
        {"caption": "x", "video": None},
        {"video": "a", "captoin": "x"},
        {"video": "a", "caption": "x", "start": "0:12", "end": True},
        {"video": "a", "caption": "x", "start": 5, "end": 5},
        {"video": "a", "caption": "x", "file": "b"},
        {"video": "a"},
        "text",
        *({"video": f"lost{number:02}", "caption": "x"} for number in range(12)),
    ]
    fault = case.fault("c.json", rows)
    for part in (
        str(case.root / "c.json"),
        "blank caption (2): entry 1; entry 3",
        "caption is neither a text nor a list of texts (1): entry 2",
        "'appel.mp4' (entry 4 and 1 more; nearest: 'apple.mp4')",
        "no video named (1): entry 6",
        "unknown column (1): 'captoin' (nearest: 'caption'; entry 7)",
        "not a time in seconds, such as 12.5 (2): start '0:12' (entry 8); end True (entry 8)",
        "start is not before end (1): 5.0 to 5.0 (entry 9)",
        "two columns of one meaning (1): 'video' and 'file' (entry 10)",
        "no caption column",
        "not a JSON object (1): entry 12",
        "caption without video file (13)",
        "'lost08' (entry 21) … and 3 more",
    ):
        assert part in fault
    assert "lost09" not in fault


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", "", "is empty"),
        ("c.csv", "video,caption\n", "has no rows"),
        ("c.csv", "a.mp4,a dog\na.mp4,a cat\n", "no video column"),
        ("c.csv", "video,caption\na,a dog, brown\n", "line 2 has 3"),
        ("c.csv", "video,caption\na\n", "line 2 has 1"),
        ("c.csv", 'video,caption\na,x\na,"open\n', "not CSV from line 3"),
        ("c.csv", 'video,caption\na,"a "big" dog"\n', "not CSV from line 2"),
        ("c.csv", "video,caption\na,caf\xe9".encode("latin-1"), "not UTF-8: byte 0xe9 in line 2"),
        ("c.csv", "video,caption\na,x".encode("utf-16")[:-1], "not UTF-16"),
        ("c.csv", "video,caption\na,x\0", "NUL characters from line 2 on"),
        ("c.csv", "video,caption,start\na,x,nan\n", "not a time"),
        ("c.csv", "video,caption,start\na,x,-1\n", "not a time"),
        ("c.csv", "video,caption,start\na,x,1_0\n", "not a time"),
        ("c.csv", "video,caption,spilt\na,x,train\n", "nearest: 'split'"),
        ("c.json", "{", "is not JSON"),
        ("c.json", "[" * 100_000, "is not JSON"),
        ("c.json", '"a"', "holds a str"),
        ("c.json", '{"a": "x", "a": "y"}', "key used more than once in one object (1): 'a'"),
        ("c.json", [], "has no rows"),
        ("c.json", {"a": None}, "blank caption"),
        ("c.json", {"a": "\ud800"}, "UTF-8"),
        ("c.jsonl", '{"video": "a", "caption": "x"}\n{"video": "a"', "not JSON (1): line 2"),
        ("c.json.gz", gzip.compress(b'{"a": "x"}', mtime=0)[:-6], "is damaged"),
        ("c.xlsx", "x", "no known format"),
    ],
)
def test_bad_captions_files(case: Case, name: str, content: str | bytes | object, message: str) -> None:
    """Each of these is how a real file goes wrong; none may pass or end in a traceback."""
    assert message in case.add("a.mp4").fault(name, content)


def test_missing_inputs_are_reported_together(tmp_path: Path) -> None:
    """A first run with two wrong paths should not need three attempts."""
    with pytest.raises(DataError) as caught:
        read_folder(tmp_path / "none", tmp_path / "c.csv", seed=0, val_fraction=0.1, test_fraction=0.2)
    assert "none' is missing" in str(caught.value)
    assert "No such file" in str(caught.value)


def test_folders_that_cannot_be_read(case: Case, tmp_path: Path) -> None:
    """An empty folder, a file and a remote one are faults of the path, to be said as such."""
    assert "is empty" in case.fault("c.json", {"a": "x"})
    case.videos = tmp_path / "c.json"
    assert "is not a folder" in case.fault("c.json", {"a": "x"})
    with pytest.raises(DataError, match="not on this machine"):
        read_folder(
            "s3://bucket/videos?region=eu-west-1",
            tmp_path / "c.json",
            seed=0,
            val_fraction=0.1,
            test_fraction=0.2,
        )
