"""Intervals against a slow resampling by hand, and against what is known of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gare.errors import DataError
from gare.retrieval.ranking.bootstrap import NAMES, metric_intervals, resampled_metrics
from gare.retrieval.ranking.metrics import rank_summary


def test_resamples_are_metrics_of_drawn_videos(seed: int, rng: np.random.Generator) -> None:
    """The fast sums must be the metrics of queries that a person would draw and count."""
    video = rng.integers(0, 7, 25)
    ranks = rng.integers(1, 60, 25) / 2 + 0.5
    found = resampled_metrics(ranks, video, resamples=20, seed=seed)
    groups = [ranks[video == one] for one in np.unique(video)]
    again = np.random.default_rng(seed).integers(0, len(groups), (20, len(groups)))
    for row, drawn in zip(found, again, strict=True):
        some = torch.tensor(np.concatenate([groups[one] for one in drawn]))
        assert dict(zip(NAMES, row, strict=True)) == pytest.approx(
            {name.removeprefix("x/"): value for name, value in rank_summary(some, "x").items()}
        )


def test_intervals_repeat_and_do_not_depend_on_blocks(
    seed: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interval that changes when it is computed again tells two readers two things."""
    ranks, video = rng.integers(1, 99, 300), np.arange(300)
    whole = resampled_metrics(ranks, video, resamples=64, seed=seed)
    monkeypatch.setattr("gare.retrieval.ranking.bootstrap._BLOCK_NUMBERS", 1000)
    np.testing.assert_allclose(resampled_metrics(ranks, video, resamples=64, seed=seed), whole, rtol=1e-12)


def test_intervals_are_about_as_wide_as_theory_says(seed: int) -> None:
    """The width is that of a proportion over as many videos; captions of one video are not as many more."""
    ranks = np.repeat([1.0, 99.0], [300, 700])
    half = 100 * 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    alone = metric_intervals(ranks, np.arange(1000), "t2v", resamples=4000, seed=seed)["t2v/R1"]
    assert (alone.low, alone.high) == pytest.approx((30 - half, 30 + half), abs=0.6)
    # Five captions of each video that fail and succeed together.
    copies = metric_intervals(
        np.repeat(ranks, 5), np.arange(1000).repeat(5), "t2v", resamples=4000, seed=seed
    )["t2v/R1"]
    assert (copies.low, copies.high) == pytest.approx((30 - half, 30 + half), abs=0.6)


def test_bad_input_is_named() -> None:
    """An interval over nothing must not come out as one."""
    with pytest.raises(DataError, match="bootstrap"):
        resampled_metrics([], [], resamples=10, seed=0)
    with pytest.raises(DataError, match="0 resamples"):
        resampled_metrics([1.0], ["a"], resamples=0, seed=0)
