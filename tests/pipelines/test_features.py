"""Features from a frame store, learned and evaluated from, as a person runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from cluster.layout import Layout, layout
from gare import load_checkpoint
from gare.data.manifest import read_manifest, write_manifest
from gare.data.store.contents import Store
from gare.data.store.feature_reader import FeatureReader
from gare.model.encoders.clip import towers_sha256
from gare.storage.files import copy_files, delete_file, list_files, stat_file
from gare.train.checkpoint.files import MODEL
from gare.train.checkpoint.sums import SUMS
from pipelines import evaluate, extract, train
from tests.helpers.pipelines import STEPS, in_process, snapshot, tiny
from tests.pipelines.test_faults import num_parts, start_job, wait_for

RUN = ("train.input=features", "train.run=from-features", "model.adapters=true")


@pytest.fixture(scope="module")
def weights(trained: dict[str, Any]) -> str:
    """Towers of the run ``first``, as an override."""
    return f"features.weights={trained['checkpoint']}"


@pytest.fixture(scope="module")
def features(benchmark: dict[str, Any], weights: str) -> dict[str, Any]:
    """The tiny benchmark with a feature store beside its frames."""
    result = extract.run(tiny("extract.store=both", weights))
    features: dict[str, Any] = result["features"]
    return features


@pytest.fixture(scope="module")
def learned(features: dict[str, Any], weights: str) -> dict[str, Any]:
    """A run on the features, by one worker; those of test_import_features.py are learned by two."""
    return train.run(tiny(*RUN, weights, "cluster.train_workers=1"))


def test_a_run_leaves_a_whole_checkpoint(
    learned: dict[str, Any], features: dict[str, Any], trained: dict[str, Any]
) -> None:
    """A model that cannot encode a new caption or video is of no use to a search."""
    assert learned["steps"] == STEPS
    model, source = load_checkpoint(learned["checkpoint"]), load_checkpoint(trained["checkpoint"])
    assert towers_sha256(model.towers) == towers_sha256(source.towers)
    assert model.adapters is not None
    assert model.adapters.video.weight.abs().max() > 0
    assert features["videos"] == 40
    assert not features["failed"]


def test_evaluating_from_either_store_is_the_same(
    learned: dict[str, Any], weights: str, places: Layout
) -> None:
    """Numbers that depend on the store would not be the model's."""
    run = "train.run=from-features"
    stored = evaluate.run(tiny(run, weights, "model.adapters=true"))
    pictures = evaluate.run(tiny(run, weights, "model.adapters=true", "evaluate.input=frames"))
    assert stored["num_texts"] == pictures["num_texts"]
    # float16 may swap two near ranks of 50.
    for name, value in stored["metrics"].items():
        assert value == pytest.approx(pictures["metrics"][name], abs=4.1), name
    assert Path(stored["picture"]).stat().st_size > 0


