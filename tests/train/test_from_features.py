"""Learning from stored features is learning from frames with frozen towers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gare.config import Config
from gare.data.feature_parts import pending_parts
from gare.data.features import FeatureReader
from gare.data.loader import ClipLoader, FeatureLoader
from gare.data.manifest import Manifest, ManifestRow, read_manifest, write_manifest
from gare.data.store import ids_in_parts, read_failures
from gare.errors import CheckpointError, ConfigError
from gare.model.clip import towers_sha256
from gare.model.gare import GARE
from gare.retrieval.encode import Encoder, encode_stored
from gare.retrieval.feature_maker import FeatureMaker
from gare.retrieval.feature_pass import FeaturePass
from gare.train.data import read_splits
from gare.train.loop import run_loop
from gare.train.plan import plan_run
from gare.train.state import complete_checkpoint, load_checkpoint, save_checkpoint
from gare.train.step import Learner, build_learner
from tests.stores import write_store
from tests.tiny import tiny_config

COLOURS = ("red", "green", "blue", "pink")


@dataclass
class Places:
    """A manifest with a frame store and a feature store of one model's towers."""

    config: Config
    manifest: str
    frames: str
    features: str
    seed: int

    def model(self, config: Config | None = None) -> GARE:
        torch.manual_seed(self.seed)
        return GARE((config or self.config).model)

    def feature_pass(self, model: GARE) -> FeaturePass:
        manifest, towers = read_manifest(self.manifest), towers_sha256(model.towers)
        return FeaturePass(self.config, manifest, self.frames, self.features, towers, "0")

    def encode(self, model: GARE) -> FeaturePass:
        job = self.feature_pass(model)
        maker = FeatureMaker(self.frames, self.features, self.config.features, model)
        for part in job.parts(1):
            maker.write(part)
        return job


@pytest.fixture
def places(tmp_path: Path, rng: np.random.Generator, seed: int) -> Places:
    overrides = ["model.clip.vocab_size=49408", "train.clip_weights=x", "train.freeze=towers"]
    config = tiny_config(*overrides, f"train.seed={seed}", "features.batch=4", "features.words=true")
    rows = tuple(
        ManifestRow(
            f"{split}{index}",
            f"/videos/{split}{index}.mp4",
            None,
            None,
            split,
            tuple(f"a {COLOURS[index % 4]} thing, take {take}" for take in range(1 + index % 3)),
        )
        for split, count in (("train", 9), ("val", 3))
        for index in range(count)
    )
    manifest, frames, features = (str(tmp_path / name) for name in ("m.parquet", "frames", "features"))
    write_manifest(Manifest(rows, benchmark="folder", protocol="own"), manifest)
    write_store(frames, config.extract, [row.video_id for row in rows], rng)
    return Places(config, manifest, frames, features, seed)


def train(places: Places, config: Config, model: GARE, *, features: bool) -> tuple[Learner, list[Any]]:
    """Runs the loop on either store; losses by step and metrics by epoch."""
    splits = read_splits(
        places.manifest,
        places.features if features else places.frames,
        config.extract,
        places.feature_pass(places.model()).settings if features else None,
    )
    rows = {"train": splits.train, "val": splits.val}
    plan = plan_run([len(row.captions) for row in splits.train], 3, config.train, rank=0, world_size=1)
    learner = build_learner(model, config, plan.num_steps, torch.device("cpu"))
    ids = [[rows[batch.kind][video].video_id for video in batch.videos] for batch in plan.batches]
    load: Callable[[int], dict[str, np.ndarray]] = ClipLoader(places.frames, ids)
    if features:
        reader = FeatureReader(places.features, words=model.needs_words)
        load = FeatureLoader(reader, ids, [batch.captions.tolist() for batch in plan.batches])
    clips: Iterator[dict[str, np.ndarray]] = map(load, range(len(ids)))
    seen: list[Any] = []
    run_loop(
        learner,
        plan,
        0,
        rows,
        clips,
        torch.device("cpu"),
        lambda step, values: seen.append(values["loss/total"]),
        lambda epoch, metrics: seen.append(metrics["t2v/MnR"]),
    )
    return learner, seen


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.micro_batch=2"],
        ["model.context=words", "model.corrected_side=video"],
        ["model.adapters=true"],
    ],
    ids=["frames", "in parts", "words", "adapters"],
)
def test_losses_are_those_of_frozen_towers(places: Places, overrides: list[str]) -> None:
    """A head that learned something else from features than from frames would be another method."""
    tree = places.config.model_dump(mode="json")
    config = tiny_config(*(f"{key}={value}" for key, value in flat(tree)), *overrides)
    places.encode(places.model(config)).finish()
    _, from_frames = train(places, config, places.model(config), features=False)
    model = places.model(config)
    model.drop_towers()
    assert not any("text_model" in name for name in model.state_dict())
    _, from_features = train(places, config, model, features=True)
    assert len(from_features) == 12
    # float16 keeps 11 bits of each feature; three epochs of three steps and a validation.
    assert from_features == pytest.approx(from_frames, rel=1e-2, abs=2e-2)


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_a_checkpoint_gets_its_towers(places: Places, tmp_path: Path, rng: np.random.Generator) -> None:
    """A trained head without towers can neither search nor be served."""
    config = places.config.model_copy(
        update={"train": places.config.train.model_copy(update={"input": "features"})}
    )
    places.encode(places.model()).finish()
    model = places.model()
    model.drop_towers()
    learner, _ = train(places, config, model, features=True)
    uri = str(tmp_path / "checkpoint")
    save_checkpoint(uri, learner, 3)
    with pytest.raises(CheckpointError, match="has no towers: its run learned from features"):
        load_checkpoint(uri)
    with pytest.raises(ConfigError, match="has no towers"):
        learner.model.encode_text(torch.ones(1, 8, dtype=torch.int64), torch.ones(1, 8))
    complete_checkpoint(uri, places.model())
    whole = load_checkpoint(uri)
    assert towers_sha256(whole.towers) == towers_sha256(places.model().towers)
    for name, tensor in learner.model.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name

    ids = list(ids_in_parts(places.frames, "data"))
    stored = encode_stored(whole, FeatureReader(places.features), ids, batch=5)
    rows = {row.video_id: row for row in read_manifest(places.manifest).rows}
    encoder = Encoder(whole, places.frames)
    clips, texts = encoder.clips(ids), encoder.captions([text for one in ids for text in rows[one].captions])
    assert np.array_equal(stored["video/mask"], clips["mask"])
    assert np.array_equal(stored["text/mask"], texts["mask"])
    assert np.allclose(stored["video/frames"], clips["frames"], atol=2e-2)
    assert np.allclose(stored["text/embedding"], texts["embedding"], atol=2e-2)


