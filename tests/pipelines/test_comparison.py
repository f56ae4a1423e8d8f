"""--compare and --suite: one table of runs that were trained and scored, in MLflow too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from cluster.layout import Layout
from cluster.tracking import use_served_model
from cluster.tracking.client import client
from cluster.tracking.registry import champion_of
from cluster.tracking.tracker import connect
from gare.data.manifest import read_manifest
from gare.retrieval.results.queries import read_queries
from gare.storage.files import copy_files
from gare.train.checkpoint.files import MODEL
from gare.train.checkpoint.sums import SUMS
from pipelines import evaluate, train
from pipelines.evaluating.registration import write_and_register
from tests.helpers.pipelines import in_process, tiny


def stored(places: Layout) -> Any:
    return client(connect(tiny().tracking, places.root).tracking_uri)


@pytest.fixture(scope="module")
def second(trained: dict[str, Any], places: Layout) -> str:
    """A copy of the run ``first`` as if of another seed, not evaluated, with an MLflow run of its own."""
    source, target = Path(places.run("first")), Path(places.run("again"))
    copy_files(str(source / "best"), str(target / "best"))
    record = json.loads((source / "run.json").read_text())
    record["settings"]["train"] |= {"seed": 1, "run": "again"}
    record["mlflow_run_id"] = connect(tiny().tracking, places.root).start_run("tiny/again").run_id
    (target / "run.json").write_text(json.dumps(record))
    saved = target / "best" / "config.yaml"
    (target / "best" / SUMS).unlink()
    saved.write_text(saved.read_text().replace("run: first", "run: again"))
    return str(record["mlflow_run_id"])


def test_a_run_says_what_it_was_measured_on(trained: dict[str, Any], places: Layout) -> None:
    """Without these, two rows of the UI that are of different things look alike."""
    run = stored(places).get_run(trained["mlflow_run_id"])
    tags = run.data.tags
    assert (tags["benchmark"], tags["split"], tags["N_text"], tags["N_video"]) == (
        "synthetic",
        "test",
        "50",
        "10",
    )
    assert tags["test.split_hash"] == tags["split_hash"]
    assert tags["val.split_hash"] != tags["test.split_hash"]
    known = {"decoder": "auto", "frames": "4", "world_size": "2", "batch": "8", "precision": "float32"}
    assert known.items() <= tags.items()
    assert {"protocol", "seed", "git.revision"} <= set(tags)
    assert tags["test.post-processing"] == "none"
    assert tags["ray.job"] != "none"
    model = stored(places).get_logged_model(trained["mlflow_model"].removeprefix("models:/"))
    (metric,) = [one for one in model.metrics if one.key == "test/t2v/R1"]
    digests = {entry.dataset.name: entry.dataset.digest for entry in run.inputs.dataset_inputs}
    assert (metric.dataset_name, metric.dataset_digest) == ("synthetic-test", digests["synthetic-test"])
    assert tags["split_hash"].startswith(metric.dataset_digest)
    assert metric.value == run.data.metrics["test/t2v/R1"] == trained["evaluation"]["metrics"]["t2v/R1"]


def test_suite_and_comparison(
    trained: dict[str, Any], second: str, places: Layout, tiny_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is asked of two runs is answered by one command, and is found again in MLflow."""
    runs = 'evaluate.runs=["first", "tiny/again"]'
    arguments = ("--config", tiny_yaml, "--suite", "seeds", runs)
    answer = in_process(capsys, evaluate.run, *arguments, flags=evaluate.FLAGS)
    assert answer.status == 0, answer.stderr
    suite = json.loads(answer.stdout)
    score = trained["evaluation"]["metrics"]["t2v/R1"]
    assert suite["numbers"]["synthetic/gare/t2v/R1/mean"] == pytest.approx(score)
    assert suite["numbers"]["synthetic/gare/t2v/R1/deviation"] == 0
    assert "gare: mean of 2 seeds" in answer.stderr
    parent = stored(places).get_run(suite["mlflow_run_id"])
    assert parent.data.metrics["synthetic/gare/t2v/R1/mean"] == pytest.approx(score)
    for child in (trained["mlflow_run_id"], second):
        assert stored(places).get_run(child).data.tags["mlflow.parentRunId"] == parent.info.run_id
    files = stored(places).list_artifacts(parent.info.run_id)
    assert {item.path for item in files} == {"table.md", "figures"}
    again = in_process(capsys, evaluate.run, *arguments, flags=evaluate.FLAGS)
    assert json.loads(again.stdout)["mlflow_run_id"] == parent.info.run_id

    compare = ("--config", tiny_yaml, "--compare", "first", second)
    answer = in_process(capsys, evaluate.run, *compare, flags=evaluate.FLAGS)
    assert answer.status == 0, answer.stderr
    assert json.loads(answer.stdout)["numbers"]["synthetic/t2v/R1/difference"] == 0
    assert "second − first" in answer.stderr
    note = stored(places).get_run(json.loads(answer.stdout)["mlflow_run_id"]).data.tags["mlflow.note.content"]
    assert note.startswith("- synthetic: no difference in text → video R@1")
    note = stored(places).get_run(trained["mlflow_run_id"]).data.tags["mlflow.note.content"]
    assert note.startswith("**test** of synthetic (")
    unknown = ("--config", tiny_yaml, "--compare", "first", "nothing")
    refused = in_process(capsys, evaluate.run, *unknown, flags=evaluate.FLAGS)
    refused.refused(3, "run nothing", "pipelines/evaluate.py")


