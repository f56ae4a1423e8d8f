"""Augmentation: one transform a clip, by its own seed, and none where none is asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gare.config import AugmentConfig
from gare.data.augment import augment

EVERYTHING = AugmentConfig(operations=15, crop_scale=0.3, flip=0.5)


def still_clips(rng: np.random.Generator, clips: int, frames: int) -> Tensor:
    """Clips whose frames are all equal, each with its own picture."""
    pictures = torch.from_numpy(rng.integers(0, 256, (clips, 1, 24, 24, 3), dtype=np.uint8))
    return pictures.repeat(1, frames, 1, 1, 1)


def test_nothing_by_default(rng: np.random.Generator) -> None:
    """Scores of a run that asked for no augmentation must not depend on it."""
    frames = still_clips(rng, 2, 3)
    assert augment(frames, AugmentConfig(), [1, 2]) is frames


@pytest.mark.parametrize(
    "config",
    [EVERYTHING, AugmentConfig(operations=4), AugmentConfig(crop_scale=0.5), AugmentConfig(flip=0.5)],
)
def test_all_frames_of_a_clip_change_alike(
    config: AugmentConfig, rng: np.random.Generator, seed: int
) -> None:
    """Else augmentation would add a flicker that no video has, and hide what moves."""
    frames = still_clips(rng, 1, 5).repeat(20, 1, 1, 1, 1)
    state = torch.get_rng_state()
    out = augment(frames, config, range(seed, seed + 20))
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers moved"
    assert out.shape == frames.shape
    assert out.dtype == torch.uint8
    assert (out == out[:, :1]).all()
    assert len({clip[0].numpy().tobytes() for clip in out}) > 1, "all clips got the same transform"


def test_a_clip_depends_on_its_seed_alone(rng: np.random.Generator) -> None:
    """The number of workers decides who augments a clip and beside which others; it must not show."""
    frames = still_clips(rng, 4, 2)
    out = augment(frames, EVERYTHING, [5, 6, 7, 8])
    torch.testing.assert_close(augment(frames[2:], EVERYTHING, [7, 8]), out[2:], rtol=0, atol=0)
    torch.testing.assert_close(augment(frames, EVERYTHING, [5, 6, 7, 8]), out, rtol=0, atol=0)
    assert not torch.equal(augment(frames, EVERYTHING, [9, 10, 11, 12]), out)


def test_a_flip_is_a_mirror(rng: np.random.Generator) -> None:
    """And no other change."""
    frames = still_clips(rng, 1, 2)
    out = augment(frames, AugmentConfig(flip=1.0), [0])
    assert torch.equal(out, frames.flip(3))


def test_magnitude_is_timms_scale(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """7 of 10 there is 21 of 30 in kornia; a mix-up would be a third of the augmentation."""
    from kornia.augmentation.auto import RandAugment

    seen: list[float] = []
    original = RandAugment.forward_parameters

    def record(self: RandAugment, batch_shape: torch.Size) -> object:
        seen.append(self.m)
        return original(self, batch_shape)

    monkeypatch.setattr(RandAugment, "forward_parameters", record)
    augment(still_clips(rng, 100, 1), AugmentConfig(operations=4), range(100))
    assert len(seen) == 400
    assert np.mean(seen) == pytest.approx(21, abs=0.4)
    assert np.std(seen) == pytest.approx(1.5, abs=0.3)
