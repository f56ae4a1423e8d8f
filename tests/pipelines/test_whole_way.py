"""Prepare, extract, train and evaluate on real files and real Ray: what each leaves behind."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import yaml

from cluster.layout import Layout, layout
from cluster.tracking import git_revision, resolve_tracking_uri, use_served_model
from gare import load_checkpoint, tokenize
from gare.config import parse_config
from gare.data.manifest import read_manifest
from gare.report.pictures import FAINT, INK, LINES, RIGHT, WRONG
from tests.helpers.pictures import count_colour, pixels_of
from tests.helpers.pipelines import POISONED, STEPS, losses, tiny

CAPTIONS = ["a red circle moves to the left", "two squares cross"]


@pytest.fixture(scope="module")
def tracking_uri(root: Path) -> str:
    return resolve_tracking_uri("sqlite:///mlflow.db", str(root))


@pytest.fixture(scope="module")
def tracked(trained: dict[str, Any], tracking_uri: str) -> Any:
    """The MLflow run of ``first``."""
    return mlflow.MlflowClient(tracking_uri).get_run(trained["mlflow_run_id"])


def test_scores_of_both_directions_are_there(trained: dict[str, Any]) -> None:
    """Without them a person has trained for nothing."""
    evaluation = trained["evaluation"]
    assert set(evaluation["metrics"]) == {
        f"{way}/{name}" for way in ("t2v", "v2t") for name in ("R1", "R5", "R10", "R50", "MdR", "MnR")
    }
    assert all(0 <= evaluation["metrics"][f"{way}/R1"] <= 100 for way in ("t2v", "v2t"))
    assert evaluation["metrics"]["t2v/R50"] == 100  # of ten videos
    assert (evaluation["num_videos"], evaluation["num_texts"]) == (10, 50)


def test_every_result_is_a_file_too(
    trained: dict[str, Any], benchmark: dict[str, Any], places: Layout
) -> None:
    """Under a job stdout is mixed with Ray's lines; the file is what a program reads."""
    files = {
        places.step("prepare"): benchmark["prepare"],
        places.frames: benchmark["extract"],
        places.run("first"): {key: value for key, value in trained.items() if key != "evaluation"},
        places.evaluation("first", "test"): trained["evaluation"],
    }
    for folder, result in files.items():
        recorded = json.loads(Path(folder, "result.json").read_text())
        # The demo's test prepares the same benchmark again.
        assert recorded | {"seconds": 0} == result | {"seconds": 0}


def test_checkpoint_keeps_its_contract(trained: dict[str, Any]) -> None:
    """Files that others read, with their SHA-256; trainer.pt must load without running code."""
    folder = Path(trained["checkpoint"])
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "model.safetensors",
        "sums.json",
        "trainer.pt",
    ]
    # As it was given, with what is automatic as what it came to.
    expected = tiny("cluster.loaders_per_worker=1", "train.precision=float32")
    assert parse_config(yaml.safe_load((folder / "config.yaml").read_text())) == expected
    trainer = torch.load(folder / "trainer.pt", weights_only=True)
    assert trainer["epoch"] == trained["best_epoch"]
    assert trainer["step"] == 3 * trained["best_epoch"]


def test_best_checkpoint_is_the_first_best_on_val(trained: dict[str, Any], places: Layout) -> None:
    """A checkpoint that is not the one whose score is reported makes every number after it wrong."""
    history = json.loads(Path(places.run("first"), "history.json").read_text())
    points = dict(history["epochs"]["val/t2v/R1"])
    assert len(points) == 8
    assert trained["val/t2v/R1"] == points[trained["best_epoch"]] == max(points.values())


def test_one_run_in_mlflow_says_what_it_was_made_of(
    trained: dict[str, Any], tracked: Any, tracking_uri: str, places: Layout, repository: Path
) -> None:
    """A score without settings, data and revision cannot be repeated."""
    client = mlflow.MlflowClient(tracking_uri)
    runs = client.search_runs([tracked.info.experiment_id], "attributes.run_name = 'tiny/first'")
    assert [run.info.run_id for run in runs] == [trained["mlflow_run_id"]]
    assert tracked.info.status == "FINISHED"
    params = tracked.data.params
    assert params["train.epochs"] == "8"
    assert params["model.clip.embed_dim"] == "32"
    tags = tracked.data.tags
    assert tags["manifest.fingerprint"] == read_manifest(places.manifest).fingerprint
    assert (
        tags["store.fingerprint"] == json.loads(Path(places.frames, "_META.json").read_text())["fingerprint"]
    )
    assert tags["git.revision"] == git_revision(repository)
    assert (tags["seed"], tags["world_size"], tags["model"]) == ("0", "2", "gare")
    datasets = {
        (entry.tags[0].value, entry.dataset.name): json.loads(entry.dataset.profile)
        for entry in tracked.inputs.dataset_inputs
    }
    assert datasets["train", "synthetic-train"] == {"videos": 24, "captions": 120}
    assert datasets["val", "synthetic-val"]["videos"] == 6
    assert datasets["test", "synthetic-test"]["videos"] == 10


