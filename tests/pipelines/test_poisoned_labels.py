"""What is known of test must not reach training: neither its labels nor its accuracy choose a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.layout import Layout, layout
from cluster.tracking.client import client
from cluster.tracking.tracker import connect
from gare.data.manifest import read_manifest
from gare.storage.run_folder import RunFolder
from gare.train.checkpoint.files import MODEL
from pipelines import evaluate
from pipelines.training.checkpointing import checkpoints_of
from tests.helpers.pipelines import POISONED, in_process, losses, snapshot, tiny


def test_poisoned_test_labels_change_nothing_that_is_kept(
    trained: dict[str, Any], poisoned: dict[str, Any], places: Layout
) -> None:
    """A checkpoint chosen on test makes every published number of it too good."""
    there = layout(tiny(POISONED))
    assert read_manifest(there.manifest).fingerprint != read_manifest(places.manifest).fingerprint
    for key in ("best_epoch", "val/t2v/R1", "loss", "steps"):
        assert poisoned[key] == trained[key], key
    assert losses(there.run("first")) == losses(places.run("first"))
    epochs = [
        json.loads(Path(at.run("first"), "history.json").read_text())["epochs"] for at in (places, there)
    ]
    vals = [{name: points for name, points in one.items() if name.startswith("val/")} for one in epochs]
    assert len(vals[0]) == 12
    assert vals[0] == vals[1]
    kept, again = (load_file(Path(run["checkpoint"], "model.safetensors")) for run in (trained, poisoned))
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_the_poison_is_one(trained: dict[str, Any], poisoned: dict[str, Any]) -> None:
    """Else the test before it would hold nothing; and evaluating must leave the checkpoint as it is."""
    before = snapshot(poisoned["checkpoint"])
    found = evaluate.run(tiny(POISONED))
    assert found["metrics"]["t2v/MnR"] != trained["evaluation"]["metrics"]["t2v/MnR"]
    assert snapshot(poisoned["checkpoint"]) == before


def in_mlflow(run_id: str, places: Layout) -> tuple[dict[str, float], dict[str, str], list[Any]]:
    """Metrics and tags of a run but those of a test curve, and the versions of its data set's model."""
    store = client(connect(tiny().tracking, places.root).tracking_uri)
    data = store.get_run(run_id).data
    metrics, tags = (
        {name: value for name, value in found.items() if name.partition("/")[0] != "test_curve"}
        for found in (data.metrics, data.tags)
    )
    name = f"gare-{places.data.rsplit('/', 1)[-1]}"
    versions = store.search_model_versions(f"name = '{name}'")
    return metrics, tags, [(one.version, one.run_id, dict(one.tags), list(one.aliases)) for one in versions]


def test_a_test_curve_changes_its_own_numbers_and_nothing_else(
    trained: dict[str, Any],
    poisoned: dict[str, Any],
    places: Layout,
    tiny_yaml: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Many looks at test are wanted as a picture; one of them that chose anything would be leaked labels."""
    there = layout(tiny(POISONED))
    checkpoints = checkpoints_of(tiny(POISONED).train, RunFolder(there.run("first")), validated=True)
    entries = checkpoints.entries()
    assert [entry.epoch for entry in entries] == list(range(1, 9))
    damaged = next(entry for entry in entries if entry.epoch not in (7, 8, trained["best_epoch"]))
    Path(checkpoints.location(damaged), MODEL).write_bytes(b"damaged")

    kept = snapshot(there.run("first"))
    logged = in_mlflow(poisoned["mlflow_run_id"], there)
    answer = in_process(
        capsys, evaluate.run, "--config", tiny_yaml, POISONED, "--test-curve", flags=evaluate.FLAGS
    )
    assert answer.status == 0, answer.stderr
    curve = json.loads(answer.stdout)
    own = f"{Path(there.test_curve('first')).name}/"
    now = snapshot(there.run("first"))
    assert {name: content for name, content in now.items() if not name.startswith(own)} == kept
    assert {name for name in now if name.startswith(own)} == {
        f"{own}{name}" for name in ("curve.json", "curve.png", "result.json")
    }
    assert in_mlflow(poisoned["mlflow_run_id"], there) == logged

    assert curve["note"] == (
        "the best of 7 looks at test is not a result: report the checkpoint chosen on val"
    )
    assert curve["note"] in answer.stderr
    assert (curve["num_looks"], curve["num_left_out"], list(curve["left_out"])) == (7, 1, [damaged.name])
    assert f"step {damaged.step}, is left out of the test curve" in answer.stderr
    rows = json.loads(Path(curve["curve"]).read_text())["checkpoints"]
    assert [row["epoch"] for row in rows] == [entry.epoch for entry in entries if entry != damaged]
    assert curve["best_of_the_looks"]["metrics"]["t2v/R1"] == max(row["metrics"]["t2v/R1"] for row in rows)
    store = client(connect(tiny().tracking, places.root).tracking_uri)
    points = store.get_metric_history(poisoned["mlflow_run_id"], "test_curve/t2v/R1")
    assert [(one.step, one.value) for one in points] == [
        (row["step"], row["metrics"]["t2v/R1"]) for row in rows
    ]

    sound = evaluate.run(tiny("evaluate.test_curve=true"))
    of_step = {row["step"]: row for row in rows}
    true_rows = json.loads(Path(sound["curve"]).read_text())["checkpoints"]
    assert any(row["metrics"] != of_step[row["step"]]["metrics"] for row in true_rows)
    # The checkpoint to report is the same, whatever the labels of test; its row is what evaluation says.
    assert sound["chosen"]["step"] == curve["chosen"]["step"]
    assert sound["chosen"]["metrics"] == pytest.approx(trained["evaluation"]["metrics"])
    evaluation = evaluate.run(tiny(POISONED))
    assert curve["chosen"]["metrics"] == pytest.approx(evaluation["metrics"])
    (version,) = store.search_model_versions("name = 'gare-poisoned'")
    assert float(version.tags["val.score"]) == poisoned["val/t2v/R1"] == trained["val/t2v/R1"]
    suite = evaluate.run(tiny(POISONED, "evaluate.suite=looks"))
    recall = evaluation["metrics"]["t2v/R1"]
    assert suite["numbers"]["synthetic/gare/t2v/R1/mean"] == pytest.approx(recall)
    assert "synthetic/gare/t2v/R1/deviation" not in suite["numbers"]
    compared = evaluate.run(tiny("evaluate.compare=[poisoned/first, poisoned/first]"))
    assert compared["numbers"]["synthetic/t2v/R1/difference"] == 0


def test_a_curve_of_nothing_is_one_clear_error(
    trained: dict[str, Any], places: Layout, tiny_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt run must not be an empty curve, nor a trace."""

    def command(*overrides: str) -> Any:
        arguments = ("--config", tiny_yaml, "--test-curve", *overrides)
        return in_process(capsys, evaluate.run, *arguments, flags=evaluate.FLAGS)

    command("train.run=nothing").refused(3, "there is no run 'nothing'", "pipelines/train.py")
    Path(places.run("bare")).mkdir()
    shutil.copy2(Path(places.run("first"), "run.json"), places.run("bare"))
    command("train.run=bare").refused(3, "run 'bare' keeps no checkpoint")
    shutil.rmtree(places.run("bare"))
    command("evaluate.split=val").refused(2, "test_curve is of split test")
    command("evaluate.input=features").refused(2, "evaluate.input", "learned from frames", "auto or frames")