def test_adapters_start_as_the_identity(places: Places, rng: np.random.Generator) -> None:
    """Else a run with adapters would start from worse than CLIP."""
    config = tiny_config("model.clip.vocab_size=49408", "model.adapters=true")
    with_adapters, without = places.model(config).eval(), places.model().eval()
    assert places.model(config).state_dict().keys() - without.state_dict().keys() == {
        "adapters.text.weight",
        "adapters.video.weight",
    }
    for name, tensor in without.state_dict().items():
        assert torch.equal(tensor, with_adapters.state_dict()[name]), name
    frames = torch.from_numpy(rng.standard_normal((3, 4, 32), dtype=np.float32))
    mask = torch.ones(3, 4)
    expected = without.video_from_towers(frames, mask).frames
    assert torch.equal(with_adapters.video_from_towers(frames, mask).frames, expected)


def test_features_that_are_not_finite_are_failures(places: Places) -> None:
    """One infinite number in a store ends every training on it, or spoils it silently."""
    model = places.model()
    with torch.no_grad():
        model.towers.clip.visual_projection.weight.mul_(1e9)
    job = places.feature_pass(model)
    for part in job.parts(1):
        FeatureMaker(places.frames, places.features, places.config.features, model).write(part)
    assert not ids_in_parts(places.features, "data")
    failures = read_failures(places.features, ())
    assert len(failures) == 12
    assert {row["stage"] for row in failures.values()} == {"encode"}
    assert all("frames features are not finite in float16" in row["message"] for row in failures.values())


def test_only_what_is_left_or_changed_is_encoded(places: Places) -> None:
    """A store grows with its manifest; what is there is not made again, and new captions are."""
    model = places.model()
    places.encode(model).finish()
    before = FeatureReader(places.features).read(["train1", "train2"])
    manifest = read_manifest(places.manifest)

    def left(rows: tuple[ManifestRow, ...]) -> list[dict[str, Any]]:
        changed = Manifest(rows, benchmark="folder", protocol="own")
        write_manifest(changed, places.manifest)
        return pending_parts(
            changed, places.frames, places.features, workers=1, limit=256, retry_failed=False
        )

    assert left(manifest.rows) == []
    rows = list(manifest.rows)
    rows[1] = ManifestRow("train1", rows[1].uri, None, None, "train", ("all new",))
    (part,) = left(tuple(rows))
    assert part["reuse"]
    assert "train1" in {row["video_id"] for row in part["rows"]}
    # The frames need not be there any more.
    maker = FeatureMaker("/nowhere", places.features, places.config.features, model)
    maker.write(part)
    assert left(tuple(rows)) == []
    after = FeatureReader(places.features).read(["train1", "train2"])
    assert np.array_equal(after["frames"], before["frames"])
    assert after["caption_mask"].sum(axis=1).tolist() == [1, 3]
    assert np.array_equal(after["text"][1], before["text"][1])
