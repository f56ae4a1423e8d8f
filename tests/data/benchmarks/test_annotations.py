"""gare/data/benchmarks/formats/annotations.py and annotation_folder.py: forms of files, good and bad."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from gare.data.benchmarks.annotation_folder import AnnotationFolder
from gare.data.benchmarks.formats.annotations import read_annotations
from gare.errors import DataError
from tests.helpers.annotation_copies import write

RECORDS = [{"video": "a.mp4", "caption": "a  dog, running"}, {"video": "b", "caption": ["x", "a; cat"]}]
SAID = [("a.mp4", ("a dog, running",)), ("b", ("x", "a; cat"))]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(RECORDS),
        json.dumps({"annotations": RECORDS, "info": {"year": 2020}}),
        json.dumps({"a.mp4": "a dog, running", "b": ["x", "a; cat"]}),
        json.dumps({"a.mp4": {"sentences": ["a dog, running"]}, "b": {"sentences": ["x", "a; cat"]}}),
        json.dumps({"b": {"text": [["x"], ["a;", "cat"]]}, "a.mp4": {"text": "a dog, running"}}),
        json.dumps([["a.mp4", "a dog, running"], ["b", '["x", "a; cat"]']]),
        "\n".join(json.dumps(record) for record in RECORDS),
        '{"a.mp4": "a dog, running"}\r\n{"b": ["x", "a; cat"]}\r\n',
        'video_id,caption\na.mp4,"a dog, running"\nb,"[""x"", ""a; cat""]"\n',
        "id;Captions\r\na.mp4;a dog, running\r\nb;\"['x', 'a; cat']\"",
        "video\ttext\textra\na.mp4\ta dog, running\t\nb\t\"['x', 'a; cat']\"\t1\n",
        "sentence|video name\na dog, running|a.mp4\n\"['x', 'a; cat']\"|b\n",
        'a.mp4\ta dog, running\nb\t["x", "a; cat"]\n',
        json.dumps({"video": ["a.mp4", "b"], "caption": ["a dog, running", ["x", "a; cat"]]}),
        json.dumps({"a.mp4": {"0": "a dog, running"}, "b": {"0": "x", "1": "a; cat"}}),
        'a.mp4|a dog, running\nb|["x", "a; cat"]\n',
        '# a remark\na.mp4 a dog, running\n\nb ["x", "a; cat"]\n',
        "video_id,caption\na.mp4,a dog, running\nb,\"['x', 'a; cat']\"\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_layouts_that_say_the_same(content: str, encoding: str) -> None:
    """A user who has the file in another form must not get other captions."""
    found = read_annotations("file", content.encode(encoding))
    assert sorted((entry.video, entry.texts) for entry in found) == SAID
    assert read_annotations("file", gzip.compress(content.encode(encoding))) == found


@pytest.mark.parametrize(
    "content",
    ["a\nb.mp4\n", "video_id\r\na\r\nb.mp4", '["a", "b.mp4"]', ",video_id\n0,a\n1,b.mp4\n", '"a"\n"b.mp4"\n'],
)
def test_lists_of_videos(content: str) -> None:
    """A header or quotes taken for an id would be a video that nobody has."""
    found = read_annotations("list", content.encode())
    assert [(entry.video, entry.texts) for entry in found] == [("a", ()), ("b.mp4", ())]


def test_splits_and_times() -> None:
    """Files that hold all splits say which, and clips need their times as numbers."""
    tree = {
        "train": {"a": {"duration": 9.5, "timestamps": [[0, 2], [3.5, 1]], "sentences": ["x", "y"]}},
        "val_1": [{"video": "b", "start": 1, "end": "2.5", "caption": "z"}],
    }
    first, second = read_annotations("f", json.dumps(tree).encode())
    assert (first.split, first.times, first.duration_s) == ("train", ((0.0, 2.0), (3.5, 1.0)), 9.5)
    assert (second.split, second.times) == ("val", ((1.0, 2.5),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"[]", "names no video"),
        (b"[1.5]", "neither an id nor an object"),
        (b'{"a": "x"', "is not JSON"),
        (b'{"a": "x", "a": "y"}', "key used more than once"),
        (b'[{"caption": "x"}]', "no video named"),
        (b'{"a": [1, 2]}', "neither a text nor a list of texts"),
        (b'{"a": {"sentences": ["x", "y"], "timestamps": [[0, 1]]}}', "not one time for each text"),
        (b"video_id,caption,more\na,x\n", "other than 3 fields"),
        (b'video_id,caption\na,"x\n', "is not CSV from line 2 on"),
        (b"video_id,caption\n,x\n", "no video named"),
        ("video_id,caption\na,caf\xe9".encode("latin-1"), "not UTF-8: byte 0xe9"),
        (gzip.compress(b"a\nb\n", mtime=0)[:-4], "is damaged"),
        (b"a\0b", "NUL"),
    ],
)
def test_files_that_are_refused(content: bytes, message: str) -> None:
    """Each is how a real file goes wrong; half a file must not become half a benchmark."""
    with pytest.raises(DataError, match=message):
        read_annotations("file", content)


def test_which_file_is_taken(tmp_path: Path) -> None:
    """Unpacked beside packed is one file; two that differ cannot both be meant."""
    write(tmp_path / "sub", {"Train_List.TXT": "a\nb\n", "train_list.txt.gz": "b\r\na\r\n"})
    write(tmp_path / ".git", {"train_list.txt": "c\n"})
    write(tmp_path, {"._train_list.txt": "\0\0", "notes.md": "x"})
    folder = AnnotationFolder(str(tmp_path))
    names = folder.find((r"^train_list",))
    assert names == ["sub/Train_List.TXT", "sub/train_list.txt.gz"]
    assert [entry.video for entry in folder.read(names, "train list")] == ["a", "b"]
    assert set(folder.sha256) == set(names)
    write(tmp_path, {"train_list.csv": "video\na\n"})
    folder = AnnotationFolder(str(tmp_path))
    with pytest.raises(DataError, match=r"several files could be train list and differ: sub/Train_List.TXT"):
        folder.read_required((r"^train_list",), "train list", "train_list.txt")
