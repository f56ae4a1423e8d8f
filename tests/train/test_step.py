"""One optimiser step: repeatable to the bit, and never a step on numbers that are none."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gare.config import Config
from gare.data.batch import Batch
from gare.data.images import normalise
from gare.errors import GareError
from gare.model.gare import GARE
from gare.train.checkpoint.files import restore_learner, save_checkpoint
from gare.train.optim.optimizer import build_optimizer, clip_gradients, rate_factor, set_learning_rate
from gare.train.step import Learner, build_learner, step_seed, train_step
from tests.helpers.tiny import tiny_batch, tiny_config

STEPS = 6


def new_learner(config: Config, seed: int) -> Learner:
    torch.manual_seed(seed)
    return build_learner(GARE(config.model), config, STEPS, torch.device("cpu"))


def batches_of(config: Config, rng: np.random.Generator) -> list[Batch]:
    return [tiny_batch(config, rng) for _ in range(STEPS)]


def test_same_seed_gives_the_same_losses_bit_for_bit(seed: int, rng: np.random.Generator) -> None:
    """Else no result could be repeated, and no fault found by running again."""
    config = tiny_config(f"train.seed={seed}")
    batches = batches_of(config, rng)
    runs = []
    for noise in (1, 2):
        learner = new_learner(config, seed)
        values = []
        for batch in batches:
            torch.randn(noise)  # what else draws numbers in the process must not matter
            values.append(train_step(learner, batch))
        runs.append(values)
    assert runs[0] == runs[1]
    assert len({values["loss/total"] for values in runs[0]}) == STEPS
    other = tiny_config(f"train.seed={seed ^ 1}")
    assert train_step(new_learner(other, seed), batches[0])["loss/total"] != runs[0][0]["loss/total"], (
        "dropout does not follow the seed"
    )


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_frames_are_normalised_where_they_are_encoded(
    micro_batch: int, seed: int, rng: np.random.Generator
) -> None:
    """A batch of 8-bit frames is the same as one of floats, in a quarter of the memory."""
    config = tiny_config(f"train.seed={seed}", f"train.micro_batch={micro_batch}")
    batch = tiny_batch(config, rng)
    shape = (*batch.frames.shape[:2], 16, 16, 3)
    pictures = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    floats = replace(batch, frames=normalise(pictures))
    eight_bit = replace(batch, frames=pictures, token_ids=batch.token_ids.int())
    losses = [
        [train_step(learner, one)["loss/total"] for _ in range(2)]
        for learner, one in ((new_learner(config, seed), floats), (new_learner(config, seed), eight_bit))
    ]
    assert losses[0] == losses[1]


def test_a_restored_run_continues_bit_for_bit(seed: int, rng: np.random.Generator, tmp_path: Path) -> None:
    """Else a run that was interrupted is another run, and its curve has a step where it was resumed."""
    config = tiny_config(f"train.seed={seed}")
    batches = batches_of(config, rng)
    learner = new_learner(config, seed)
    losses = []
    for step, batch in enumerate(batches):
        if step == 3:
            save_checkpoint(str(tmp_path), learner, epoch=2)
        losses.append(train_step(learner, batch))
    restored = new_learner(config, seed + 1)
    train_step(restored, batches[5])
    assert restore_learner(str(tmp_path), restored) == 2
    assert restored.step == 3
    assert [train_step(restored, batch) for batch in batches[3:]] == losses[3:]
    for name, value in learner.model.state_dict().items():
        assert torch.equal(restored.model.state_dict()[name], value), name


def test_training_learns(seed: int, rng: np.random.Generator) -> None:
    """The smallest sign that gradients point downhill: one batch, seen again, is told apart better."""
    config = tiny_config("train.lr=3e-3", "train.clip_lr=3e-3", "train.warmup_fraction=0")
    torch.manual_seed(seed)
    learner = build_learner(GARE(config.model), config, 60, torch.device("cpu"))
    batch = tiny_batch(config, rng)
    contrast = []
    for _ in range(30):
        values = train_step(learner, batch)
        contrast.append((values["loss/nce_t2v"] + values["loss/nce_v2t"]) / 2)
    assert contrast[-1] < 0.5 * contrast[0]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_numbers_that_are_none_end_the_run_before_the_step(
    seed: int, rng: np.random.Generator, where: str
) -> None:
    """Else all weights turn to nan, and the next checkpoint with them."""
    config = tiny_config()
    learner = new_learner(config, seed)
    batch = tiny_batch(config, rng)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    if where == "loss":
        batch.frames[0, 0, 0, 0, 0] = torch.nan
    else:
        learner.model.logit_scale.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(GareError, match="step 0"):
        train_step(learner, batch)
    assert learner.step == 0
    for name, value in learner.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_term_that_is_off_does_not_count(seed: int, rng: np.random.Generator) -> None:
    """Table 3 switches terms one by one; a weight of zero must leave InfoNCE alone, whatever the term is."""
    off = ("loss.bottleneck_weight=0", "loss.radii_weight=0", "loss.direction_weight=0")
    config = tiny_config(*off)
    values = train_step(new_learner(config, seed), tiny_batch(config, rng))
    expected = (values["loss/nce_t2v"] + values["loss/nce_v2t"]) / 2
    assert values["loss/total"] == pytest.approx(expected, rel=1e-6)
    on = tiny_config("loss.kl_reduction=mean", "loss.prior_std=2", "loss.direction_alpha=3")
    values = train_step(new_learner(on, seed), tiny_batch(on, rng))
    loss = on.loss
    expected = (
        (values["loss/nce_t2v"] + values["loss/nce_v2t"]) / 2
        + loss.bottleneck_weight * values["loss/bottleneck"]
        + loss.radii_weight * values["loss/radii"]
        + loss.direction_weight * values["loss/direction"]
    )
    assert values["loss/total"] == pytest.approx(expected, rel=1e-5)


def test_the_scale_stays_at_100_or_below(seed: int, rng: np.random.Generator) -> None:
    """CLIP's clamp: beyond it the softmax saturates and training stops."""
    config = tiny_config("train.clip_lr=1", "train.warmup_fraction=0")
    learner = new_learner(config, seed)
    with torch.no_grad():
        learner.model.logit_scale.fill_(4.6)
    learner.model.logit_scale.register_hook(lambda grad: -torch.ones_like(grad))
    assert train_step(learner, tiny_batch(config, rng))["train/scale"] == pytest.approx(np.exp(4.6), rel=1e-5)
    assert learner.model.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)


