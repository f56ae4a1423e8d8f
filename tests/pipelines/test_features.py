"""Features from a frame store, learned and evaluated from, as a person runs it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.storage import Layout, layout
from gare import load_checkpoint
from gare.data.features import FeatureReader
from gare.data.manifest import read_manifest, write_manifest
from gare.data.store import read_meta
from gare.model.clip import towers_sha256
from pipelines import evaluate, extract, train
from tests.pipelines.support import STEPS, in_process, snapshot, tiny

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
    """A run on the features, by two workers."""
    return train.run(tiny(*RUN, weights))


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
    assert read_meta(changed.features).complete
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
    settings = ("name=followed", "extract.store=both", "extract.videos_per_part=1", weights)

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


def test_other_towers_are_refused(
    features: dict[str, Any], tiny_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Features of one CLIP scored by another model look like numbers and mean nothing."""
    answer = in_process(capsys, extract.run, "--config", tiny_yaml, "extract.store=both")
    answer.refused(3, "towers_sha256 is")
    answer = in_process(capsys, train.run, "--config", tiny_yaml, *RUN, "train.overwrite=true")
    answer.refused(3, "towers_sha256 is")
    assert json.loads(json.dumps(features)) == features
