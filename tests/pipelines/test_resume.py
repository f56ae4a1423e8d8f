"""Runs that end before their time: killed, finished already, or asked for with other settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import psutil
import pytest

from cluster.layout import Layout
from cluster.tracking import resolve_tracking_uri
from gare.config import ModelConfig
from gare.config.run_settings import completed_settings
from gare.errors import ConfigError
from gare.storage.lock import StoreLock
from gare.train.checkpoint.files import MODEL, check_checkpoint
from pipelines import evaluate, train
from tests.helpers.pipelines import in_process, losses, tiny
from tests.helpers.waiting import wait_until


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """What a machine that loses power does to a process and all that it started."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=20)
    process.wait(20)


@pytest.mark.faults
def test_killed_run_continues_as_if_undisturbed(
    trained: dict[str, Any], places: Layout, repository: Path, root: Path, tiny_yaml: str
) -> None:
    """Hours of training must not be lost with a machine, nor come out otherwise because of it."""
    folder = Path(places.run("killed"))
    log = root / "killed.log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "pipelines/train.py", "--config", tiny_yaml, "train.run=killed"],
            cwd=repository,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        record = folder / "checkpoints" / "index.json"
        try:
            wait_until(record.exists, within_s=240, every_s=0.01, process=process, log=log)
        finally:
            kill_tree(process)
    assert not (folder / "result.json").exists(), "it was done before it could be killed"
    assert not Path(places.checkpoint("killed")).exists()
    before = json.loads((folder / "run.json").read_text())
    done = json.loads(record.read_text())[-1]["epoch"]
    assert 1 <= done < 8

    result = train.run(tiny("train.run=killed"))

    assert result["mlflow_run_id"] == before["mlflow_run_id"]
    assert losses(folder) == losses(places.run("first"))
    assert result["steps"] == trained["steps"]
    for key in ("loss", "best_epoch", "val/t2v/R1"):
        assert result[key] == trained[key]
    client = mlflow.MlflowClient(resolve_tracking_uri("sqlite:///mlflow.db", str(root)))
    run = client.get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    same_name = client.search_runs([run.info.experiment_id], "attributes.run_name = 'tiny/killed'")
    assert len(same_name) == 1
    recalls = client.get_metric_history(run.info.run_id, "val/t2v/R1")
    assert {entry.step for entry in recalls} == {3 * epoch for epoch in range(1, 9)}


def test_finished_run_gives_its_result_again(trained: dict[str, Any], places: Layout) -> None:
    """The same command twice must not train twice, with or without the tracking server."""
    history = Path(places.run("first"), "history.json")
    before = history.stat().st_mtime_ns
    result = train.run(tiny("tracking.uri=http://127.0.0.1:9", "extract.workers=1"))
    assert result == {key: value for key, value in trained.items() if key != "evaluation"}
    assert history.stat().st_mtime_ns == before


def test_a_damaged_best_is_named_and_made_again(
    trained: dict[str, Any],
    places: Layout,
    tiny_yaml: str,
    capsys: pytest.CaptureFixture[str],
    rng: np.random.Generator,
) -> None:
    """One flipped bit gives the scores of another model; the run that it was copied from is whole."""
    file = Path(trained["checkpoint"], MODEL)
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
    file.write_bytes(changed)
    refused = in_process(capsys, evaluate.run, "--config", tiny_yaml)
    refused.refused(3, str(file), "is not as it was written", "train command makes best/ again")
    again = train.run(tiny())
    assert again["mlflow_run_id"] == trained["mlflow_run_id"]
    assert file.read_bytes() == whole
    check_checkpoint(trained["checkpoint"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lr=0.5", ("train.lr was 0.001, is 0.5", "train.overwrite=true")),
        ("model.increment=false", ("model.increment was True, is False",)),
        ("train.resume=false", ("train.resume is false",)),
    ],
)
def test_name_of_another_run_is_refused(
    override: str,
    words: tuple[str, ...],
    trained: dict[str, Any],
    tiny_yaml: str,
    places: Layout,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Continuing with other settings would give a run that nobody can describe."""
    answer = in_process(capsys, train.run, "--config", tiny_yaml, override)
    answer.refused(2, places.run("first"), *words)
    assert Path(trained["checkpoint"]).exists()


def test_what_computes_nothing_may_change(trained: dict[str, Any], places: Layout) -> None:
    """Also where an earlier version wrote it down as part of the run."""
    record = Path(places.run("first")) / "run.json"
    written = record.read_text()
    earlier = json.loads(written)
    earlier["settings"]["upkeep"] = {"when_locked": "wait"}
    try:
        record.write_text(json.dumps(earlier))
        again = train.run(tiny("upkeep.when_locked=refuse", "upkeep.part_mb=7"))
    finally:
        record.write_text(written)
    assert again["mlflow_run_id"] == trained["mlflow_run_id"]


def test_a_run_of_an_earlier_version_continues(trained: dict[str, Any], places: Layout) -> None:
    """Its record lacks the keys that came later, whose defaults are what it did; other values are refused."""
    record = Path(places.run("first")) / "run.json"
    written = record.read_text()
    earlier = json.loads(written)
    for section, key in (("train", "schedule_epochs"), ("model", "query"), ("loss", "positives")):
        del earlier["settings"][section][key]
    del earlier["settings"]["augment"]
    try:
        record.write_text(json.dumps(earlier))
        assert train.run(tiny())["mlflow_run_id"] == trained["mlflow_run_id"]
        del earlier["settings"]["train"]["lr"]
        record.write_text(json.dumps(earlier))
        with pytest.raises(ConfigError, match=r"train\.lr was 0\.0001, is 0\.001"):
            train.run(tiny())
    finally:
        record.write_text(written)


def test_the_number_of_heads_that_0_stands_for_is_no_other_model() -> None:
    """The benchmarks' files had 8 before they left it to the width; their runs go on and are evaluated."""
    now = {"model": ModelConfig(temporal_heads=0).identity()}
    assert (
        now["model"] == ModelConfig(temporal_heads=8).identity() != ModelConfig(temporal_heads=4).identity()
    )
    assert completed_settings({"model": now["model"] | {"temporal_heads": 0}})["model"] == now["model"]


def test_two_drivers_of_one_run(
    trained: dict[str, Any], places: Layout, tiny_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Schedulers submit again what they take for lost, while it lives: checkpoints must have one writer."""
    lock = StoreLock(f"{places.data}/run-locks/first")
    with lock:
        refused = in_process(capsys, train.run, "--config", tiny_yaml, "upkeep.when_locked=refuse")
        refused.refused(3, "another job works here", f"process {os.getpid()}", "upkeep.when_locked=wait")
        end = threading.Timer(1.5, lock.__exit__, (None, None, None))
        end.start()
        waited = train.run(tiny())
        end.join()
    assert waited["mlflow_run_id"] == trained["mlflow_run_id"]