def test_parameter_groups(seed: int) -> None:
    """CLIP's rate is a thousandth of the rest's; a parameter in the wrong group wrecks pretrained towers."""
    config = tiny_config("train.clip_lr=1e-7", "train.lr=1e-4", "train.weight_decay=0.2")
    torch.manual_seed(seed)
    model = GARE(config.model)
    optimizer = build_optimizer(model, config.train)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = group_of[id(parameter)]
        assert group["peak_lr"] == (1e-7 if name.startswith("towers.") else 1e-4), name
        assert group["weight_decay"] == (0 if name.endswith("bias") else 0.2), name
    assert all(group["betas"] == (0.9, 0.98) and group["eps"] == 1e-6 for group in optimizer.param_groups)
    assert set_learning_rate(optimizer, 0, 9, config.train) == rate_factor(0, 9, 0.1)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(group["peak_lr"] * rate_factor(0, 9, 0.1))


def test_schedule() -> None:
    """Linear warm-up, then the cosine of the whole run, not restarted: rates of the paper at each step."""
    factors = [rate_factor(step, 99, 0.1) for step in range(99)]
    assert factors[:9] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    assert factors[9] == pytest.approx(0.5 * (1 + np.cos(0.1 * np.pi)))
    assert factors[49] == pytest.approx(0.5)
    assert all(after < before for before, after in itertools.pairwise(factors[9:]))
    assert 0 < factors[98] < 1e-3
    assert rate_factor(0, 1, 1.0) == pytest.approx(0.5)
    assert rate_factor(0, 1, 0.0) == pytest.approx(0.5)


def test_gradient_clip(seed: int) -> None:
    """The norm that is logged is the one before clipping; after it, none is longer than asked."""
    torch.manual_seed(seed)
    layer = torch.nn.Linear(3, 3)
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    assert clip_gradients(layer, 1.0) == pytest.approx(2 * 12**0.5)
    after = torch.cat([parameter.grad.flatten() for parameter in layer.parameters()])
    assert float(after.norm()) == pytest.approx(1, rel=1e-4)


def test_step_seeds_differ() -> None:
    """Neighbouring seeds and steps must not share dropout: seed + step would."""
    seeds = {step_seed(seed, step) for seed in range(40) for step in range(40)}
    assert len(seeds) == 1600
    assert all(0 <= value < 2**63 for value in seeds)
