"""Two runs are compared on the same queries, or not at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gare.data.manifest import ManifestRow
from gare.errors import DataError
from gare.retrieval.ranking.grid import Grid
from gare.retrieval.ranking.ranks import rank_blocks
from gare.retrieval.ranking.scoring import MatrixBlocks
from gare.retrieval.results.compare import compare_runs, rank_changes
from gare.retrieval.results.queries import QueryTable, owners_of, query_table, read_queries, write_queries

NUM_VIDEOS = 120


def gallery(*, captions: int = 3, prefix: str = "v") -> list[ManifestRow]:
    return [
        ManifestRow(
            f"{prefix}{index:03}",
            "/x.mp4",
            None,
            None,
            "test",
            tuple(f"{index} {at}" for at in range(captions)),
        )
        for index in range(NUM_VIDEOS)
    ]


def run_of(rows: list[ManifestRow], rng: np.random.Generator, strength: float) -> QueryTable:
    """A run whose scores see the right video through noise."""
    owners = owners_of(rows)
    scores = torch.from_numpy(rng.standard_normal((len(owners), len(rows)))).float()
    scores[torch.arange(len(owners)), owners] += strength
    return query_table(
        rank_blocks(MatrixBlocks(scores), Grid.of(owners, len(rows)))[""], rows, {"split": "test"}
    )


def test_a_better_run_is_found_better(rng: np.random.Generator) -> None:
    """What the comparison is for: to tell an improvement from chance, and its sign from its opposite."""
    rows = gallery()
    weak, strong = run_of(rows, rng, 1.0), run_of(rows, rng, 3.5)
    found = compare_runs(weak, strong, resamples=500)
    assert set(found) == {
        f"{way}/{name}" for way in ("t2v", "v2t") for name in ("R1", "R5", "R10", "R50", "MdR", "MnR")
    }
    recall = found["t2v/R1"]
    assert recall.difference == pytest.approx(recall.second - recall.first)
    assert 0 < recall.interval.low <= recall.difference <= recall.interval.high
    assert recall.p_value < 0.05
    assert found["t2v/MnR"].interval.high < 0
    back = compare_runs(strong, weak, resamples=500)["t2v/R1"]
    assert (back.interval.low, back.interval.high) == pytest.approx(
        (-recall.interval.high, -recall.interval.low)
    )


def test_pairing_narrows_the_interval(rng: np.random.Generator) -> None:
    """Two runs that agree on most queries differ for sure where their separate intervals overlap."""
    rows = gallery(captions=1)
    first = run_of(rows, rng, 2.0)
    ranks = first.table["rank"].to_numpy().copy()
    # The second run is one rank worse wherever the first was right.
    ranks[ranks == 1] = 1.5
    at = first.table.schema.get_field_index("rank")
    second = dataclasses.replace(
        first, table=first.table.set_column(at, first.table.schema.field(at), pa.array(ranks))
    )
    moved = compare_runs(first, second, resamples=500)["t2v/MnR"]
    right = float((first.of_direction("t2v")["rank"].to_numpy() == 1).mean())
    assert moved.difference == pytest.approx(0.5 * right)
    assert 0 < moved.interval.low < moved.interval.high < 0.5


def test_changes_query_by_query(rng: np.random.Generator) -> None:
    """A person looks at the queries that were won and lost; they must be the same query on both sides."""
    rows = gallery()
    first, second = run_of(rows, rng, 1.0), run_of(rows, rng, 2.0)
    shuffled = dataclasses.replace(second, table=second.table.take(rng.permutation(len(second.table))))
    table = rank_changes(first, shuffled)
    assert len(table) == 4 * NUM_VIDEOS
    gains = table["gain"].to_numpy()
    assert (np.diff(gains) <= 0).all()
    key = ("direction", "video_id", "caption_index")
    sides = [
        {tuple(row[name] for name in key): row["rank"] for row in run.table.to_pylist()}
        for run in (first, second)
    ]
    for row in table.to_pylist():
        name = tuple(row[part] for part in key)
        assert (row["first"], row["second"]) == (sides[0][name], sides[1][name])
        assert row["gain"] == row["first"] - row["second"]


def test_tables_keep_what_was_written(rng: np.random.Generator, tmp_path: Path) -> None:
    """The file is the evaluation's memory: every column comes back, with what was evaluated."""
    table = run_of(gallery(), rng, 1.0)
    uri = str(tmp_path / "ranks.parquet")
    write_queries(table, uri)
    back = read_queries(uri)
    assert back.table.equals(table.table)
    assert back.about == table.about
    assert back.about["split"] == "test"
    assert pq.read_table(uri).column_names == table.table.column_names


def test_other_queries_are_refused(rng: np.random.Generator) -> None:
    """A difference over other questions is none, however small its p-value."""
    rows = gallery()
    first = run_of(rows, rng, 1.0)
    with pytest.raises(DataError, match=r"galleries differ.*only the first asks t2v v000 caption 0, .* more"):
        compare_runs(first, run_of(gallery(prefix="w"), rng, 1.0))
    fewer = [dataclasses.replace(rows[0], captions=rows[0].captions[:2]), *rows[1:]]
    with pytest.raises(DataError, match="only the first asks t2v v000 caption 2 "):
        compare_runs(first, run_of(fewer, rng, 1.0))
    reworded = [dataclasses.replace(rows[0], captions=("new", *rows[0].captions[1:])), *rows[1:]]
    with pytest.raises(DataError, match="of other wording are t2v v000 caption 0 "):
        compare_runs(first, run_of(reworded, rng, 1.0))
    other = dataclasses.replace(first, about=first.about | {"split": "val"})
    with pytest.raises(DataError, match="split is 'test' and 'val'"):
        rank_changes(first, other)


def test_a_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    """The wrong path in a command must be said, not end in a trace."""
    with pytest.raises(DataError, match=r"run pipelines/evaluate\.py"):
        read_queries(str(tmp_path / "none.parquet"))
    pq.write_table(pa.table({"rank": [1.0]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="schema"):
        read_queries(str(tmp_path / "other.parquet"))
