"""gare/data/benchmarks/msrvtt.py on the real files and on copies in other forms."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gare.data.benchmarks.registry import Benchmark
from gare.errors import DataError
from tests.helpers.annotation_copies import (
    Copy,
    as_lines,
    as_table,
    assert_same_benchmark,
    captions_of,
    counts_of,
    deviations_of,
    json_of,
    lines_of,
    read,
    table_of,
    text_of,
    write,
)

BENCHMARK = "msrvtt"
DATA, TRAIN, TEST = "MSRVTT_data.assembled-en.json", "MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv"


class Content:
    """The benchmark, read the plain way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = json_of(folder, DATA)
        self.train = lines_of(folder, TRAIN)[1:]
        self.test = [(row["video_id"], row["sentence"]) for row in table_of(folder, TEST)]
        self.captions: dict[str, list[str]] = {}
        for sentence in self.data["sentences"]:
            self.captions.setdefault(sentence["video_id"], []).append(sentence["caption"])


plain_content = Content


def test_counts_and_samples(original: Benchmark, folder: Path) -> None:
    """A test split of other videos or captions is another benchmark, whatever the folder is called."""
    assert counts_of(original) == {"train": (9000, 56_253), "val": (0, 0), "test": (1000, 1000)}
    captions = captions_of(original)
    assert captions["video7020"] == ("a woman creating a fondant baby and flower",)
    assert captions["video9770"] == ("a person is connecting something to system",)
    assert captions["video0"] == ("a car is shown",)
    assert len(captions["video6513"]) == 20
    # Double blanks are folded, what is not ASCII is kept.
    assert "a cartoon star person" in captions["video2201"]
    assert "вeautiful girl with long hair and in the headphones is singing a song of beatles" in (
        captions.get("video7851", ()) + captions.get("video8605", ())
    )
    assert all(row.start_s is None and row.end_s is None for row in original.manifest.rows)
    assert (
        original.manifest.annotation_sha256[TEST] == hashlib.sha256((folder / TEST).read_bytes()).hexdigest()
    )
    assert set(original.manifest.annotation_sha256) == {TEST, TRAIN, f"{DATA}.gz"}  # not the Italian file


def test_every_caption_is_that_of_the_file(original: Benchmark, content: Content) -> None:
    """The join on ids must lose, double or mix up no caption of 57,253."""
    expected = {name: content.captions[name] for name in content.train} | {
        name: [sentence] for name, sentence in content.test
    }
    found = captions_of(original)
    assert found.keys() == expected.keys()
    for name, texts in expected.items():
        assert found[name] == tuple(sorted(" ".join(text.split()) for text in texts))


def test_what_is_not_as_published_is_said(original: Benchmark, content: Content) -> None:
    """A run on a part of the captions must not be taken for the published protocol."""
    assert original.manifest.protocol == (
        "1k-A, 9k train list, all captions; not as published: train 56253 captions for 180000"
    )
    uneven = deviations_of(original)["train videos with other than 20 captions"]
    assert set(uneven) == {name for name in content.train if len(content.captions[name]) != 20}
    assert len(uneven) == 6513
    assert original.summary()["as_published"] is False


def test_train_list_of_7k(folder: Path, original: Benchmark) -> None:
    """The two train lists give scores that differ by points, so they must not be mixed up."""
    smaller = read(BENCHMARK, folder, train_list="7k")
    assert counts_of(smaller)["train"][0] == 7010
    assert smaller.manifest.protocol.startswith("1k-A, 7k train list")
    assert captions_of(smaller).items() <= captions_of(original).items()


def test_test_sentences_come_from_the_test_file(original: Benchmark, content: Content) -> None:
    """35 sentences are not among their video's captions: a join on the sentence would lose them."""
    found = captions_of(original)
    strangers = [name for name, sentence in content.test if sentence not in content.captions[name]]
    assert len(strangers) == 35
    assert all(len(found[name]) == 1 for name in strangers)
    assert sum(text == ("a man playing video games",) for text in found.values()) >= 3


