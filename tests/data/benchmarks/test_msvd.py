"""gare/data/benchmarks/msvd.py on the real files and on copies in other forms."""

from __future__ import annotations

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
    text_of,
    write,
)

BENCHMARK = "msvd"
SPLITS = ("train", "val", "test")


class Content:
    """The benchmark, read the plain way."""

    def __init__(self, folder: Path) -> None:
        self.lists = {split: lines_of(folder, f"{split}_list.txt") for split in SPLITS}
        self.captions: dict[str, list[str]] = json_of(folder, "captions_msvd.json")
        words = text_of(folder, "youtube_mapping.txt").split()
        self.number = dict(zip(words[::2], words[1::2], strict=True))
        self.texts = {f"{split}_list.txt": text_of(folder, f"{split}_list.txt") for split in SPLITS}

    def pairs(self) -> list[tuple[str, str]]:
        return [(name, text) for name, texts in self.captions.items() for text in texts]


plain_content = Content


def test_counts_and_samples(original: Benchmark, content: Content) -> None:
    """Every caption of a test video is a query, so that lost or merged ones change the score."""
    assert counts_of(original) == {"train": (1200, 48_774), "val": (100, 4_290), "test": (670, 27_763)}
    assert original.manifest.protocol == "1,200/100/670 videos, all captions"
    assert original.summary()["as_published"] is True
    assert original.annotations.deviations == ()
    captions = captions_of(original)
    assert "a squirrel is eating a peanut in it s shell" in captions["-4wsuPCjDBc_5_15"]
    assert len(captions["-4wsuPCjDBc_5_15"]) == 29
    assert len(captions["UXs3eq68ZjE_250_255"]) == 32
    # Said twice of the same video, and kept twice.
    assert captions["UXs3eq68ZjE_250_255"].count("a person pours water and rice into a pot") > 1
    assert captions == {name: tuple(sorted(texts)) for name, texts in content.captions.items()}
    assert sum(name.startswith("-") for name in captions) == 46
    assert sum(name.startswith("_") for name in captions) == 33


def _windows(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    lists = {f"MSVD_{name}": "\ufeff" + text.replace("\n", "\r\n") for name, text in content.texts.items()}
    return {
        **lists,
        "MSVD_captions.jsonl": as_lines({name: texts} for name, texts in content.captions.items()),
    }


def _corpus(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    pairs = content.pairs()
    shuffled = [pairs[i] for i in rng.permutation(len(pairs))]
    lines = "".join(f"{name} {text}\n" for name, text in shuffled)
    return {**content.texts, "AvailableCorpus.txt": f"# all descriptions\n#\n\n{lines}"}


def _words(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    # What raw-captions.pkl holds, written out as JSON: each caption is a list of words.
    words = {name: [text.split() for text in texts] for name, texts in content.captions.items()}
    lists = {
        f"{split}_list.csv": as_table(["video"], [(f"{name}.avi",) for name in names])
        for split, names in content.lists.items()
    }
    return {**lists, "raw-captions.json.gz": words}


def _split_files(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    return {
        f"msvd_ret_{split}.json": [
            {"video": f"YouTubeClips/{name}.avi", "caption": content.captions[name]}
            for name in reversed(names)
        ]
        for split, names in content.lists.items()
    }


def _numbers(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    files: dict[str, Any] = {
        "youtube_mapping.txt": "\r\n".join(f"{name} {number}" for name, number in content.number.items())
    }
    for split, names in content.lists.items():
        rows = [(content.number[name], text) for name in names for text in content.captions[name]]
        files[f"sents_{split}_lc_nopunc.txt"] = "".join(f"{name}\t{text}\n" for name, text in rows)
        files[f"{split}_list.json"] = [content.number[name] for name in names]
    return files


def _table(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    header = ["VideoID", "Start", "End", "WorkerID", "Source", "AnnotationTime", "Language", "Description"]
    rows = []
    for name, text in content.pairs():
        video, start, end = name.rsplit("_", 2)
        rows.append((video, start, end, "7", "clean", "55", "English", text))
        if len(rows) % 1000 == 1:
            rows.append((video, start, end, "8", "clean", "9", "German", "ein Hund läuft"))
    return {**content.texts, "MSR Video Description Corpus.csv": as_table(header, rows)}


def _one_table(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    rows = [
        (split, name, text)
        for split, names in content.lists.items()
        for name in names
        for text in content.captions[name]
    ]
    return {"msvd.tsv": as_table(["Split", "video", "caption"], rows, "\t", "\r\n")}


@pytest.mark.parametrize("copy", [_one_table, _windows, _corpus, _words, _split_files, _numbers, _table])
def test_copies_in_other_forms_are_the_same_benchmark(
    copy: Copy, content: Content, original: Benchmark, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Who has the files from elsewhere must train on and be scored on the very same data."""
    assert_same_benchmark(original, write(tmp_path, copy(content, rng)))


def test_a_pickle_is_not_opened(content: Content, tmp_path: Path) -> None:
    """A pickle from the net can run any program; the user has to hear what is taken instead."""
    planted = b"cos\nsystem\n(S'touch %s'\ntR." % str(tmp_path / "ran").encode()
    files = {**content.texts, "raw-captions.pkl": planted}
    with pytest.raises(DataError, match=r"raw-captions.pkl is not opened.*captions_msvd.json"):
        read(BENCHMARK, write(tmp_path / "annotations", files))
    assert not (tmp_path / "ran").exists()


def test_videos_without_captions_and_without_list(content: Content, tmp_path: Path) -> None:
    """A train video that lost its captions is named; a test video without any makes another benchmark."""
    lost, kept = content.lists["train"][0], dict(content.captions)
    del kept[lost]
    kept["abcdefghijk_1_2"] = ["a dog runs"]
    found = read(BENCHMARK, write(tmp_path / "train", {**content.texts, "captions_msvd.json": kept}))
    assert deviations_of(found) == {
        "listed videos without captions, left out": (lost,),
        "videos with captions that no list names, left out": ("abcdefghijk_1_2",),
    }
    assert "not as published: train 1199 videos for 1200" in found.manifest.protocol
    del kept[content.lists["test"][0]]
    with pytest.raises(DataError, match=f"669 videos for 670.*{content.lists['test'][0]}"):
        read(BENCHMARK, write(tmp_path / "test", {**content.texts, "captions_msvd.json": kept}))


def test_without_val(content: Content, tmp_path: Path) -> None:
    """Copies with train and test alone can be trained and tested on; that there is no val is said."""
    files = _split_files(content, np.random.default_rng(0))
    del files["msvd_ret_val.json"]
    found = read(BENCHMARK, write(tmp_path, files))
    assert found.manifest.protocol == "1,200/100/670 videos, all captions; not as published: no val"


def test_numbers_without_their_mapping(content: Content, tmp_path: Path) -> None:
    """vid1 alone says nothing: guessing which video it is could mix all of them up."""
    files = _numbers(content, np.random.default_rng(0))
    del files["youtube_mapping.txt"]
    with pytest.raises(DataError, match=r"not a video of the benchmark \(1200\): 'vid"):
        read(BENCHMARK, write(tmp_path, files))
