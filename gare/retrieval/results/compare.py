"""Comparison of two runs on the same queries: differences of metrics, and of ranks by query.

Q queries, B resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from gare.retrieval.ranking.bootstrap import NAMES, Interval, percentile_interval, resampled_metrics
from gare.retrieval.ranking.metrics import rank_summary
from gare.retrieval.results.queries import DIRECTIONS, QueryTable, require_same_queries


@dataclass(frozen=True)
class Difference:
    """One metric of two runs, and its difference.

    Attributes:
        first: its value in the first run.
        second: its value in the second run.
        difference: second minus first.
        interval: range of 95 % of the resampled differences.
        p_value: two-sided, at most 1: twice the smaller of two shares of the resamples, that with a
            difference not above 0 and that with one not below 0. The data themselves count as one resample.
    """

    first: float
    second: float
    difference: float
    interval: Interval
    p_value: float


def compare_runs(
    first: QueryTable, second: QueryTable, *, resamples: int = 10_000, seed: int = 0
) -> dict[str, Difference]:
    """Computes differences of all metrics, by name, with a bootstrap of the same queries for both runs.

    Queries that are hard for both runs cancel out, so the interval of the difference is narrower than those
    of the two values would suggest. Videos are drawn with all their captions, see ``bootstrap``.

    Args:
        first: the run to compare with.
        second: the run to compare.
        resamples: B.
        seed: of the draws.

    Raises:
        DataError: for runs whose queries or galleries differ, naming what differs.
    """
    require_same_queries(first, second)
    found = {}
    for direction in DIRECTIONS:
        tables = [table.of_direction(direction) for table in (first, second)]
        if not len(tables[0]):
            continue
        values, drawn = [], []
        for table in tables:
            ranks, videos = table["rank"].to_numpy(), table["video_id"].to_numpy()
            values.append(point_metrics(ranks))
            drawn.append(resampled_metrics(ranks, videos, resamples=resamples, seed=seed))
        moved = drawn[1] - drawn[0]
        for at, name in enumerate(NAMES):
            found[f"{direction}/{name}"] = Difference(
                values[0][at],
                values[1][at],
                values[1][at] - values[0][at],
                percentile_interval(moved[:, at]),
                _p_value(moved[:, at]),
            )
    return found


def point_metrics(ranks: np.ndarray) -> list[float]:
    """Computes the metrics of ranks (Q,) in the order of ``NAMES``."""
    return list(rank_summary(torch.tensor(ranks, dtype=torch.float64), "").values())


def _p_value(moved: np.ndarray) -> float:
    not_above, not_below = ((1 + int(side.sum())) / (1 + len(moved)) for side in (moved <= 0, moved >= 0))
    return min(1.0, 2 * min(not_above, not_below))


def rank_changes(first: QueryTable, second: QueryTable) -> pa.Table:
    """Returns both runs' ranks of every query: the columns that name it, ``first``, ``second``, ``gain``.

    Gain is first minus second: positive if the second run ranks the right one higher. The table is sorted by
    gain, the greatest first.

    Raises:
        DataError: for runs whose queries or galleries differ, naming what differs.
    """
    require_same_queries(first, second)
    parts = []
    for direction in DIRECTIONS:
        mine, other = first.of_direction(direction), second.of_direction(direction)
        named = mine.select(["direction", "video_id", "caption_index", "caption"])
        ranks = mine["rank"].to_numpy(), other["rank"].to_numpy()
        for name, column in (("first", ranks[0]), ("second", ranks[1]), ("gain", ranks[0] - ranks[1])):
            named = named.append_column(name, pa.array(column))
        parts.append(named)
    return pa.concat_tables(parts).sort_by([("gain", "descending")])
