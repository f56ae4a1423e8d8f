"""Confidence intervals of a metric: percentile bootstrap over the queries of a split.

Captions of one video succeed and fail together, and resampling single captions would make intervals too
narrow. So videos are resampled, each with all its captions, in both directions. The gallery stays as it is:
the interval says nothing about other galleries, seeds or trainings. Q queries, C videos, B resamples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gare.errors import DataError
from gare.retrieval.ranking.metrics import RECALL_DEPTHS

#: Names of the metrics of a direction, in the order of the columns of ``Resampled.values``.
NAMES = (*(f"R{depth}" for depth in RECALL_DEPTHS), "MdR", "MnR")
#: Numbers that a block of resamples holds at once.
_BLOCK_NUMBERS = 2_000_000


@dataclass(frozen=True)
class Interval:
    """A range that holds a given share of the resampled values.

    Attributes:
        low: its lower end.
        high: its upper end.
    """

    low: float
    high: float


def resampled_metrics(
    ranks: ArrayLike, video: ArrayLike, *, resamples: int, seed: int
) -> NDArray[np.float64]:
    """Computes the metrics of resampled queries, (B, 6) float64 in the order of ``NAMES``.

    The draws depend on the seed and the videos, not on the ranks: resamples of two runs on the same queries
    are paired.

    Args:
        ranks: (Q,) from 1.
        video: (Q,) the video of each query, as any values that identify videos.
        resamples: B.
        seed: of the draws.

    Raises:
        DataError: if there is no query or no resample, or if the shapes of ranks and videos differ.
    """
    ranks = np.asarray(ranks, np.float64)
    if ranks.ndim != 1 or not len(ranks) or np.shape(video) != ranks.shape or resamples < 1:
        raise DataError(
            f"{resamples} resamples of ranks {ranks.shape} with videos {np.shape(video)}",
            where="bootstrap",
            accepted="at least one resample of Q ranks, with the video of each",
        )
    clusters, cluster = np.unique(np.asarray(video), return_inverse=True)
    order = np.argsort(ranks, kind="stable")
    ordered, cluster_of = ranks[order], cluster[order]
    # Sums over each video's queries, which resampling weights: hits by depth, rank, queries.
    columns = [*(ranks <= depth for depth in RECALL_DEPTHS), ranks, np.ones_like(ranks)]
    sums = np.stack([np.bincount(cluster, column, len(clusters)) for column in columns], axis=1)
    found = []
    for times in _draws(len(clusters), len(ranks), resamples, seed):
        totals = times.astype(np.float64) @ sums
        count = totals[:, -1:]
        recalls, mean = 100 * totals[:, : len(RECALL_DEPTHS)] / count, totals[:, -2:-1] / count
        found.append(np.concatenate([recalls, _median(ordered, times[:, cluster_of]), mean], axis=1))
    return np.concatenate(found)


def _draws(num_videos: int, num_queries: int, resamples: int, seed: int) -> Iterator[NDArray[np.int32]]:
    """Counts how often each video is drawn, (b, C), for blocks of resamples."""
    rng = np.random.default_rng(seed)
    size = max(_BLOCK_NUMBERS // max(num_queries, num_videos), 1)
    for first in range(0, resamples, size):
        count = min(size, resamples - first)
        drawn = rng.integers(0, num_videos, (count, num_videos))
        drawn += np.arange(count)[:, None] * num_videos
        times = np.bincount(drawn.ravel(), minlength=count * num_videos)
        yield times.reshape(count, num_videos).astype(np.int32)


def _median(ordered: NDArray[np.float64], times: NDArray[np.int32]) -> NDArray[np.float64]:
    """Returns the mean of the two middle ranks, (b, 1), of sorted ranks (Q,) with multiplicities (b, Q)."""
    until = times.cumsum(axis=1, dtype=np.int32)
    last = until[:, -1]
    middle = [(until <= at[:, None]).sum(axis=1) for at in ((last - 1) // 2, last // 2)]
    medians: NDArray[np.float64] = (ordered[middle[0]] + ordered[middle[1]]) / 2
    return medians[:, None]


def percentile_interval(values: NDArray[np.float64], level: float = 0.95) -> Interval:
    """Returns the range between the outer percentiles of resampled values (B,)."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def metric_intervals(
    ranks: ArrayLike, video: ArrayLike, direction: str, *, resamples: int, seed: int
) -> dict[str, Interval]:
    """Computes 95 % intervals of a direction's metrics, by metric name.

    Args:
        ranks: (Q,) from 1.
        video: (Q,) the video of each query.
        direction: t2v or v2t, with the variant's prefix if it has one.
        resamples: 1,000 are enough for a first look, 10,000 for a paper.
        seed: of the draws.

    Raises:
        DataError: if the shapes of ranks and videos differ.
    """
    values = resampled_metrics(ranks, video, resamples=resamples, seed=seed)
    return {f"{direction}/{name}": percentile_interval(values[:, at]) for at, name in enumerate(NAMES)}
