"""Differences between two settings over several seeds and the same queries, with intervals.

A score varies with the training's seed and with the queries that happen to be in the test split. Both are
samples: seeds of all seeds, videos (with all their captions) of all videos. The variance of a mean difference
over S seeds and Q queries in a crossed design is

    σ²_seed / S + σ²_query / Q + σ²_rest / (S·Q)

The variance of the seeds' means over S estimates the first and last term, the variance of the queries' means
over Q the second and last; so the last, estimated by what neither explains, is subtracted once.

S seeds, Q queries, V videos.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gare.errors import DataError

#: Share of intervals that hold the true difference.
LEVEL = 0.95
#: Share of studies that find a true difference as large as ``Effect.detectable``.
POWER = 0.8


@dataclass(frozen=True)
class Effect:
    """A paired difference of two settings in one measure.

    Attributes:
        difference: mean over the seeds of the second setting's value minus the first's.
        by_seed: the difference of each seed.
        error: standard error of the mean difference.
        freedom: degrees of freedom of the error.
        low: lower end of the interval.
        high: upper end of the interval.
        p_value: two-sided, of no difference.
        detectable: smallest true difference that a study of this error finds with probability ``POWER``, its
            p-value corrected for the number of comparisons.
        over_seeds: False for a single seed: interval and p-value then hold for this seed's two trainings and
            say nothing about others.
    """

    difference: float
    by_seed: tuple[float, ...]
    error: float
    freedom: float
    low: float
    high: float
    p_value: float
    detectable: float
    over_seeds: bool


def paired_effect(first: ArrayLike, second: ArrayLike, videos: ArrayLike, comparisons: int = 1) -> Effect:
    """Computes the difference of two settings' mean values, with its error over seeds and queries.

    Args:
        first: (S, Q) a value of each query by seed, such as 100 for a hit and 0 for a miss, or a rank.
        second: (S, Q) those of the other setting, for the same queries and seeds.
        videos: (Q,) the video of each query, as any values that identify videos.
        comparisons: number of comparisons of the study, on which ``detectable`` alone depends: p-values are
            corrected together, by ``holm``.

    Raises:
        DataError: for shapes that do not fit, or queries of fewer than two videos.
    """
    one, other = np.asarray(first, np.float64), np.asarray(second, np.float64)
    clusters, cluster = np.unique(np.asarray(videos), return_inverse=True)
    if one.ndim != 2 or one.shape != other.shape or one.shape[1:] != cluster.shape or len(clusters) < 2:
        raise DataError(
            f"values {one.shape} and {other.shape} of queries with {len(clusters)} videos",
            where="study",
            accepted="the same seeds and queries for both, of two videos or more",
        )
    moved = other - one
    num_seeds = len(moved)
    difference, by_seed, by_query = float(moved.mean()), moved.mean(axis=1), moved.mean(axis=0)
    of_queries = _cluster_variance(by_query, cluster, len(clusters))
    if num_seeds == 1:
        return _effect(difference, by_seed, of_queries, len(clusters) - 1, comparisons)
    of_seeds = float(by_seed.var(ddof=1)) / num_seeds
    rest = moved - by_query - by_seed[:, None] + difference
    of_rest = sum(_cluster_variance(row, cluster, len(clusters)) for row in rest)
    of_rest /= num_seeds * (num_seeds - 1)
    variance = max(of_seeds + of_queries - of_rest, of_seeds, of_queries)
    # Satterthwaite: the degrees of freedom of a sum of two independent estimates.
    shares = of_seeds**2 / (num_seeds - 1) + of_queries**2 / (len(clusters) - 1)
    freedom = variance**2 / shares if shares > 0 else float(len(clusters) - 1)
    return _effect(difference, by_seed, variance, freedom, comparisons)


def _cluster_variance(values: NDArray[np.float64], cluster: NDArray[np.intp], count: int) -> float:
    """Returns the variance of the mean of values that vary together within clusters."""
    sums = np.bincount(cluster, values - values.mean(), count)
    return float(count / (count - 1) * np.square(sums).sum() / len(values) ** 2)


def _effect(
    difference: float, by_seed: NDArray[np.float64], variance: float, freedom: float, comparisons: int
) -> Effect:
    from scipy import stats

    error = math.sqrt(variance)
    reach = float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * error
    if error > 0:
        p_value = float(2 * stats.t.sf(abs(difference) / error, freedom))
    else:
        p_value = 1.0 if difference == 0 else 0.0
    return Effect(
        difference,
        tuple(by_seed.tolist()),
        error,
        freedom,
        difference - reach,
        difference + reach,
        p_value,
        _found_with_power(freedom, comparisons) * error,
        len(by_seed) > 1,
    )


def _found_with_power(freedom: float, comparisons: int) -> float:
    """Returns the difference, in errors, that a t-test finds with probability ``POWER``.

    The p-value has to be below (1 − LEVEL) / comparisons, as Holm's method asks of the smallest one; of the
    others it asks less.
    """
    from scipy import optimize, stats

    reach = float(stats.t.isf((1 - LEVEL) / (2 * comparisons), freedom))
    # Between half of what is needed for certain and, for one degree of freedom, several times the reach.
    found = optimize.brentq(lambda far: stats.nct.sf(reach, freedom, far) - POWER, 0.5, 4 * reach)
    return float(found)


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects p-values for their number, by Holm's method.

    Rejecting those that are below α then rejects a true hypothesis with probability α at most.
    """
    order = np.argsort(p_values, kind="stable")
    corrected = [1.0] * len(p_values)
    highest = 0.0
    for place, at in enumerate(order.tolist()):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[at]))
        corrected[at] = highest
    return corrected
