"""gare/data/benchmarks/didemo.py on the real files and on copies in other forms."""

from __future__ import annotations

import json
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
    with_single_blanks,
    without_ending,
    write,
)

BENCHMARK = "didemo"
SPLITS = ("train", "val", "test")


class Content:
    """The benchmark, read the plain way."""

    def __init__(self, folder: Path) -> None:
        self.lists = {split: lines_of(folder, f"{split}_list.txt") for split in SPLITS}
        self.texts = {f"{split}_list.txt": text_of(folder, f"{split}_list.txt") for split in SPLITS}
        self.labels = {split: table_of(folder, f"didemo_{split}_label.csv") for split in SPLITS}
        self.data = {split: json_of(folder, f"{split}_data.json") for split in ("val", "test")}
        self.label_texts = {
            f"didemo_{split}_label.csv": text_of(folder, f"didemo_{split}_label.csv") for split in SPLITS
        }
        # A paragraph of each listed name.
        self.paragraphs: dict[str, dict[str, list[str]]] = {"train": {}, "val": {}, "test": {}}
        for row in self.labels["train"]:
            self.paragraphs["train"][row["video_path"].rsplit("/", 1)[1]] = [row["text"]]
        for split, entries in self.data.items():
            for entry in entries:
                if entry["video"] in set(self.lists[split]):
                    self.paragraphs[split].setdefault(entry["video"], []).append(entry["description"])


plain_content = Content


def test_counts_and_samples(original: Benchmark, content: Content) -> None:
    """The ids hold @ and dots and 193 names end in a bare dot: each lost one shrinks the gallery."""
    assert counts_of(original) == {"train": (8362, 8362), "val": (1065, 1065), "test": (1004, 1004)}
    captions = captions_of(original)
    assert captions["10052357@N03_7585070382_5762149bfc"] == ("swimmers dive into the water.",)
    assert captions["24964321@N00_2560645056_0edfa52a71"] == (
        "1st time people turn around. lady walks in front of the stage from left to right the dancers all "
        "turn around.",
    )
    assert captions == {
        without_ending(name): (with_single_blanks(" ".join(texts)),)
        for videos in content.paragraphs.values()
        for name, texts in videos.items()
    }
    assert {(row.start_s, row.end_s) for row in original.manifest.rows} == {(0.0, 31.0)}
    assert not any("\n" in text for texts in captions.values() for text in texts)


def test_what_is_not_as_published_is_said(original: Benchmark, content: Content) -> None:
    """30 train videos have no caption in any file here, and the annotations have more than the lists."""
    assert original.manifest.protocol == (
        "paragraphs, lists of Collaborative Experts; not as published: train 8362 videos for 8392, "
        "8362 captions for 8392"
    )
    found = deviations_of(original)
    labelled = {row["video_path"].rsplit("/", 1)[1] for row in content.labels["train"]}
    silent = {without_ending(name) for name in content.lists["train"] if name not in labelled}
    assert len(silent) == 30
    assert set(found["train videos without sentences, left out"]) == silent
    for split, number in (("val", 29), ("test", 33)):
        strangers = {entry["video"] for entry in content.data[split]} - set(content.lists[split])
        assert len(strangers) == number
        what = f"{split} videos with sentences that the list does not name, left out"
        assert set(found[what]) == strangers


def test_a_video_under_two_names_keeps_the_listed_one(original: Benchmark) -> None:
    """Some annotations stand under .mp4 and under .avi: joining both makes a paragraph that nobody has."""
    assert captions_of(original)["10175347@N00_4841555141_4eeb6a515a"] == (
        "someone pets the baby's head the baby puts his head on the rail.",
    )


def test_both_forms_of_the_annotations_agree(content: Content, folder: Path, tmp_path: Path) -> None:
    """Test from the label table and test from the original sentences are the same benchmark."""
    labels = {**content.texts, **content.label_texts}
    found = read(BENCHMARK, write(tmp_path, labels))
    assert counts_of(found) == {"train": (8362, 8362), "val": (1062, 1062), "test": (1004, 1004)}
    whole = captions_of(read(BENCHMARK, folder))
    assert captions_of(found).items() <= whole.items()


def _windows(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    files: dict[str, Any] = {
        name: "\ufeff" + text.replace("\n", "\r\n") for name, text in content.texts.items()
    }
    files["didemo_train_label.csv"] = content.label_texts["didemo_train_label.csv"].replace("\r\n", "\n")
    for split, entries in content.data.items():
        files[f"{split}_data.json"] = "\ufeff" + json.dumps(entries, indent=1).replace("\n", "\r\n")
    return files


def _tabs(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    header = ["text", "video_path", "more"]
    rows = [(row["text"], row["video_path"].replace("/", "\\"), "1") for row in content.labels["train"]]
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    lists = {
        f"{split}_list.csv": as_table(["video"], [(name,) for name in names], end="\r\n")
        for split, names in content.lists.items()
    }
    return {
        **lists,
        "didemo_train_label.csv.gz": as_table(header, shuffled, "\t", "\r\n"),
        **{f"{split}_data.jsonl": as_lines(entries) for split, entries in content.data.items()},
    }


def _converted(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    # All videos made mp4, sentences as a list: one file a split, in the order of nobody.
    files = {}
    for split, videos in content.paragraphs.items():
        entries = [
            {"caption": texts, "video": f"{without_ending(name)}.mp4"} for name, texts in videos.items()
        ]
        files[f"didemo_ret_{split}.json"] = [entries[i] for i in rng.permutation(len(entries))]
    return files


def _converted_beside_lists(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    rows = {
        split: [(without_ending(name), with_single_blanks(" ".join(texts))) for name, texts in videos.items()]
        for split, videos in content.paragraphs.items()
    }
    tables = {f"DiDeMo_{split}.tsv": as_table(["video_id", "caption"], rows[split], "\t") for split in SPLITS}
    return {**content.texts, **tables}


@pytest.mark.parametrize("copy", [_windows, _tabs, _converted, _converted_beside_lists])
def test_copies_in_other_forms_are_the_same_benchmark(
    copy: Copy, content: Content, original: Benchmark, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Who has the files from elsewhere must train on and be scored on the very same data."""
    assert_same_benchmark(original, write(tmp_path, copy(content, rng)))


def test_annotations_without_their_list_are_refused(content: Content, tmp_path: Path) -> None:
    """33 test videos have two names with other sentences: joined, they are paragraphs of nobody."""
    files = _windows(content, np.random.default_rng(0))
    del files["test_list.txt"]
    with pytest.raises(DataError, match=r"under two names, and no list .* \(33\).*test_list.txt"):
        read(BENCHMARK, write(tmp_path, files))


def test_one_file_with_all_splits(content: Content, original: Benchmark, tmp_path: Path) -> None:
    """Some hand out one file: its own splits are those of the benchmark, or it is refused."""
    tree = {
        split: [{"video": name, "caption": texts} for name, texts in videos.items()]
        for split, videos in content.paragraphs.items()
    }
    found = read(BENCHMARK, write(tmp_path, {"didemo.json": tree}))
    assert found.manifest.fingerprint == original.manifest.fingerprint


def test_a_split_without_sentences_is_refused(content: Content, tmp_path: Path) -> None:
    """A list alone has nothing to search with."""
    with pytest.raises(DataError, match=r"no sentences of train.*train_data.json"):
        read(BENCHMARK, write(tmp_path, dict(content.texts)))
