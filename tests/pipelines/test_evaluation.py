"""Evaluation on several workers, its tables of queries, and post-processed metrics beside the plain ones."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.layout import Layout
from gare.data.manifest import read_manifest
from gare.errors import GareError
from gare.retrieval.results.compare import compare_runs
from gare.retrieval.results.queries import read_queries
from gare.storage.lock import StoreLock
from pipelines import evaluate
from pipelines.evaluating import scoring
from tests.helpers.pipelines import in_process, snapshot, tiny


def test_actors_rank_as_one_process_does(
    trained: dict[str, Any], places: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pair counts once, so that numbers do not depend on the size of the cluster."""
    plain = trained["evaluation"]
    table = read_queries(plain["ranks"]["plain"])
    monkeypatch.setattr(scoring, "PAIRS_ALONE", 0)
    monkeypatch.setattr(scoring, "TASKS_ALONE", 0)
    switches = ("evaluate.dsl=true", "evaluate.qbnorm=true", "evaluate.qbnorm_bank=30")
    spread = evaluate.run(tiny(*switches, "cluster.num_cpus=2"))
    again = read_queries(spread["ranks"]["plain"])
    assert again.table.equals(table.table)
    assert {name: spread["metrics"][name] for name in plain["metrics"]} == plain["metrics"]
    assert {name: spread["intervals"][name] for name in plain["intervals"]} == plain["intervals"]
    others = set(spread["metrics"]) - set(plain["metrics"])
    names = ("R1", "R5", "R10", "R50", "MdR", "MnR")
    assert others == {f"{way}/{name}" for way in ("dsl/t2v", "dsl/v2t", "qbnorm/t2v") for name in names}
    monkeypatch.undo()
    monkeypatch.setattr(scoring, "TASKS_ALONE", 3)  # the bank's as well
    monkeypatch.setattr(scoring, "pool_of", pytest.fail)
    alone = evaluate.run(tiny(*switches))
    assert alone["metrics"] == spread["metrics"]
    for variant in ("plain", "dsl", "qbnorm"):
        tables = [read_queries(run["ranks"][variant]).table for run in (alone, spread)]
        assert tables[0].equals(tables[1]), variant
    # The shared result of the other tests is the plain one: a split this small starts no actor.
    monkeypatch.undo()
    monkeypatch.setattr(scoring, "pool_of", pytest.fail)
    assert evaluate.run(tiny())["metrics"] == plain["metrics"]


def test_table_of_queries_is_read_by_anything(trained: dict[str, Any], places: Layout) -> None:
    """People look for what failed with their own tools, and find it by the manifest's names."""
    evaluation = trained["evaluation"]
    table = pq.read_table(evaluation["ranks"]["plain"]).to_pylist()
    rows = {row.video_id: row for row in read_manifest(places.manifest).of_split("test")}
    texts = [row for row in table if row["direction"] == "t2v"]
    videos = [row for row in table if row["direction"] == "v2t"]
    assert (len(texts), len(videos)) == (50, 10)
    for row in texts:
        assert rows[row["video_id"]].captions[row["caption_index"]] == row["caption"]
        place = row["top_video_ids"].index(row["video_id"])
        assert row["top_scores"][place] == row["true_score"]
        assert row["top_scores"] == sorted(row["top_scores"], reverse=True)
        assert row["rank"] == pytest.approx(place + 1, abs=row["top_scores"].count(row["true_score"]))
    for direction, queries in (("t2v", texts), ("v2t", videos)):
        ranks = np.array([row["rank"] for row in queries])
        assert evaluation["metrics"][f"{direction}/R1"] == pytest.approx(100 * (ranks <= 1).mean())
        low, high = evaluation["intervals"][f"{direction}/MnR"]
        assert low <= evaluation["metrics"][f"{direction}/MnR"] <= high
    table = read_queries(evaluation["ranks"]["plain"])
    same = compare_runs(table, table, resamples=50)
    assert all(one.difference == 0 and one.p_value == 1 for one in same.values())


@pytest.mark.parametrize("flags", [(), ("--test-curve",)], ids=["split", "curve"])
def test_one_evaluation_at_a_time_writes(
    trained: dict[str, Any],
    places: Layout,
    flags: tuple[str, ...],
    tiny_yaml: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The files of two at once would be mixed: ranks of one, metrics of the other."""
    folder = places.test_curve("first") if flags else places.evaluation("first", "test")
    before = snapshot(folder)
    with StoreLock(f"{places.data}/evaluation-locks/first/{'test-curve' if flags else 'test'}"):
        refused = in_process(
            capsys,
            evaluate.run,
            "--config",
            tiny_yaml,
            *flags,
            "upkeep.when_locked=refuse",
            flags=evaluate.FLAGS,
        )
        refused.refused(3, "another job works here", f"process {os.getpid()}", "upkeep.when_locked=wait")
    assert snapshot(folder) == before


def test_an_evaluation_that_lost_its_lock_writes_nothing(
    trained: dict[str, Any], places: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that was suspended for hours must not write over what another one has made since."""
    before = snapshot(places.evaluation("first", "test"))
    rank = evaluate.rank

    def taken_over(*arguments: Any) -> Any:
        monkeypatch.setattr(StoreLock, "raise_if_lost", _lost)
        return rank(*arguments)

    monkeypatch.setattr(evaluate, "rank", taken_over)
    with pytest.raises(GareError, match="the lock was lost"):
        evaluate.run(tiny())
    assert snapshot(places.evaluation("first", "test")) == before


def _lost(lock: StoreLock) -> None:
    raise GareError("the lock was lost", where=lock.uri)
