"""What is known of test must not reach training: neither its labels nor its accuracy choose a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.storage import Layout, layout
from gare.data.manifest import read_manifest, write_manifest
from pipelines import evaluate, train
from tests.pipelines.support import losses, snapshot, tiny

POISONED = "name=poisoned"


@pytest.fixture(scope="module")
def poisoned(trained: dict[str, Any], places: Layout) -> dict[str, Any]:
    """The run ``first`` again, on a manifest whose test videos have each other's captions."""
    manifest = read_manifest(places.manifest)
    test = manifest.of_split("test")
    captions = {row.video_id: other.captions for row, other in zip(test, [*test[1:], test[0]], strict=True)}
    rows = tuple(
        dataclasses.replace(row, captions=captions.get(row.video_id, row.captions)) for row in manifest.rows
    )
    there = layout(tiny(POISONED))
    write_manifest(dataclasses.replace(manifest, rows=rows), there.manifest)
    shutil.copytree(places.frames, there.frames)
    return train.run(tiny(POISONED))


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