def _windows(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    data = text_of(content.folder, DATA)
    files = {name: text_of(content.folder, name).replace("\n", "\r\n") for name in (TRAIN, TEST)}
    return {"MSRVTT_data.json": data, **{name: f"\ufeff{text}" for name, text in files.items()}}


def _other_tables(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    test = [(sentence, str(row), name) for row, (name, sentence) in enumerate(content.test)]
    utf16 = as_table(["Sentence", "", "Video_ID"], test, "\t").encode("utf-16")
    captions = [(name, text) for name in content.captions for text in content.captions[name]]
    order = rng.permutation(len(captions))
    return {
        "msrvtt_jsfusion_test.tsv": utf16,
        "train_list_jsfusion.txt": "\r".join(content.train),
        "MSRVTT_captions.csv.gz": as_table(["caption", "video_id"], [captions[i][::-1] for i in order], ";"),
    }


def _lists(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    train = [{"caption": content.captions[name], "video": f"{name}.mp4"} for name in content.train]
    test = [{"video": f"{name}.mp4", "caption": sentence} for name, sentence in content.test]
    return {"msrvtt_ret_train9k.json": train, "msrvtt_ret_test1k.json": test}


def _lines(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    train = [
        {"desc": text, "video_id": name}
        for name in reversed(content.train)
        for text in content.captions[name]
    ]
    test = [{"video_id": name, "desc": [sentence]} for name, sentence in content.test]
    return {"descs_ret_train.jsonl.gz": as_lines(train), "descs_ret_test.json": as_lines(test)}


def _mappings(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    # As mmaction2 writes them.
    return {
        "train_9k.json": {name: content.captions[name] for name in content.train},
        "test_JSFUSION.json": {name: [sentence] for name, sentence in content.test},
    }


def _official_pair(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    sentences = content.data["sentences"]
    shuffled = [sentences[i] for i in rng.permutation(len(sentences))]
    test = {name for name, _ in content.test}
    parts = {"train_val_videodatainfo.json": [], "test_videodatainfo.json": []}
    for sentence in shuffled:
        name = "test_videodatainfo.json" if sentence["video_id"] in test else "train_val_videodatainfo.json"
        parts[name].append({key: sentence[key] for key in ("video_id", "sen_id", "caption")})
    return {
        **{name: {"sentences": part, "videos": [], "info": {}} for name, part in parts.items()},
        "MSRVTT_train.9k.csv": as_table(["", "video_id"], [(str(i), v) for i, v in enumerate(content.train)]),
        "MSRVTT_JSFUSION_test.csv": text_of(content.folder, TEST),
    }


@pytest.mark.parametrize("copy", [_windows, _other_tables, _lists, _lines, _mappings, _official_pair])
def test_copies_in_other_forms_are_the_same_benchmark(
    copy: Copy, content: Content, original: Benchmark, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Who has the files from elsewhere must train on and be scored on the very same data."""
    assert_same_benchmark(original, write(tmp_path, copy(content, rng)))


def test_another_test_split_is_refused(content: Content, tmp_path: Path) -> None:
    """A gallery of 999, or of 1,000 other videos (1k-B), gives higher or lower scores under the same name."""
    files = _mappings(content, np.random.default_rng(0))
    test = files["test_JSFUSION.json"]
    short = dict(list(test.items())[1:])
    with pytest.raises(DataError, match="999 videos for 1000"):
        read(BENCHMARK, write(tmp_path / "short", {**files, "test_JSFUSION.json": short}))
    other = {**short, "video6999": ["a dog runs"]}
    files["train_9k.json"].pop("video6999")
    with pytest.raises(DataError, match="other videos"):
        read(BENCHMARK, write(tmp_path / "other", {**files, "test_JSFUSION.json": other}))
    both = {**test, "video7020": ["a dog runs", "a cat sleeps"]}
    with pytest.raises(DataError, match="other than one sentence: video7020"):
        read(BENCHMARK, write(tmp_path / "both", {**files, "test_JSFUSION.json": both}))


def test_a_test_video_in_train_is_refused(content: Content, tmp_path: Path) -> None:
    """Training on test videos is the worst fault that a score can hide."""
    files = _mappings(content, np.random.default_rng(0))
    files["train_9k.json"]["video7020"] = ["a woman makes a cake"]
    with pytest.raises(DataError, match=r"one video in two splits.*'video7020': train, test"):
        read(BENCHMARK, write(tmp_path / "leak", files))


def test_missing_files_are_named(folder: Path, tmp_path: Path, content: Content) -> None:
    """A first run should say which file it lacks, and never take the Italian captions for English ones."""
    files = {TRAIN: text_of(folder, TRAIN), TEST: text_of(folder, TEST)}
    write(tmp_path / "a", files)
    italian = next(folder.glob("*ITALIANO*"))
    (tmp_path / "a" / italian.name).symlink_to(italian)
    with pytest.raises(DataError, match=r"no file with the captions of train.*MSRVTT_data.json"):
        read(BENCHMARK, tmp_path / "a")
    with pytest.raises(DataError, match="no 1k-A test file"):
        read(BENCHMARK, write(tmp_path / "b", {TRAIN: files[TRAIN]}))
    strange = {"sentences": [{"video_id": "video7020", "caption": "x"}], "videos": []}
    with pytest.raises(DataError, match=r"no train video has a text.*left out \(9000\)"):
        read(BENCHMARK, write(tmp_path / "d", {**files, "MSRVTT_data.json": strange}))
    bad = {**files, "MSRVTT_data.json": {"sentences": [{"video_id": "clip7", "caption": "x"}], "videos": []}}
    with pytest.raises(DataError, match=r"not a video of the benchmark.*'clip7'"):
        read(BENCHMARK, write(tmp_path / "c", bad))