def test_metrics_in_mlflow_are_those_of_the_record(
    trained: dict[str, Any], tracking_uri: str, places: Layout
) -> None:
    """Curves that differ from what was trained mislead."""
    client = mlflow.MlflowClient(tracking_uri)
    run_id = trained["mlflow_run_id"]
    recorded = dict(losses(places.run("first"))["loss/total"])
    logged = {entry.step: entry.value for entry in client.get_metric_history(run_id, "loss/total")}
    assert STEPS in logged
    assert len(logged) > 1
    assert logged == {step: recorded[step] for step in logged}
    recalls = [(entry.step, entry.value) for entry in client.get_metric_history(run_id, "val/t2v/R1")]
    assert [step for step, _ in recalls] == [3 * epoch for epoch in range(1, 9)]
    test_recall = client.get_run(run_id).data.metrics["test/t2v/R1"]
    assert test_recall == trained["evaluation"]["metrics"]["t2v/R1"]


@pytest.mark.parametrize(
    ("name", "colours"), [("curves.png", LINES[:2]), ("retrieval-test.png", (INK, FAINT))]
)
def test_pictures_can_be_looked_at(
    name: str, colours: tuple[str, ...], trained: dict[str, Any], tracking_uri: str, tmp_path: Path
) -> None:
    """A picture that is one colour, or no picture, tells nothing."""
    client = mlflow.MlflowClient(tracking_uri)
    path = client.download_artifacts(trained["mlflow_run_id"], f"figures/{name}", str(tmp_path))
    pixels = pixels_of(Path(path).read_bytes())
    assert min(pixels.shape[:2]) > 200
    assert min(count_colour(pixels, colour) for colour in colours) > 100
    if name.startswith("retrieval"):  # each right video is framed in one of these, or its rank written
        assert count_colour(pixels, RIGHT) + count_colour(pixels, WRONG) > 300


def test_model_in_mlflow_gives_the_checkpoints_embeddings(trained: dict[str, Any], tracking_uri: str) -> None:
    """Whoever serves the model must get what was evaluated."""
    served = use_served_model(tracking_uri, trained["mlflow_model"])
    signature = served.metadata.signature
    assert signature.inputs.input_types() == [mlflow.types.DataType.string]
    assert signature.outputs.inputs[0].shape == (-1, 32)
    model = load_checkpoint(trained["checkpoint"])
    with torch.inference_mode():
        expected = model.encode_text(*tokenize(CAPTIONS, 24)).embedding.numpy()
    np.testing.assert_array_equal(served.predict(CAPTIONS), expected)


def test_workers_and_restarts_of_a_name(
    trained: dict[str, Any], watched: dict[str, Any], poisoned: dict[str, Any], places: Layout
) -> None:
    """One worker trains as two do; the same seed gives the same losses again, bit for bit."""
    first = losses(places.run("first"))
    alone = losses(places.run("watched"))
    assert alone.keys() == first.keys()
    for name, points in first.items():
        if name.startswith(("tension/", "delta/", "gap/")):
            continue  # of the first worker's texts
        steps, values = zip(*points, strict=True)
        assert [step for step, _ in alone[name]] == list(steps)
        np.testing.assert_allclose(
            [value for _, value in alone[name]], values, rtol=2e-4, atol=1e-5, err_msg=name
        )
    # Trained over a copy of it.
    assert losses(layout(tiny(POISONED)).run("first")) == first != alone
    assert poisoned["mlflow_run_id"] != watched["mlflow_run_id"]
    assert poisoned["loss"] == trained["loss"]


def test_database_is_whole(trained: dict[str, Any], root: Path) -> None:
    """All runs, of every process, are in the one database that the UI opens."""
    with sqlite3.connect(root / "mlflow.db") as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    database.close()
