"""A study: several settings and seeds by one command, continued where it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.layout import Layout
from cluster.tracking.client import client
from cluster.tracking.tracker import connect
from gare.storage.files import delete_tree
from gare.train.checkpoint.files import read_config
from pipelines import study
from tests.helpers.pipelines import in_process, tiny

STUDY = {
    "title": "Increment",
    "question": "Does it help?",
    "factors": {"model": {"baseline": {"model.increment": False}, "gare": {}}},
    "reference": {"factor": "model", "level": "baseline"},
    "common": {"train.epochs": 1},
    "seeds": [0, 1],
    "expected": {"gare": "better"},
}


def write_study(path: Path, **changes: object) -> str:
    path.write_text(yaml.safe_dump(STUDY | changes))
    return str(path)


@pytest.fixture(scope="module")
def study_yaml(root: Path) -> str:
    return write_study(root / "increment.yaml")


def test_a_study_is_run_interrupted_and_continued(
    benchmark: dict[str, Any],
    places: Layout,
    tiny_yaml: str,
    study_yaml: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It takes days, and what is done must neither be lost nor repeated."""
    one_worker = ("cluster.train_workers=1", "study.parallel=2")

    def command(*arguments: str) -> Any:
        arguments = ("--config", tiny_yaml, "--study", study_yaml, *one_worker, *arguments)
        return in_process(capsys, study.run, *arguments, flags=study.FLAGS)

    planned = command("--dry-run")
    assert planned.status == 0, planned.stderr
    assert "2 settings × 2 seeds = 4 runs, 4 left" in planned.stderr
    assert json.loads(planned.stdout)["seconds"] is None
    first = command("--seeds", "1")
    assert first.status == 0, first.stderr
    begun = json.loads(first.stdout)
    assert (begun["done"], begun["missing"]) == (2, [])
    run = Path(places.run("increment-gare-seed0"))
    before = (run / "result.json").stat().st_mtime_ns
    planned = command("--dry-run")
    assert "2 left" in planned.stderr
    assert json.loads(planned.stdout)["seconds"] > 0

    answer = command()
    assert answer.status == 0, answer.stderr
    result = json.loads(answer.stdout)
    assert (result["done"], result["missing"]) == (4, [])
    assert (run / "result.json").stat().st_mtime_ns == before
    (comparison,) = result["comparisons"]
    assert (comparison["setting"], comparison["against"]) == ("gare", "baseline")
    low, high = comparison["interval"]
    assert low <= comparison["difference"] <= high
    table = Path(result["table"]).read_text()
    assert table in answer.stderr
    for words in (
        "# Increment",
        "| baseline | 2 |",
        "| gare | 2 |",
        "| better |",
        "over both",
        "| false, hardest, % |",
    ):
        assert words in table
    assert Path(result["figure"]).read_bytes().startswith(b"\x89PNG")

    stored = client(connect(tiny().tracking, places.root).tracking_uri)
    parent = stored.get_run(result["mlflow_run_id"])
    assert result["mlflow_run_id"] == begun["mlflow_run_id"]
    assert 0 <= parent.data.metrics["gare/negatives/false_hardest/mean"] <= 100
    assert parent.data.metrics["gare/t2v/R1/difference"] == pytest.approx(comparison["difference"])
    child = json.loads((run / "run.json").read_text())["mlflow_run_id"]
    assert stored.get_run(child).data.tags["mlflow.parentRunId"] == parent.info.run_id

    refused = command("train.lr=0.1")
    refused.refused(2, "was run with other settings", "another name")
    # A run whose evaluation was deleted is made again, and nothing else.
    delete_tree(str(run / "evaluation-test"))
    assert json.loads(command("--dry-run").stdout)["left"] == ["increment-gare-seed0"]


