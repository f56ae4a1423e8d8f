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


def test_other_towers_are_refused(
    features: dict[str, Any], tiny_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Features of one CLIP scored by another model look like numbers and mean nothing."""
    answer = in_process(capsys, extract.run, "--config", tiny_yaml, "extract.store=both")
    answer.refused(3, "towers_sha256 is")
    answer = in_process(capsys, train.run, "--config", tiny_yaml, *RUN, "train.overwrite=true")
    answer.refused(3, "towers_sha256 is")
    assert json.loads(json.dumps(features)) == features
