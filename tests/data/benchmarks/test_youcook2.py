"""gare/data/benchmarks/youcook2.py on the real files and on copies in other forms."""

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
    read,
    write,
)

BENCHMARK = "youcook2"


def plain_content(folder: Path) -> dict[str, Any]:
    return {name: json_of(folder, f"yc2_{name}.json") for name in ("train", "val")}


def test_counts_and_samples(original: Benchmark, content: dict[str, Any]) -> None:
    """Each sentence has a clip of its own; one clip of val is annotated twice and counts twice."""
    assert counts_of(original) == {"train": (10_337, 10_337), "val": (0, 0), "test": (3_492, 3_492)}
    assert original.manifest.protocol == "segments, test on val"
    row = next(row for row in original.manifest.rows if row.video_id == "v_GLd3aX16zBg#90-102")
    assert (row.start_s, row.end_s, row.split) == (90.0, 102.0, "train")
    assert row.captions == ("spread margarine on two slices of white bread",)
    captions = captions_of(original)
    assert captions["v_oJZUxU9szWA#120-252"] == (
        "soak gram and place water salt and turmeric powder in pressure cooker",
    )
    assert captions["v_oJZUxU9szWA#120-252~2"] == ("pressure cook the dal and grind",)
    assert deviations_of(original) == {
        "test clips with the start and end of another": ("v_oJZUxU9szWA#120-252~2",)
    }
    expected = sorted(
        (" ".join(text.split()), *map(float, time))
        for part in content.values()
        for video in part.values()
        for text, time in zip(video["sentences"], video["timestamps"], strict=True)
    )
    assert sorted((row.captions[0], row.start_s, row.end_s) for row in original.manifest.rows) == expected


def _official(content: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    database = {}
    for subset, part in (("training", content["train"]), ("validation", content["val"])):
        for name, video in part.items():
            segments = zip(video["timestamps"], video["sentences"], strict=True)
            database[name[2:]] = {
                "duration": video["duration"],
                "subset": subset,
                "recipe_type": "107",
                "annotations": [
                    {"segment": time, "id": number, "sentence": text}
                    for number, (time, text) in enumerate(segments)
                ],
                "video_url": f"https://www.youtube.com/watch?v={name[2:]}",
            }
    return {"youcookii_annotations_trainval.json": {"database": database}}


def _rows(content: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {
        f"youcook_{name}.csv": as_table(
            ["video_id", "start", "end", "text"],
            [
                (f"{key}.mkv", str(float(start)), str(end), text)
                for key, video in part.items()
                for (start, end), text in zip(video["timestamps"], video["sentences"], strict=True)
            ],
            "\t",
            "\r\n",
        )
        for name, part in content.items()
    }


def _lines(content: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {
        f"yc2_{name}.jsonl.gz": as_lines(
            {"end": end, "caption": text, "start": start, "video": key[2:]}
            for key, video in part.items()
            for (start, end), text in zip(video["timestamps"], video["sentences"], strict=True)
        )
        for name, part in content.items()
    }


@pytest.mark.parametrize("copy", [_official, _rows, _lines])
def test_copies_in_other_forms_are_the_same_benchmark(
    copy: Copy, content: dict[str, Any], original: Benchmark, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Who has the files from elsewhere must train on and be scored on the very same data."""
    assert_same_benchmark(original, write(tmp_path, copy(content, rng)))


def test_times_that_run_backwards_are_turned_round(content: dict[str, Any], tmp_path: Path) -> None:
    """A clip from 102 s to 90 s cannot be decoded; turned round it is the one that was meant."""
    name = "v_GLd3aX16zBg"
    video = content["train"][name]
    turned = {**video, "timestamps": [[102, 90], *video["timestamps"][1:]]}
    late = {**video, "timestamps": [*video["timestamps"][:-1], [173, 999]]}
    for changed, what in (
        (turned, "train videos with a time that runs backwards, turned round"),
        (late, "train videos with a time after the end of the video, where its clip ends"),
    ):
        files = {"yc2_train.json": {**content["train"], name: changed}, "yc2_val.json": content["val"]}
        found = read(BENCHMARK, write(tmp_path / what[:30], files))
        assert deviations_of(found)[what] == (name,)
        assert f"{name}#90-102" in captions_of(found)


def test_times_that_are_none_are_refused(content: dict[str, Any], tmp_path: Path) -> None:
    """A sentence without its segment would be searched in the whole video."""
    video = {**content["train"]["v_GLd3aX16zBg"], "timestamps": [[90, "later"]]}
    files = {"yc2_train.json": {"v_GLd3aX16zBg": video}, "yc2_val.json": content["val"]}
    with pytest.raises(DataError, match="not a start and an end in seconds"):
        read(BENCHMARK, write(tmp_path, files))
