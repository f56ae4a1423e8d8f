"""What loaders hand over: planned clips with their captions, the same whoever loads them, in any pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gare.config import Config
from gare.data.images import crop_centre
from gare.data.manifest import Manifest, write_manifest
from gare.data.splits import StoredSplits, read_splits
from gare.data.store.frame_reader import FrameReader
from gare.errors import ConfigError
from gare.model.encoders.tokenizer import tokenize
from gare.model.gare import GARE
from gare.train.input.inputs import FeatureInput, FrameInput, input_of
from gare.train.input.loader import Arrays, FrameLoader, WorkerBatches, clip_seeds
from gare.train.input.plan import plan_run
from gare.train.input.sampler import step_seed
from tests.helpers.manifests import rows_of_splits
from tests.helpers.stores import write_store
from tests.helpers.tiny import tiny_config

CPU = torch.device("cpu")
EVERYTHING = ("augment.operations=4", "augment.probability=1", "augment.flip=0.5", "augment.crop_scale=0.6")
WHOLE = ("extract.crop=none", "extract.encoding=jpeg")


def splits_in(folder: Path, config: Config, rng: np.random.Generator) -> StoredSplits:
    """A store of 9 videos to train on, with one to three captions each, and 4 for val."""
    rows = rows_of_splits({"train": 9, "val": 4}, lambda split, index, take: f"{split} {index}, take {take}")
    manifest = str(folder / "manifest.parquet")
    write_manifest(Manifest(rows, benchmark="folder", protocol="own"), manifest)
    write_store(str(folder / "frames"), config.extract, [row.video_id for row in rows], rng)
    return read_splits(manifest, str(folder / "frames"), config.extract)


def plan_of(config: Config, splits: StoredSplits, rank: int = 0, workers: int = 1) -> WorkerBatches:
    captions = [len(row.captions) for row in splits.train]
    plan = plan_run(captions, len(splits.val), config.train, rank=rank, world_size=workers)
    return WorkerBatches(plan, splits.ids())


def load_in_pieces(load: FrameLoader, listed: WorkerBatches, size: int) -> list[dict[str, np.ndarray]]:
    """Every batch of a plan, loaded in pieces of so many rows and put together."""
    batches = []
    for number, batch in enumerate(listed.plan.batches):
        starts = range(0, len(batch.videos), size)
        parts: list[Arrays] = [load(number, at, min(at + size, len(batch.videos))) for at in starts]
        batches.append(
            {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "seconds"}
        )
    return batches


@pytest.mark.parametrize("overrides", [(), WHOLE], ids=["squares", "whole"])
def test_the_same_clips_in_any_pieces_and_for_any_workers(
    overrides: tuple[str, ...], rng: np.random.Generator, seed: int, tmp_path: Path
) -> None:
    """A run with more loaders, on more workers or continued would learn from other pictures, bit for bit."""
    config = tiny_config(*EVERYTHING, *overrides, f"train.seed={seed}")
    splits = splits_in(tmp_path, config, rng)
    source = FrameInput(config, str(tmp_path / "frames"))
    shared, model = source.shared_data(splits), GARE(config.model)

    def batches(size: int, rank: int = 0, workers: int = 1) -> list[dict[str, np.ndarray]]:
        listed = plan_of(config, splits, rank, workers)
        load = source.loader(listed, shared, CPU, model)()
        assert isinstance(load, FrameLoader)
        found = load_in_pieces(load, listed, size)
        kinds = [batch.kind for batch in listed.plan.batches]
        return [one for one, kind in zip(found, kinds, strict=True) if kind == "train"]

    whole = batches(100)
    assert len(whole) == config.train.epochs * 3
    assert whole[0]["frames"].shape == (6, 4, 16, 16, 3)
    for other in (batches(1), batches(4)):
        for ours, theirs in zip(whole, other, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    for ours, *shares in zip(whole, batches(2, 0, 2), batches(2, 1, 2), strict=True):
        assert all(np.array_equal(ours[name], np.concatenate([s[name] for s in shares])) for name in ours)


def test_clips_come_with_their_captions(rng: np.random.Generator, tmp_path: Path) -> None:
    """A caption beside another clip is a wrong label that no metric shows."""
    config = tiny_config("model.clip.vocab_size=49408")
    splits = splits_in(tmp_path, config, rng)
    source, listed = FrameInput(config, str(tmp_path / "frames")), plan_of(config, splits)
    load = source.loader(listed, source.shared_data(splits), CPU, GARE(config.model))()
    reader = FrameReader(str(tmp_path / "frames"))
    for number, batch in enumerate(listed.plan.batches):
        found = load(number, 0, len(batch.videos))
        rows = [splits.of_split(batch.kind)[video] for video in batch.videos]
        frames, mask = reader.read([row.video_id for row in rows])
        assert np.array_equal(found["frames"], frames)
        assert np.array_equal(found["frame_mask"], mask)
        if batch.kind == "train":
            texts = [row.captions[caption] for row, caption in zip(rows, batch.captions, strict=True)]
            assert np.array_equal(found["video_ids"], batch.videos)
        else:
            texts = [text for row in rows for text in row.captions]
            assert found["caption_counts"].tolist() == [len(row.captions) for row in rows]
        ids, token_mask = tokenize(texts, config.model.max_words)
        assert np.array_equal(found["token_ids"], ids.numpy())
        assert np.array_equal(found["token_mask"], token_mask.numpy())
        assert found["seconds"].shape == (1, 3)
        assert found["seconds"][0, 0] > 0  # fetching; raw frames need no decoding
        assert not found["seconds"][0, 1:].any()


def test_the_two_places_take_the_same_frames(rng: np.random.Generator, tmp_path: Path) -> None:
    """A GPU gets whole frames of different sizes; a mirror, which is exact, shows where each one lands."""
    config = tiny_config(*WHOLE, "augment.flip=0.5")
    splits = splits_in(tmp_path, config, rng)
    store, listed = str(tmp_path / "frames"), plan_of(config, splits)
    source = FrameInput(config, store)
    tokens = source.shared_data(splits)
    here = FrameLoader(store, listed, tokens, augment=config.augment, seed=config.train.seed)
    there = FrameLoader(store, listed, tokens, whole=True)
    batch = listed.plan.batches[0]
    loaded = there(0, 0, len(batch.videos))
    assert len({tuple(size) for size in loaded["sizes"]}) > 1, "all of one size"
    tensors = {name: torch.from_numpy(loaded[name]) for name in ("pixels", "sizes", "frame_mask")}
    seeds = clip_seeds(config.train.seed, batch)
    found = source.augment_whole(tensors, seeds)
    assert torch.equal(found, torch.from_numpy(here(0, 0, len(batch.videos))["frames"]))
    plain = FrameReader(store).read([listed.ids["train"][video] for video in batch.videos])[0]
    mirrored = [not np.array_equal(one, other) for one, other in zip(found.numpy(), plain, strict=True)]
    assert 0 < sum(mirrored) < len(mirrored) or len(mirrored) < 6


def test_seeds_are_of_the_pair() -> None:
    """Another seed for the same pair on another worker would change what it learns from."""
    config = tiny_config()
    batch = plan_run([2, 2, 2], 0, config.train, rank=0, world_size=1).batches[0]
    seeds = clip_seeds(7, batch)
    assert seeds == [
        step_seed(7, 0, video, caption) for video, caption in zip(batch.videos, batch.captions, strict=True)
    ]
    assert len(set(seeds)) == 6


def test_the_centre_is_the_same_for_arrays_and_tensors(rng: np.random.Generator) -> None:
    """Training on a GPU would see other pictures than evaluation."""
    pictures = rng.integers(0, 256, (2, 3, 9, 14, 3), dtype=np.uint8)
    found = crop_centre(torch.from_numpy(pictures), 9)
    assert np.array_equal(found.numpy(), crop_centre(pictures, 9))
    assert found.shape == (2, 3, 9, 9, 3)


def test_a_store_of_other_picture_sizes_is_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    """It is the configuration that is wrong, and nothing has been written yet: one message, status 2."""
    config = tiny_config()
    splits_in(tmp_path, config, rng)
    other = tiny_config("extract.image_size=24", "model.clip.image_size=24")
    with pytest.raises(ConfigError, match="16 px in the store") as raised:
        FrameInput(other, str(tmp_path / "frames")).check_store()
    assert raised.value.where == "model.clip.image_size"
    FrameInput(config, str(tmp_path / "frames")).check_store()


def test_the_input_is_chosen_once() -> None:
    """A run of features that reads frames would need towers that its workers do not have."""
    assert isinstance(input_of(tiny_config(), "a", "b"), FrameInput)
    features = input_of(tiny_config("train.input=features"), "a", "b", {"kind": "features"})
    assert isinstance(features, FeatureInput)
    assert features.store == "b"
    assert features.store_settings == {"kind": "features"}