def test_zero_shot_stands_beside_runs(
    trained: dict[str, Any], places: Layout, tiny_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every comparison starts at the towers as they are: no run, the same files, tags and tables."""

    def command(*arguments: str) -> Any:
        return in_process(capsys, evaluate.run, "--config", tiny_yaml, *arguments, flags=evaluate.FLAGS)

    command("--zero-shot").refused(2, "evaluate.zero_shot", "features.weights or train.clip_weights")
    weights = f"features.weights={trained['checkpoint']}"
    listed = command("--suite", "listed", "evaluate.split=val", 'evaluate.runs=["tiny/zero-shot"]')
    listed.refused(3, "has no evaluation of val", "--zero-shot")
    # Switches of what follows the towers are no part of it.
    answer = command("--zero-shot", weights, "model.corrected_side=video", "evaluate.dsl=true")
    assert answer.status == 0, answer.stderr
    found = json.loads(answer.stdout)
    folder = Path(places.evaluation("zero-shot", "test"))
    assert {path.name for path in folder.iterdir()} == {
        *("result.json", "retrieval.png", "ranks.parquet", "ranks-dsl.parquet"),
    }
    assert found["intervals"].keys() == found["metrics"].keys()
    assert (found["run"], found["model"], found["registered"]) == ("zero-shot", "zero-shot", "")
    # These towers are not CLIP's, which is said wherever the score is.
    tuned = f"the towers of {trained['checkpoint']} as they are, NOT the zero-shot score of published weights"
    assert found["note"] == f"{tuned}: the training tiny/first changed them"
    assert tuned in answer.stderr
    page = stored(places).get_run(found["mlflow_run_id"]).data.tags["mlflow.note.content"]
    assert "NOT the zero-shot score of published weights" in page
    run = stored(places).get_run(found["mlflow_run_id"])
    assert (run.info.run_name, run.info.status) == ("tiny/zero-shot", "FINISHED")
    assert run.data.metrics["test/t2v/R1"] == found["metrics"]["t2v/R1"]
    tags = run.data.tags
    known = stored(places).get_run(trained["mlflow_run_id"]).data.tags
    for name in ("benchmark", "protocol", "split", "split_hash", "N_text", "N_video", "decoder", "frames"):
        assert tags[name] == known[name]
    assert (tags["model"], tags["precision"]) == ("zero-shot", "float32")
    assert tags["test.post-processing"] == "dsl(100)"
    assert not {"batch", "seed", "world_size"} & set(tags)
    assert {entry.dataset.name for entry in run.inputs.dataset_inputs} == {"synthetic-test"}
    files = {item.path for item in stored(places).list_artifacts(found["mlflow_run_id"], "figures")}
    names = ("retrieval-test", "ranks-test", "similarity-test", "best-and-worst-test")
    assert files >= {f"figures/{name}.png" for name in names}
    val = evaluate.run(tiny("evaluate.zero_shot=true", "evaluate.split=val", weights))
    assert val["mlflow_run_id"] == found["mlflow_run_id"]

    answer = command("--compare", "zero-shot", "first")
    assert answer.status == 0, answer.stderr
    gain = trained["evaluation"]["metrics"]["t2v/R1"] - found["metrics"]["t2v/R1"]
    difference = json.loads(answer.stdout)["numbers"]["synthetic/t2v/R1/difference"]
    assert difference == pytest.approx(gain)
    assert "tiny/zero-shot (zero-shot)" in answer.stderr
    assert f"- tiny/zero-shot: {tuned}" in answer.stderr
    answer = command("--suite", "start", 'evaluate.runs=["first", "zero-shot"]')
    assert answer.status == 0, answer.stderr
    numbers = json.loads(answer.stdout)["numbers"]
    assert numbers["synthetic/zero-shot/t2v/R1/mean"] == found["metrics"]["t2v/R1"]
    assert numbers["synthetic/gare/t2v/R1/mean"] == trained["evaluation"]["metrics"]["t2v/R1"]
    nested = stored(places).get_run(found["mlflow_run_id"]).data.tags["mlflow.parentRunId"]
    assert nested == json.loads(answer.stdout)["mlflow_run_id"]
    refused = in_process(capsys, train.run, "--config", tiny_yaml, "train.run=zero-shot")
    refused.refused(2, "train.run", "evaluations without a run")
    for task in (f"evaluate.checkpoint={trained['checkpoint']}", "--test-curve"):
        command(task, "train.run=zero-shot").refused(2, "train.run", "evaluations without a run")


def test_zero_shot_of_other_towers_is_not_taken_for_the_first(
    trained: dict[str, Any],
    places: Layout,
    tiny_yaml: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two CLIPs are scored in turn: one's MLflow run must not bring the scores of the other, of any split."""

    def command(*arguments: str) -> Any:
        return in_process(capsys, evaluate.run, "--config", tiny_yaml, *arguments, flags=evaluate.FLAGS)

    one, other = trained["checkpoint"], tmp_path / "other"
    copy_files(one, str(other))
    tensors = load_file(other / MODEL)
    name = next(name for name in tensors if name.startswith("towers.") and name.endswith("projection.weight"))
    save_file({**tensors, name: tensors[name].flip(0)}, other / MODEL)
    (other / SUMS).unlink()  # as who changes a file on purpose does
    first, val = (
        evaluate.run(tiny("evaluate.zero_shot=true", f"features.weights={one}", f"evaluate.split={split}"))
        for split in ("test", "val")
    )
    assert first["mlflow_run_id"] == val["mlflow_run_id"]
    assert command("--compare", first["mlflow_run_id"], "first").status == 0
    answer = command("--zero-shot", f"features.weights={other}")
    assert answer.status == 0, answer.stderr
    second = json.loads(answer.stdout)
    assert second["mlflow_run_id"] != first["mlflow_run_id"]
    assert f"the zero-shot results of other towers, of MLflow run {first['mlflow_run_id']}" in answer.stderr
    assert second["metrics"] != first["metrics"]
    assert list(Path(places.evaluation("zero-shot", "val")).iterdir()) == []

    was = command("--compare", first["mlflow_run_id"], "first")
    was.refused(3, "results of test were replaced by those of MLflow run", second["mlflow_run_id"])
    was = command("--compare", first["mlflow_run_id"], "first", "evaluate.split=val")
    was.refused(3, "results of val were replaced by those of other towers")
    was = command("--suite", "gone", f'evaluate.runs=["{first["mlflow_run_id"]}"]')
    was.refused(3, "results of test were replaced")
    now = command("--compare", second["mlflow_run_id"], "first")
    gain = trained["evaluation"]["metrics"]["t2v/R1"] - second["metrics"]["t2v/R1"]
    assert json.loads(now.stdout)["numbers"]["synthetic/t2v/R1/difference"] == pytest.approx(gain)


def test_an_evaluation_leaves_the_tags_of_the_training(trained: dict[str, Any], places: Layout) -> None:
    """Runs are chosen by their tags: one that says bf16 and seed 9 of a float32 run of seed 0 misleads."""
    other = ("train.precision=bf16", "train.seed=9", "train.batch_size=10", "cluster.train_workers=1")
    names = ("precision", "seed", "batch", "world_size", "ray.job")
    known = stored(places).get_run(trained["mlflow_run_id"]).data.tags
    evaluated = evaluate.run(tiny(*other))
    assert evaluated["mlflow_run_id"] == trained["mlflow_run_id"]
    tags = stored(places).get_run(trained["mlflow_run_id"]).data.tags
    assert {name: tags[name] for name in names} == {name: known[name] for name in names}
    assert (tags["precision"], tags["seed"], tags["batch"], tags["world_size"]) == ("float32", "0", "8", "2")
    assert "ray.job.evaluated" in tags
    # A checkpoint from elsewhere says how it was trained; its MLflow run is not the training's.
    elsewhere = ("train.run=elsewhere", f"evaluate.checkpoint={trained['checkpoint']}", *other)
    found = stored(places).get_run(evaluate.run(tiny(*elsewhere))["mlflow_run_id"])
    assert found.info.run_id != trained["mlflow_run_id"]
    names = ("precision", "seed", "batch", "world_size")
    assert {name: found.data.tags[name] for name in names} == {name: known[name] for name in names}


def test_the_registered_model_ranks_videos(trained: dict[str, Any], places: Layout) -> None:
    """What was evaluated is what answers people's captions, found by its alias."""
    assert trained["evaluation"]["registered"] == "gare-tiny/1"
    uri = connect(tiny().tracking, places.root).tracking_uri
    served = use_served_model(uri, "models:/gare-tiny@champion")
    rows = read_queries(trained["evaluation"]["ranks"]["plain"]).of_direction("t2v").to_pylist()[:3]
    answers = served.predict([row["caption"] for row in rows])
    assert served.metadata.signature.outputs.input_names() == ["video_ids", "scores"]
    for answer, row in zip(answers, rows, strict=True):
        assert answer["scores"] == pytest.approx(row["top_scores"], abs=1e-5)
        assert set(answer["video_ids"]) == set(row["top_video_ids"])
    (version,) = stored(places).search_model_versions("name = 'gare-tiny'")
    assert float(version.tags["val.score"]) == trained["val/t2v/R1"]


def test_without_val_there_is_no_champion_and_it_is_said(
    trained: dict[str, Any], places: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    """Who loads the champion of a benchmark without val must learn why there is none."""
    rows = read_manifest(places.manifest).of_split("val")
    features = {
        "video/frames": np.zeros((len(rows), 4, 32), np.float32),
        "video/mask": np.ones((len(rows), 4), bool),
    }
    handle = connect(tiny().tracking, places.root).start_run("tiny/no-val")
    # Of a name of its own, so that the versions of the tests' model stay what they are.
    config = tiny("name=unvalidated", "evaluate.split=val")
    assert write_and_register(config, places, handle, rows, (), features) == "gare-unvalidated/1"
    said = "gare-unvalidated/1 is registered and cannot be its champion: unvalidated has no val split"
    assert said in caplog.text
    assert champion_of(handle.tracking_uri, "gare-unvalidated") is None
    handle.finish()


def test_figures_are_in_mlflow(trained: dict[str, Any], places: Layout) -> None:
    """A run is judged in the UI by what it shows there."""
    files = {item.path for item in stored(places).list_artifacts(trained["mlflow_run_id"], "figures")}
    names = ("curves", "increments", "retrieval-test", "ranks-test", "similarity-test", "best-and-worst-test")
    assert files >= {f"figures/{name}.png" for name in names}
