"""gare/data/benchmarks/activitynet.py on the real files and on copies in other forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gare.data.benchmarks.activitynet import youtube_name
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
    read,
    with_single_blanks,
    write,
)

BENCHMARK = "activitynet"


def plain_content(folder: Path) -> dict[str, Any]:
    """The two files of sentences, read the plain way."""
    return {name: json_of(folder, f"{name}.json") for name in ("train", "val_1")}


def test_counts_and_samples(original: Benchmark, content: dict[str, Any]) -> None:
    """Paragraphs of val_1 are the test set; sentences start with blanks and hold line breaks and accents."""
    assert counts_of(original) == {"train": (10_009, 10_009), "val": (0, 0), "test": (4_917, 4_917)}
    assert original.manifest.protocol == "paragraphs, test on val_1"
    captions = captions_of(original)
    assert captions["v_uqiMw7tQ1Cc"] == (
        "A weight lifting tutorial is given. The coach helps the guy in red with the proper body placement "
        "and lifting technique.",
    )
    assert captions["v_QOlSCBRmfWY"][0].startswith(
        "A young woman is seen standing in a room and leads into her dancing. The girl dances around the room"
    )
    assert "a man holds a piñata high above her head" in captions["v_M_LSDRzVN38"][0]
    assert "The monkey driving the speed boat is shown again." in captions["v_mIi5fkvHDAo"][0]
    assert captions == {
        name: (with_single_blanks(" ".join(video["sentences"])),)
        for part in content.values()
        for name, video in part.items()
    }
    assert all(row.start_s is None and row.end_s is None for row in original.manifest.rows)


def test_oddities_are_named(original: Benchmark, content: dict[str, Any]) -> None:
    """15 and 9 listed ids have no captions: left out by the published counts too, and said by id."""
    found = deviations_of(original)
    silent = found["train videos without sentences, left out"]
    assert len(silent) == 15
    assert {"v_1v5HE_Nm99g", "v_y_zFbT7xXKI"} <= set(silent)
    assert len(found["test videos without sentences, left out"]) == 9
    backwards = found["train videos with a time that runs backwards, which a paragraph does not use"]
    assert backwards == ("v_0bosp4-pyTM", "v_rhOtqArO-3Y")
    late = {
        name
        for name, video in content["val_1"].items()
        if any(max(pair) > video["duration"] for pair in video["timestamps"])
    }
    what = "test videos with a time after the end of the video, which a paragraph does not use"
    assert set(found[what]) == late


def test_ids_with_and_without_their_prefix() -> None:
    """YouTube's ids hold dashes and underscores, and one may itself start with v_."""
    assert youtube_name("v_--0edUL8zmA.mp4") == youtube_name("--0edUL8zmA") == "v_--0edUL8zmA"
    assert youtube_name("v_abcdefghi") == "v_v_abcdefghi"  # 11 signs: the prefix is the id's own
    assert youtube_name("videos/v__uOfIm1tFcI.mkv") == "v__uOfIm1tFcI"
    assert youtube_name("video7020") is None


def _windows(content: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {
        f"{name}.json": "\ufeff" + json.dumps(part, indent=1).replace("\n", "\r\n")
        for name, part in content.items()
    }


def _bare_ids(content: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    files = {}
    for name, part in content.items():
        keys = [list(part)[i] for i in rng.permutation(len(part))]
        files[f"{name}.jsonl.gz"] = as_lines({key[2:]: dict(reversed(part[key].items()))} for key in keys)
    return files


def _lists(content: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {
        f"anet_ret_{name}.json": [
            {"video": f"{key}.mp4", "caption": [text.strip() for text in video["sentences"]], "rank": 1}
            for key, video in part.items()
        ]
        for name, part in content.items()
    }


def _rows(content: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    # One row a sentence, as it comes out of a spreadsheet.
    files: dict[str, Any] = {}
    for name, part in content.items():
        rows = [(text, key, "7") for key, video in part.items() for text in video["sentences"]]
        files[f"activitynet_{name}.csv"] = as_table(["sentence", "Video ID", "worker"], rows, ";", "\r\n")
    return files


@pytest.mark.parametrize("copy", [_windows, _bare_ids, _lists, _rows])
def test_copies_in_other_forms_are_the_same_benchmark(
    copy: Copy, content: dict[str, Any], original: Benchmark, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Who has the files from elsewhere must train on and be scored on the very same data."""
    assert_same_benchmark(original, write(tmp_path, copy(content, rng)))


def test_val_2_is_not_val_1(folder: Path, content: dict[str, Any], tmp_path: Path) -> None:
    """val_2 has other sentences for fewer of the same videos: its scores are another benchmark's."""
    files = {"train.json": content["train"], "val_1.json": json_of(folder, "val_2.json")}
    with pytest.raises(DataError, match="4885 videos for 4917"):
        read(BENCHMARK, write(tmp_path, files))


def test_other_texts_under_the_same_ids_are_said(content: dict[str, Any], tmp_path: Path) -> None:
    """A test set whose texts were rewritten has the right counts and ids, and scores that compare to none."""
    changed = dict(content["val_1"])
    changed["v_uqiMw7tQ1Cc"] = {
        **changed["v_uqiMw7tQ1Cc"],
        "sentences": ["A man lifts weights.", "He rests."],
    }
    found = read(BENCHMARK, write(tmp_path, {"train.json": content["train"], "val_1.json": changed}))
    assert found.manifest.protocol == "paragraphs, test on val_1; not as published: test other texts"