def test_trainings_of_another_study_are_taken(
    benchmark: dict[str, Any],
    places: Layout,
    tiny_yaml: str,
    study_yaml: str,
    root: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Many studies have the same baseline, and a training may take a day."""
    again_yaml = write_study(
        root / "again.yaml",
        factors={
            "increment": {"none": {"model.increment": False}, "own": {"train.batch_size": 4}, "late": {}}
        },
        reference={"factor": "increment", "level": "none"},
        expected={},
        seeds=[0],
    )

    def command(file: str, *arguments: str) -> Any:
        arguments = ("--config", tiny_yaml, "--study", file, "cluster.train_workers=1", *arguments)
        return in_process(capsys, study.run, *arguments, flags=study.FLAGS)

    assert command(study_yaml, "--seeds", "1").status == 0
    taken = {level: f"increment-{name}-seed0" for level, name in (("none", "baseline"), ("late", "gare"))}
    before = {name: Path(places.run(name), "result.json").stat().st_mtime_ns for name in taken.values()}
    alone = command(again_yaml, "--dry-run", "study.reuse=false")
    assert json.loads(alone.stdout)["same"] == []
    planned = command(again_yaml, "--dry-run")
    assert "3 left, 2 of them trained already in other studies" in planned.stderr
    assert sorted(json.loads(planned.stdout)["same"]) == [f"again-{level}-seed0" for level in sorted(taken)]

    answer = command(again_yaml)
    assert answer.status == 0, answer.stderr
    result = json.loads(answer.stdout)
    assert (result["done"], result["missing"]) == (3, [])
    assert result["taken"] == {f"again-{level}-seed0": name for level, name in taken.items()}
    table = Path(result["table"]).read_text()
    assert "2 of 3 trainings were taken from other runs with the same settings and data: increment-b" in table
    assert "| late | 1 |" in table
    assert not Path(places.run("again-none-seed0")).exists()
    for name, time_of in before.items():
        assert Path(places.run(name), "result.json").stat().st_mtime_ns == time_of
    # They stay below the study that trained them, and this one is done, with or without other studies.
    stored = client(connect(tiny().tracking, places.root).tracking_uri)
    children = {
        name: stored.get_run(json.loads(Path(places.run(name), "run.json").read_text())["mlflow_run_id"])
        for name in (taken["none"], "again-own-seed0")
    }
    parents = {name: child.data.tags["mlflow.parentRunId"] for name, child in children.items()}
    assert parents["again-own-seed0"] == result["mlflow_run_id"] != parents[taken["none"]]
    assert json.loads(command(again_yaml, "--dry-run", "study.reuse=false").stdout)["left"] == []


def test_a_run_that_fails_is_named_and_the_others_are_kept(
    benchmark: dict[str, Any],
    places: Layout,
    tiny_yaml: str,
    root: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One setting that diverges must not cost the night."""
    huge = {"train.lr": 1e30, "train.clip_lr": 1e30, "train.start_from": ""}
    # The last is trained as what the others start from.
    factors = {
        "rate": {"usual": {}, "huge": huge, "first": {"model.increment": False, "train.start_from": ""}}
    }
    path = write_study(
        root / "diverging.yaml",
        factors=factors,
        reference={"factor": "rate", "level": "usual"},
        expected={},
        seeds=[0],
        common={"train.epochs": 1, "train.weight_decay": 0.1},
        start={"model.increment": False},
    )
    arguments = ("--config", tiny_yaml, "--study", path, "cluster.train_workers=1")
    answer = in_process(capsys, study.run, *arguments, flags=study.FLAGS)
    assert answer.status == 4, answer.stderr
    assert "1 of 4 runs failed: diverging-huge-seed0" in answer.stderr
    assert "NOT COMPLETE: 1 of 3 runs are missing" in answer.stderr
    assert "| usual | 1 |" in answer.stderr
    begun = read_config(places.run("diverging-usual-seed0") + "/best")
    assert begun.train.start_from == places.run("diverging-start-seed0") + "/best"
    assert not Path(places.run("diverging-first-seed0")).exists()


def test_no_study_is_named(tiny_yaml: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = in_process(capsys, study.run, "--config", tiny_yaml, flags=study.FLAGS)
    answer.refused(2, "study.file", "--study NAME")
