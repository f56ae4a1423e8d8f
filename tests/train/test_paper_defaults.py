"""The paper's numbers where a run gets them: defaults, ψ's start, the optimiser as it is built."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gare.config import LossConfig, ModelConfig
from gare.train.checkpoint.initial_model import initial_model
from gare.train.step import build_learner, train_step
from tests.helpers.tiny import tiny_batch, tiny_config


def test_defaults_are_the_variants_tables() -> None:
    """A run without settings must be the paper's MSR-VTT model."""
    loss, model = LossConfig(), ModelConfig()
    assert (loss.bottleneck_weight, loss.radii_weight, loss.direction_weight) == (1e-4, 0.01, 0.01)
    assert (loss.radii_bound, loss.direction_alpha, loss.prior_std) == (0.5, 2.0, 1.0)
    assert (loss.kl_reduction, loss.kl_normalised, loss.bottleneck_anchor) == ("sum", False, "video")
    assert (loss.radii_bound_form, loss.direction_form, loss.positives) == (
        "hard",
        "log_mean_exp",
        "diagonal",
    )
    assert (model.corrected_side, model.context, model.gap_sign, model.query) == ("text", "frames", 1, "gap")
    assert (model.pool_temperature, model.increment_dropout, model.increment_heads) == (3.0, 0.3, 1)


def test_increment_starts_as_released(seed: int) -> None:
    """N(0, 0.02²) weights and zero biases, over the identity that the released code overwrites."""
    torch.manual_seed(seed)
    increment = initial_model(tiny_config("model.clip.embed_dim=256")).increment
    assert increment is not None
    for linear in (increment.mean, increment.first.query, increment.first.out):
        assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert not linear.bias.any()


@pytest.mark.parametrize("optimizer", ["bert_adam", "adamw"])
def test_optimizer_is_built_with_the_papers_numbers(optimizer: str, rng: np.random.Generator) -> None:
    """And gradients are clipped to the norm that the configuration says before it steps."""
    config = tiny_config(f"train.optimizer={optimizer}", "train.max_grad_norm=0.01")
    learner = build_learner(initial_model(config), config, 10, torch.device("cpu"))
    assert all(group["betas"] == (0.9, 0.98) for group in learner.optimizer.param_groups)
    assert all(group["eps"] == 1e-6 for group in learner.optimizer.param_groups)
    values = train_step(learner, tiny_batch(config, rng))
    assert values["train/grad_norm"] > 0.01
    grads = [p.grad.flatten() for p in learner.model.parameters() if p.grad is not None]
    assert float(torch.cat(grads).norm()) == pytest.approx(0.01, rel=1e-3)