def test_the_test_curve_needs_no_towers(
    learned: dict[str, Any], weights: str, tiny_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints of such a run have no towers, and their features are in the store."""
    run = ("train.run=from-features", weights, "model.adapters=true")
    curve = evaluate.run(tiny(*run, "evaluate.test_curve=true"))
    assert (curve["num_left_out"], curve["num_looks"]) in ((0, 2), (0, 3))
    assert curve["chosen"]["epoch"] == learned["best_epoch"]
    assert curve["chosen"]["metrics"] == pytest.approx(evaluate.run(tiny(*run))["metrics"])
    frames = ("--config", tiny_yaml, "--test-curve", *run, "evaluate.input=frames")
    answer = in_process(capsys, evaluate.run, *frames, flags=evaluate.FLAGS)
    answer.refused(2, "evaluate.input", "learned from features", "have no towers")


def test_zero_shot_from_features_of_the_same_towers(
    features: dict[str, Any],
    weights: str,
    trained: dict[str, Any],
    tiny_yaml: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """A score of one CLIP's features under another's name would be the first row of every table."""
    stored = evaluate.run(tiny("evaluate.zero_shot=true", weights, "evaluate.input=features"))
    pictures = evaluate.run(tiny("evaluate.zero_shot=true", weights))
    for name, value in stored["metrics"].items():
        assert value == pytest.approx(pictures["metrics"][name], abs=4.1), name
    other = tmp_path / "other"
    copy_files(trained["checkpoint"], str(other))
    (other / SUMS).unlink()
    tensors = load_file(other / MODEL)
    name = next(name for name in tensors if name.startswith("towers.") and name.endswith("weight"))
    save_file({**tensors, name: tensors[name] + 1}, other / MODEL)
    settings = ("--zero-shot", f"features.weights={other}", "evaluate.input=features")
    answer = in_process(capsys, evaluate.run, "--config", tiny_yaml, *settings, flags=evaluate.FLAGS)
    answer.refused(3, "towers_sha256 is")


def test_same_job_again_changes_nothing(features: dict[str, Any], weights: str, places: Layout) -> None:
    """A store that others read must not move under them."""
    before = snapshot(places.features)
    extract.run(tiny("extract.store=both", weights))
    assert snapshot(places.features) == before


def test_features_without_frames(features: dict[str, Any], weights: str, places: Layout) -> None:
    """Who has no room for frames must get the same features, and a list of what failed."""
    alone = layout(tiny("name=alone"))
    manifest = read_manifest(places.manifest)
    bad = replace(manifest.rows[0], video_id="bad", uri="/nowhere/bad.mp4")
    write_manifest(replace(manifest, rows=(*manifest.rows[:5], bad)), alone.manifest)
    settings = ("name=alone", "extract.store=features", "extract.max_failed_fraction=0.5", weights)
    settings += ("extract.workers=1",)
    # Two windows of frames, one after the other.
    result = extract.run(tiny(*settings, "features.videos_per_part=3", "features.workers=1"))
    assert (result["videos"], set(result["failed"])) == (5, {"bad"})
    assert not Path(alone.frames).exists()
    assert not (Path(alone.features) / "passing").exists()
    ids = [row.video_id for row in manifest.rows[:5]]
    found, known = FeatureReader(alone.features).read(ids), FeatureReader(places.features).read(ids)
    assert found.keys() == known.keys()
    for name, values in known.items():
        assert np.allclose(found[name], values, atol=1e-2), name
    before = snapshot(alone.features)
    again = extract.run(tiny(*settings))
    assert (again["attempted"], again["videos"]) == (0, 5)
    assert snapshot(alone.features) == before


def test_new_captions_are_encoded_again(
    features: dict[str, Any], weights: str, places: Layout, tiny_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Features of captions that no one reads any more would be trained on in their place."""
    changed = layout(tiny("name=changed"))
    shutil.copytree(places.frames, changed.frames)
    shutil.copytree(places.features, changed.features)
    manifest = read_manifest(places.manifest)
    row = manifest.rows[3]
    rows = list(manifest.rows)
    rows[3] = replace(row, captions=("something else", *row.captions))
    write_manifest(replace(manifest, rows=tuple(rows)), changed.manifest)
    old = FeatureReader(changed.features)
    answer = in_process(capsys, train.run, "--config", tiny_yaml, "name=changed", weights, *RUN)
    answer.refused(3, "the store is not complete", "pipelines/extract.py")

    extract.run(tiny("name=changed", "extract.store=both", weights))
    new = FeatureReader(changed.features)
    assert new.places.keys() == old.places.keys()
    assert Store(changed.features).read_meta().complete
    found, was = new.read([row.video_id]), FeatureReader(places.features).read([row.video_id])
    assert found["text"].shape[1] == len(row.captions) + 1
    assert np.allclose(found["text"][:, 1:], was["text"], atol=1e-2)
    assert np.allclose(found["frames"], was["frames"], atol=1e-2)


def test_a_changed_file_is_encoded_again(
    features: dict[str, Any], weights: str, places: Layout, tmp_path: Path
) -> None:
    """The nightly run keeps both stores in step: features of a file that was replaced are nobody's."""
    own = layout(tiny("name=followed"))
    source = read_manifest(places.manifest)
    files = [tmp_path / f"{number}.mp4" for number in range(4)]
    for file, row in zip(files, source.rows, strict=False):
        shutil.copyfile(row.uri, file)
    rows = tuple(replace(source.rows[0], video_id=file.stem, uri=str(file)) for file in files)
    write_manifest(replace(source, rows=rows), own.manifest)
    settings = (
        "name=followed",
        "extract.store=both",
        "extract.videos_per_part=1",
        "extract.workers=1",
        weights,
    )

    def counts(result: dict[str, Any]) -> list[int]:
        return [result[key] for key in ("new", "changed", "unchanged", "gone", "attempted", "videos")]

    first = extract.run(tiny(*settings))
    assert counts(first) == counts(first["features"]) == [4, 0, 0, 0, 4, 4]
    assert first["features"]["mlflow_run_id"] != first["mlflow_run_id"]
    assert json.loads((Path(own.features) / "result.json").read_text()) == first["features"]
    before = FeatureReader(own.features).read(["0", "1"])

    shutil.copyfile(source.rows[5].uri, files[0])
    second = extract.run(tiny(*settings))
    assert counts(second) == counts(second["features"]) == [0, 1, 3, 0, 1, 4]
    after = FeatureReader(own.features).read(["0", "1"])
    known = FeatureReader(places.features).read([source.rows[5].video_id])
    assert not np.allclose(after["frames"][0], before["frames"][0], atol=1e-2)
    assert np.allclose(after["frames"][0], known["frames"][0], atol=1e-2)
    assert np.array_equal(after["frames"][1], before["frames"][1])

    checked = extract.run(tiny(*settings, "upkeep.task=verify"))
    assert (checked["sound"], checked["features"]["sound"]) == (True, True)
    compacted = extract.run(tiny(*settings, "upkeep.task=compact"))
    assert (compacted["parts_after"], compacted["features"]["parts_after"]) == (1, 1)
    assert compacted["features"]["rows_left_out"] == 1
    checked = extract.run(tiny(*settings, "upkeep.task=verify"))
    assert (checked["sound"], checked["features"]["videos"]) == (True, 4)
    again = FeatureReader(own.features).read(["0", "1"])
    assert all(np.array_equal(again[name], values) for name, values in after.items())


def of_one_store(one: FeatureReader, other: FeatureReader, ids: list[str]) -> None:
    """Asserts that two feature stores hold the same, id by id."""
    assert one.places.keys() == other.places.keys() == set(ids)
    found, known = one.read(ids), other.read(ids)
    assert found.keys() == known.keys()
    for name, values in known.items():
        assert found[name].shape == values.shape
        # Of a clip that was encoded beside others the last digit of float16 may differ.
        assert np.allclose(found[name], values, atol=2e-3), name


def test_a_killed_job(
    features: dict[str, Any],
    weights: str,
    places: Layout,
    repository: Path,
    root: Path,
    tiny_yaml: str,
    rng: np.random.Generator,
) -> None:
    """Encoding takes hours on many clips: what a kill -9 leaves is gone on with, nothing lost or doubled."""
    name, ids = "killed-features", [row.video_id for row in read_manifest(places.manifest).rows]
    own = layout(tiny(f"name={name}"))
    Path(own.data).mkdir()
    shutil.copy2(places.manifest, own.manifest)
    shutil.copytree(places.frames, own.frames)
    settings = (f"name={name}", "extract.store=features", weights, "features.videos_per_part=4")
    after = int(rng.integers(1, 4))
    process = start_job(name, repository, root, tiny_yaml, *settings[1:])
    try:
        assert wait_for(lambda: num_parts(own.features) >= after, lambda: process.poll() is None)
        process.kill()
        status = process.wait(60)
    finally:
        process.kill()
        process.wait()
    said = (root / f"{name}.log").read_text()
    assert (status, Store(own.features).read_meta().complete) == (-signal.SIGKILL, False), said
    # As of a kill in the middle of a write, an hour ago.
    leftover = Path(own.features) / "data" / ".gare-0a.tmp"
    leftover.write_bytes(b"half a part")
    os.utime(leftover, (1, 1))
    kept = {part: Path(part).read_bytes() for part in list_files(f"{own.features}/data")}
    result = extract.run(tiny(*settings))
    assert 0 < result["attempted"] < 40
    assert (result["videos"], result["failed"]) == (40, {})
    assert not leftover.exists()
    assert {part: Path(part).read_bytes() for part in kept} == kept
    of_one_store(FeatureReader(own.features), FeatureReader(places.features), ids)
    assert extract.run(tiny(*settings, "upkeep.task=verify"))["sound"]


def test_features_on_s3(features: dict[str, Any], weights: str, places: Layout, root: Path, s3: Any) -> None:
    """A cluster without a shared disk keeps both stores there; a lost part is made again, the others stay."""
    own = layout(tiny("name=both", "storage.root=s3://videos/root"))
    manifest = read_manifest(places.manifest)
    write_manifest(manifest, own.manifest)
    copy_files(places.frames, own.frames)
    copy_files(f"{places.frames}/data", f"{own.frames}/data")
    settings = (
        *("name=both", "storage.root=s3://videos/root", "extract.store=features", weights),
        "features.workers=1",
        *(f"tracking.uri=sqlite:///{root / 'mlflow-features.db'}", "features.videos_per_part=16"),
    )
    result = extract.run(tiny(*settings))
    assert (result["videos"], result["attempted"], result["failed"]) == (40, 40, {})
    ids = [row.video_id for row in manifest.rows]
    of_one_store(FeatureReader(own.features), FeatureReader(places.features), ids)
    assert list_files(f"{own.features}/lock") == []

    parts = list_files(f"{own.features}/data")
    lost = [key for key, (part, _) in Store(own.features).ids().items() if part == parts[0]]
    versions = {part: stat_file(part) for part in parts[1:]}
    delete_file(parts[0])
    assert extract.run(tiny(*settings))["attempted"] == len(lost)
    assert {part: stat_file(part) for part in versions} == versions
    of_one_store(FeatureReader(own.features), FeatureReader(places.features), ids)


def test_clips_without_frames_are_told(
    features: dict[str, Any],
    weights: str,
    places: Layout,
    tiny_yaml: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Else features of a part of the collection pass for those of all."""
    own = layout(tiny("name=lacking"))
    manifest = read_manifest(places.manifest)
    shutil.copytree(places.frames, own.frames)
    shutil.copytree(places.features, own.features)
    more = [replace(row, video_id=f"{row.video_id} again") for row in manifest.rows[:3]]
    write_manifest(replace(manifest, rows=(*manifest.rows, *more)), own.manifest)
    settings = ("--config", tiny_yaml, "name=lacking", "extract.store=features", weights)
    answer = in_process(capsys, extract.run, *settings)
    assert answer.status == 0, answer.stderr
    assert f"lacks 3 of 43 videos, {more[0].video_id!r} the first of them" in answer.stderr
    assert "no features are made of these" in answer.stderr
    assert json.loads(answer.stdout)["videos"] == 40

    # A frame store whose own run was interrupted is no source of features: the videos themselves are.
    Store(own.frames).write_meta(replace(Store(own.frames).read_meta(), complete=False))
    answer = in_process(capsys, extract.run, *settings)
    assert answer.status == 0, answer.stderr
    assert "lacks 3 of 43 videos" in answer.stderr
    assert "decoded again for the features alone; extract.store=both finishes it" in answer.stderr
    assert json.loads(answer.stdout)["videos"] == 43
    answer = in_process(capsys, extract.run, *settings[:-2], "extract.store=both", weights)
    assert "lacks" not in answer.stderr


def test_other_towers_are_refused(
    features: dict[str, Any], tiny_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Features of one CLIP scored by another model look like numbers and mean nothing."""
    answer = in_process(capsys, extract.run, "--config", tiny_yaml, "extract.store=both")
    answer.refused(3, "towers_sha256 is")
    answer = in_process(capsys, train.run, "--config", tiny_yaml, *RUN, "train.overwrite=true")
    answer.refused(3, "towers_sha256 is")
    assert json.loads(json.dumps(features)) == features
