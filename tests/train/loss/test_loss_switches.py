"""The switches of the loss terms: what each changes, by hand and through the objective."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gare.errors import ConfigError
from gare.model.gare import GARE
from gare.train.loss.losses import bottleneck, orthogonality, radii
from gare.train.loss.objective import loss_terms
from tests.helpers.tiny import tiny_batch, tiny_config


@pytest.fixture
def delta(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)


def test_text_anchor_is_the_transpose(delta: Tensor) -> None:
    """Table 9: one Gaussian for each text over the videos."""
    torch.testing.assert_close(bottleneck(delta, anchor="text"), bottleneck(delta.transpose(0, 1)))
    assert abs((bottleneck(delta, anchor="text") - bottleneck(delta)).item()) > 1e-6


def test_normalised_bottleneck_forgets_lengths(delta: Tensor) -> None:
    """Table 6: only the directions are held back."""
    expected = bottleneck(functional.normalize(delta, dim=-1))
    lengths = torch.rand(4, 5, 1, dtype=torch.float64) + 0.5
    torch.testing.assert_close(bottleneck(delta * lengths, normalised=True), expected)
    assert abs((bottleneck(delta * lengths) - expected).item()) > 1e-6


def test_smooth_bound_by_hand(delta: Tensor) -> None:
    """Appendix C.3: near the hard bound far from it, and with a gradient below it."""
    raw = -delta.norm(dim=-1).var(dim=1).mean().item()
    for bound in (0.0, 0.5, 3.0):
        expected = math.log(math.exp(raw) + math.exp(-bound))
        assert radii(delta, bound, "smooth").item() == pytest.approx(expected)
        assert radii(delta, bound, "smooth") >= radii(delta, bound, "hard")
    (gradient,) = torch.autograd.grad(radii(10 * delta, 0.5, "hard"), delta)
    assert not gradient.any()
    (gradient,) = torch.autograd.grad(radii(delta, 0.0, "smooth"), delta)
    assert gradient.any()


def test_orthogonality_by_hand() -> None:
    """Appendix C.2: cos² over the pairs of different videos."""
    angle = math.radians(60)
    delta = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3 * math.cos(angle), 3 * math.sin(angle)]]])
    assert float(orthogonality(delta)) == pytest.approx((0 + 0.25 + 0.75) / 3)


@pytest.mark.parametrize(
    "term",
    [
        orthogonality,
        lambda delta: radii(delta, 1.0, "smooth"),
        lambda delta: bottleneck(delta, normalised=True),
        lambda delta: bottleneck(delta, anchor="text", reduction="mean"),
    ],
)
def test_gradients_equal_finite_differences(term: Callable[[Tensor], Tensor], delta: Tensor) -> None:
    """A gradient that is not the loss's own trains something else."""
    assert torch.autograd.gradcheck(term, (delta,))


SWITCHES = {
    # A term that is off is not computed.
    "loss.bottleneck_weight=0": {"bottleneck"},
    "loss.radii_weight=0": {"radii"},
    "loss.direction_weight=0": {"direction"},
    "loss.kl_reduction=mean": {"bottleneck"},
    "loss.kl_normalised=true": {"bottleneck"},
    "loss.prior_std=0.1": {"bottleneck"},
    "loss.bottleneck_anchor=text": {"bottleneck"},
    "loss.radii_bound_form=smooth": {"radii"},
    "loss.radii_bound=1e-9": {"radii"},
    "loss.direction_alpha=5": {"direction"},
    "loss.direction_form=orthogonality": {"direction"},
}


@pytest.mark.parametrize("override", SWITCHES)
def test_each_switch_reaches_its_term_alone(override: str, seed: int, rng: np.random.Generator) -> None:
    """A switch that is read nowhere, or that moves another term, makes an ablation a fiction."""
    config = tiny_config("loss.radii_bound=0.5")
    batch = tiny_batch(config, rng)
    torch.manual_seed(seed)
    model = GARE(config.model).eval()
    with torch.no_grad():
        text = model.encode_text(batch.token_ids, batch.token_mask)
        video = model.encode_video(batch.frames, batch.frame_mask)
        before = loss_terms(model, text, video, config.loss)
        after = loss_terms(model, text, video, tiny_config("loss.radii_bound=0.5", override).loss)
    changed = {
        name
        for name in ("nce_t2v", "nce_v2t", "bottleneck", "radii", "direction")
        if not torch.equal(getattr(before, name), getattr(after, name))
    }
    assert changed == SWITCHES[override]
    assert not torch.equal(before.total, after.total)
    weights = tiny_config("loss.radii_bound=0.5", override).loss
    expected = (
        (after.nce_t2v + after.nce_v2t) / 2
        + weights.bottleneck_weight * after.bottleneck
        + weights.radii_weight * after.radii
        + weights.direction_weight * after.direction
    )
    torch.testing.assert_close(after.total, expected)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        *(
            (f"loss.dropout_spread=0.3 {setting}", "dropout_spread has no form with")
            for setting in (
                "model.method=direct",
                "model.context=words",
                "model.query=text",
                "model.increment_layers=2",
                "model.increment_dropout_per=pair",
                "model.padding=released",
                "loss.kl_normalised=true",
                "loss.bottleneck_anchor=text",
            )
        ),
        ("loss.false_negatives=0.1 loss.positives=video", "has no form with positives video"),
    ],
)
def test_switches_without_a_common_form_are_refused(override: str, words: str) -> None:
    """A term that is silently left out makes an ablation a fiction."""
    with pytest.raises(ConfigError, match=words):
        tiny_config(*override.split())


def test_a_baseline_beside_it_needs_no_such_form() -> None:
    """A study gives all its levels the same settings."""
    config = tiny_config("loss.dropout_spread=0.3", "model.increment=false", "model.method=direct")
    assert config.loss.dropout_spread == 0.3
