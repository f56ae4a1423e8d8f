"""gare/data/benchmarks/lsmdc.py on the real files and on copies in other forms."""

from __future__ import annotations

from collections import Counter
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
    text_of,
    write,
)

BENCHMARK = "lsmdc"
NAME = "LSMDC16_challenge_1000_publictect.csv"


class Content:
    """The benchmark's two test files, read the plain way: no header, six fields, tabs; and JSON."""

    def __init__(self, folder: Path) -> None:
        self.text = text_of(folder, NAME)
        self.rows = [line.split("\t") for line in self.text.split("\n") if line]
        self.second_layout = json_of(folder, "lsmdc_mdata_test.json")


plain_content = Content


def test_counts_and_samples(original: Benchmark, content: Content) -> None:
    """The ids hold dots: cut at the last one, clips of a second would share a name."""
    assert counts_of(original) == {"train": (0, 0), "val": (0, 0), "test": (1000, 1000)}
    assert original.manifest.protocol == (
        "1,000 clips of the public test; not as published: no train; no val"
    )
    captions = captions_of(original)
    assert captions["3086_UGLY_TRUTH_00.23.23.000-00.23.28.886"] == (
        "SOMEONE stands below, hands on her hips.",
    )
    assert captions["3064_SPARKLE_2012_01.10.49.683-01.10.52.477"] == (
        "throws one last punch in the direction of the club.",
    )
    assert captions == {row[0]: (" ".join(row[5].split()),) for row in content.rows}
    repeated = Counter(text for texts in captions.values() for text in texts)
    assert sum(count > 1 for count in repeated.values()) == 5
    assert all(row.start_s is None and row.end_s is None for row in original.manifest.rows)


def _second_layout(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    return {"lsmdc_mdata_test.json": content.second_layout}


def _unquoted_commas(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    return {NAME: "\ufeff" + "\r\n".join(",".join(row) for row in content.rows)}


def _quoted(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    return {f"{NAME}.gz": as_table(None, content.rows, ";", "\r\n")}


def _header(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    header = ["sentence", "clip_id", "start_aligned"]
    return {"lsmdc_test.tsv": as_table(header, [(row[5], row[0], row[1]) for row in content.rows], "\t")}


def _lines(content: Content, rng: np.random.Generator) -> dict[str, Any]:
    entries = (
        {"video": f"{row[0].rsplit('_', 1)[0]}/{row[0]}.avi", "caption": row[5]}
        for row in reversed(content.rows)
    )
    return {"lsmdc_ret_test_1000.json": as_lines(entries)}


@pytest.mark.parametrize("copy", [_second_layout, _unquoted_commas, _quoted, _header, _lines])
def test_copies_in_other_forms_are_the_same_benchmark(
    copy: Copy, content: Content, original: Benchmark, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Who has the files from elsewhere must be scored on the very same data."""
    assert_same_benchmark(original, write(tmp_path, copy(content, rng)))


def test_train_and_val_where_people_have_them(content: Content, tmp_path: Path) -> None:
    """The lists of train repeat a clip for each of its sentences; quotes belong to the text there."""
    clip = "0001_American_Beauty_00.00.51.926-00.00.54.129"
    lines = [
        "\t".join((clip, *["00.00.51.926", "00.00.54.129"] * 2, text))
        for text in ('"No," SOMEONE says.', "He runs.")
    ]
    other = clip.replace("0001", "0002")
    files = {
        NAME: content.text,
        "LSMDC16_annos_training.csv": "\n".join(lines),
        "LSMDC16_annos_val.csv": "\t".join((other, *["00.00.51.926", "00.00.54.129"] * 2, "")),
    }
    found = read(BENCHMARK, write(tmp_path, files))
    assert captions_of(found)[clip] == ('"No," SOMEONE says.', "He runs.")
    assert deviations_of(found) == {"clips without a caption, left out": (other,)}
    assert "train 1 videos for 101079, 2 captions for 101079; no val" in found.manifest.protocol


def test_a_damaged_list_is_refused(content: Content, tmp_path: Path) -> None:
    """A list cut by a full disk must not become a smaller gallery."""
    with pytest.raises(DataError, match="999 videos for 1000"):
        read(BENCHMARK, write(tmp_path / "a", {NAME: "\n".join("\t".join(row) for row in content.rows[1:])}))
    with pytest.raises(DataError, match=r"not a video of the benchmark.*3086_UGLY"):
        read(BENCHMARK, write(tmp_path / "b", {NAME: f"{content.rows[0][0][:-4]}\tx\n"}))
