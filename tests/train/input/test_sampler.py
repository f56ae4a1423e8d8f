"""The order of training pairs and the plan of each worker: the same data whatever the number of workers."""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest

from gare.config import TrainConfig
from gare.errors import ConfigError, DataError
from gare.train.input.plan import Plan, plan_run
from gare.train.input.sampler import epoch_batches


@pytest.fixture
def num_captions(rng: np.random.Generator) -> list[int]:
    return rng.integers(1, 6, 50).tolist()


def train_batches(plan: Plan) -> list[np.ndarray]:
    return [
        np.stack([batch.videos, batch.captions], axis=1) for batch in plan.batches if batch.kind == "train"
    ]


def config(seed: int = 0, **settings: int) -> TrainConfig:
    return TrainConfig(**{"seed": seed, "epochs": 3, "batch_size": 8, **settings})


def test_every_pair_is_seen_at_most_once_an_epoch(num_captions: list[int], seed: int) -> None:
    """Else some captions weigh double and others are never learnt."""
    total = sum(num_captions)
    batches = epoch_batches(num_captions, batch_size=8, seed=seed, epoch=0)
    assert batches.shape == (total // 8, 8, 2)
    pairs = [tuple(pair) for pair in batches.reshape(-1, 2).tolist()]
    assert len(set(pairs)) == len(pairs)
    assert all(0 <= caption < num_captions[video] for video, caption in pairs)
    # What one epoch leaves out, others have.
    seen = set(pairs)
    for epoch in range(1, 40):
        again = epoch_batches(num_captions, batch_size=8, seed=seed, epoch=epoch).reshape(-1, 2)
        seen |= {tuple(pair) for pair in again.tolist()}
    assert len(seen) == total


def test_order_follows_seed_and_epoch_alone(num_captions: list[int], seed: int) -> None:
    """A resumed epoch must be the epoch that was interrupted, and the next one must not repeat it."""
    one = epoch_batches(num_captions, batch_size=8, seed=seed, epoch=1)
    np.random.default_rng(0).random(10)
    assert np.array_equal(one, epoch_batches(num_captions, batch_size=8, seed=seed, epoch=1))
    assert not np.array_equal(one, epoch_batches(num_captions, batch_size=8, seed=seed, epoch=2))
    assert not np.array_equal(one, epoch_batches(num_captions, batch_size=8, seed=seed + 1, epoch=1))
    assert not np.array_equal(one, epoch_batches(num_captions, batch_size=8, seed=seed + 1, epoch=0))


def test_captions_a_video_are_drawn_anew(seed: int) -> None:
    """Else most of a data set's captions are never seen."""
    num_captions = [5, 1, 3, 4, 9, 2, 2, 7]
    drawn = set()
    for epoch in range(30):
        batches = epoch_batches(num_captions, batch_size=2, seed=seed, epoch=epoch, captions_per_video=2)
        pairs = batches.reshape(-1, 2)
        counts = Counter(pairs[:, 0].tolist())
        assert all(counts[video] <= min(2, count) for video, count in enumerate(num_captions))
        assert len(pairs) == 14  # seven videos with two, one with one, in batches of two
        drawn |= {tuple(pair) for pair in pairs.tolist()}
    assert len(drawn) == sum(num_captions)


def test_too_few_pairs_are_refused() -> None:
    """A run of no steps must not end as if it had trained."""
    with pytest.raises(DataError, match="7 text-video pairs do not fill a batch of 8"):
        epoch_batches([3, 4], batch_size=8, seed=0, epoch=0)
    with pytest.raises(DataError, match="0 text-video pairs"):
        plan_run([], 3, config(), rank=0, world_size=1)


@pytest.mark.parametrize("workers", [2, 3, 4, 8])
def test_workers_share_the_same_global_batches(num_captions: list[int], seed: int, workers: int) -> None:
    """Two workers must train what one trains, or results could not be compared between machines."""
    alone = plan_run(num_captions, 13, config(seed), rank=0, world_size=1)
    plans = [
        plan_run(num_captions, 13, config(seed), rank=rank, world_size=workers) for rank in range(workers)
    ]
    joined = [np.concatenate(parts) for parts in zip(*map(train_batches, plans), strict=True)]
    assert len(joined) == len(train_batches(alone)) == alone.num_steps
    for ours, theirs in zip(joined, train_batches(alone), strict=True):
        assert np.array_equal(ours, theirs)
    for plan in plans:
        assert plan.num_steps == alone.num_steps
        assert len(plan.epoch_starts) == 3
        assert plan.epoch_starts[0] == 0
        for epoch, start in enumerate(plan.epoch_starts):
            assert plan.batches[start].kind == "train"
            assert plan.batches[start].epoch == epoch
            assert start == 0 or plan.batches[start - 1].epoch == epoch - 1


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("num_val", [0, 1, 3, 13])
def test_every_val_clip_is_seen_once(num_captions: list[int], seed: int, workers: int, num_val: int) -> None:
    """A clip seen twice, or dropped to make shares equal, changes R@1 on val and so the best checkpoint."""
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for rank in range(workers):
        for batch in plan_run(num_captions, num_val, config(seed), rank=rank, world_size=workers).batches:
            if batch.kind == "val":
                assert 0 < len(batch.videos) <= -(-8 // workers)
                seen[batch.epoch] += batch.videos.tolist()
    assert all(sorted(videos) == list(range(num_val)) for videos in seen.values())


def test_max_steps_ends_the_run(num_captions: list[int], seed: int) -> None:
    """A smoke run of a few steps must still end in a validation and a checkpoint."""
    whole = plan_run(num_captions, 4, config(seed), rank=0, world_size=1)
    per_epoch = whole.num_steps // 3
    for limit in (1, per_epoch, per_epoch + 1):
        plan = plan_run(num_captions, 4, config(seed, max_steps=limit), rank=0, world_size=1)
        assert plan.num_steps == len(train_batches(plan)) == limit
        assert plan.batches[-1].kind == "val"
        assert len(plan.epoch_starts) == -(-limit // per_epoch)
        for ours, theirs in zip(train_batches(plan), train_batches(whole), strict=False):
            assert np.array_equal(ours, theirs)
    assert plan_run(num_captions, 4, config(seed, max_steps=9999), rank=0, world_size=1).num_steps == (
        whole.num_steps
    )


def test_a_batch_that_workers_cannot_share_is_refused(num_captions: list[int]) -> None:
    """A worker without a pair has nothing to do, and none of its gradients exist."""
    with pytest.raises(ConfigError, match="8 pairs cannot be shared by 9 workers"):
        plan_run(num_captions, 0, config(), rank=0, world_size=9)


def test_no_video_twice_in_a_batch(seed: int) -> None:
    """Two captions of one video in a batch are each other's negatives, though both are right."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 9, 40).tolist()
    batches = epoch_batches(counts, batch_size=16, seed=seed, epoch=0, unique_videos=True)
    plain = epoch_batches(counts, batch_size=16, seed=seed, epoch=0)
    assert any(len(set(batch[:, 0])) < 16 for batch in plain)
    assert all(len(set(batch[:, 0])) == 16 for batch in batches)
    pairs = [tuple(pair) for pair in batches.reshape(-1, 2)]
    assert len(set(pairs)) == len(pairs)
    assert all(caption < counts[video] for video, caption in pairs)
    # Few are left out: what cannot be dealt without repeats at the end.
    assert len(batches) >= len(plain) - 3
    again = epoch_batches(counts, batch_size=16, seed=seed, epoch=0, unique_videos=True)
    assert np.array_equal(batches, again)


def test_too_few_videos_for_a_batch_without_repeats() -> None:
    """Said before a cluster has started."""
    with pytest.raises(DataError, match="3 videos do not fill a batch of 4"):
        epoch_batches([5, 5, 5], batch_size=4, seed=0, epoch=0, unique_videos=True)


#: First digits of the SHA-256 of epochs as the first implementation drew them, pair by pair: data sets of
#: numbers of captions, settings, epochs 0 and 3.
GOLDEN = {
    ("few", 0, False): ("e5abd66ddc91e871", "f05cc7964239bfe2"),
    ("few", 2, False): ("c9e5d1a69b19cf28", "20f12223dd433401"),
    ("few", 0, True): ("d9a109b45e5af8e1", "78cc8e42df697ffb"),
    ("few", 3, True): ("1a5ba466a1175c79", "456b8b3b5b3a214a"),
    ("many", 0, False): ("e657f252649e36dd", "36df04d2bc45ec83"),
    ("many", 2, False): ("0127f69ae6b61f6a", "202c448d80e47e68"),
    ("many", 0, True): ("bf2e1b60ccc097c1", "79aab55478490c75"),
    ("many", 3, True): ("fa10b936021a22cd", "5ee2c5c455eb0393"),
    ("one", 0, False): ("14262bf6a27b4a9d", "271d242ec563523e"),
    ("one", 3, True): ("14262bf6a27b4a9d", "271d242ec563523e"),
}


@pytest.mark.parametrize(("data", "drawn", "unique"), list(GOLDEN))
def test_the_order_is_that_of_the_first_implementation(data: str, drawn: int, unique: bool) -> None:
    """A run that is resumed with a later version would see pairs twice, and others never."""
    rng = np.random.default_rng(7)
    counts = {"few": rng.integers(1, 6, 50), "many": rng.integers(1, 30, 400), "one": np.ones(300, np.int64)}
    num_captions = counts[data].tolist()
    settings: dict[str, Any] = {"captions_per_video": drawn, "unique_videos": unique}
    train = TrainConfig(seed=11, epochs=4, batch_size=16, **settings)
    plan = plan_run(num_captions, 0, train, rank=0, world_size=1)
    for epoch, digest in zip((0, 3), GOLDEN[data, drawn, unique], strict=True):
        batches = epoch_batches(num_captions, batch_size=16, seed=11, epoch=epoch, **settings)
        assert hashlib.sha256(batches.tobytes()).hexdigest()[:16] == digest
        planned = np.stack(train_batches(plan))
        first = sum(plan.epoch_steps()[:epoch])
        assert np.array_equal(planned[first : first + len(batches)], batches)


def test_a_plan_is_sent_without_its_batches(seed: int) -> None:
    """All epochs' pairs were pickled to each loader, as Python objects."""
    plan = plan_run([3] * 20_000, 50, config(seed, epochs=9), rank=1, world_size=2)
    last = plan.batches[len(plan.batches) - 60]
    sent = pickle.dumps(plan)
    assert len(sent) < 5 * 20_000
    again = pickle.loads(sent)
    found = again.batches[len(plan.batches) - 60]
    assert np.array_equal(found.videos, last.videos)
    assert np.array_equal(found.captions, last.captions)
    for number in (0, len(plan.batches) // 2, len(plan.batches) - 1):
        assert plan.size(number) == len(plan.batches[number].videos)
        assert plan.kind(number) == plan.batches[number].kind
    with pytest.raises(IndexError):
        plan.batches[len(plan.batches)]
