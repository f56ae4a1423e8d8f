"""gare/data/noise.py: captions of train that are another video's, as studies of robustness need them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from gare.data.manifest import Manifest, ManifestRow, read_manifest, write_manifest
from gare.data.noise import count_noisy, draw_exchange, exchange_captions, with_noise
from gare.errors import ConfigError, DataError


def manifest_of(rng: np.random.Generator, *, videos: int = 30, most: int = 6) -> Manifest:
    """Videos of all splits with one to ``most`` captions each, every text once."""
    splits = ["train"] * videos + ["val"] * 5 + ["test"] * 5
    rows = tuple(
        ManifestRow(
            f"v{number}",
            f"/v{number}.mp4",
            None,
            None,
            split,
            tuple(f"text {at} of {number}" for at in range(int(rng.integers(1, most + 1)))),
        )
        for number, split in enumerate(splits)
    )
    return Manifest(rows, "folder", "own split")


def owner_of(text: str) -> str:
    return "v" + text.split()[-1]


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.99])
def test_each_chosen_caption_is_another_videos(fraction: float, rng: np.random.Generator) -> None:
    """A caption that stays, is lost or doubled makes the noise other than the table says."""
    for seed in range(40):
        clean = manifest_of(rng)
        noisy = with_noise(clean, fraction, seed)
        total = clean.counts["train"]["captions"]
        assert count_noisy(noisy.rows) == int(total * fraction + 0.5)
        for before, after in zip(clean.rows, noisy.rows, strict=True):
            assert replace(after, captions=before.captions, noisy=()) == before
            assert len(after.captions) == len(before.captions) == len(after.noisy)
            for text, mark, own in zip(after.captions, after.noisy, before.captions, strict=True):
                assert (owner_of(text) != after.video_id) == mark
                assert mark or text == own
        texts = [Counter(text for row in one.rows for text in row.captions) for one in (clean, noisy)]
        assert texts[0] == texts[1]
        others = [[row for row in one.rows if row.split != "train"] for one in (clean, noisy)]
        assert [row.captions for row in others[0]] == [row.captions for row in others[1]]
        assert count_noisy(others[1]) == 0
        assert noisy.protocol == f"own split; {100 * fraction:g} % noise, seed {seed}"


def test_a_draw_follows_from_the_seed_alone(rng: np.random.Generator) -> None:
    """Baseline and GARE must see the same noise, on each machine, however the annotations are ordered."""
    clean = manifest_of(rng)
    noisy = with_noise(clean, 0.4, 3)
    turned = replace(clean, rows=clean.rows[::-1])
    assert with_noise(turned, 0.4, 3).rows == noisy.rows[::-1]
    assert with_noise(clean, 0.4, 4).rows != noisy.rows


def test_less_noise_is_a_part_of_more(rng: np.random.Generator) -> None:
    """Levels of noise then differ in the added captions, not in which ones are hit."""
    clean = manifest_of(rng)
    less, more = (
        {
            (row.video_id, at)
            for row in with_noise(clean, level, 0).rows
            for at, mark in enumerate(row.noisy)
            if mark
        }
        for level in (0.2, 0.4)
    )
    assert less < more


def test_texts_that_several_videos_have(rng: np.random.Generator) -> None:
    """A caption of another video that says what its own says is no noise, and common in MSR-VTT."""
    words = ("a man sings", "a dog runs", "a cat sleeps", "people dance", "a car drives", "somebody cooks")
    rows = tuple(
        ManifestRow(f"v{n}", f"/v{n}.mp4", None, None, "train", tuple(rng.choice(words, 2, replace=False)))
        for n in range(60)
    )
    for seed in range(10):
        for before, after in zip(rows, exchange_captions(rows, draw_exchange(rows, 0.4, seed)), strict=True):
            for text, mark in zip(after.captions, after.noisy, strict=True):
                assert not mark or text not in before.captions


def test_noise_that_cannot_be_drawn(rng: np.random.Generator) -> None:
    """Less noise than was asked for, without a word, would be a wrong table."""
    big = ManifestRow("big", "/b.mp4", None, None, "train", tuple(f"text {n}" for n in range(9)))
    small = [ManifestRow(f"s{n}", "/s.mp4", None, None, "train", (f"small {n}",)) for n in range(3)]
    with pytest.raises(ConfigError, match=r"data\.noise: is 0\.9, and of the 11 .* of one video, 'big'"):
        draw_exchange((big, *small), 0.9, 0)
    with pytest.raises(ConfigError, match="chooses none of 3 train captions"):
        draw_exchange(small, 0.1, 0)
    # Half of them can all go to the other half.
    even = (big, *(replace(small[0], video_id=f"e{n}", captions=(f"other {n}",)) for n in range(9)))
    assert count_noisy(exchange_captions(even, draw_exchange(even, 0.999, 0))) == 18


def test_the_marks_are_in_the_file(rng: np.random.Generator, tmp_path: Path) -> None:
    """Who looks at losses by caption needs to know which are noise; clean manifests stay as they were."""
    clean, location = manifest_of(rng), str(tmp_path / "manifest.parquet")
    noisy = with_noise(clean, 0.4, 0)
    write_manifest(noisy, location)
    again = read_manifest(location)
    assert again == noisy
    assert again.fingerprint == noisy.fingerprint != clean.fingerprint
    column = pq.read_table(location)["noisy"].to_pylist()
    assert column == [list(row.noisy) for row in noisy.rows]
    write_manifest(clean, location)
    assert "noisy" not in pq.read_schema(location).names


def test_marks_that_do_not_fit_are_refused(rng: np.random.Generator) -> None:
    """A row that says noise of val or of captions that it lacks was not written by prepare."""
    clean = manifest_of(rng)
    with pytest.raises(DataError, match="noise outside of train"):
        replace(clean, rows=(replace(clean.rows[-1], noisy=(True,) * len(clean.rows[-1].captions)),))
    with pytest.raises(DataError, match="noisy is not of the captions"):
        replace(clean, rows=(replace(clean.rows[0], noisy=(True,) * 9),))
