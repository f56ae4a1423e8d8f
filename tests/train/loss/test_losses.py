"""Loss terms: small cases by hand, gradients against finite differences, and their edges.

N texts, M videos, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gare.train.loss.losses import STD_FLOOR, bottleneck, direction, info_nce, radii


@pytest.fixture
def delta(seed: int) -> Tensor:
    """Increments of 4 texts and 5 videos, D = 3."""
    torch.manual_seed(seed)
    return torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)


def test_info_nce_by_hand() -> None:
    """Loss curves must mean what the paper's mean."""
    rows, columns = info_nce(torch.tensor([[1.0, 0.5], [0.0, 1.0]]), torch.tensor(2.0))
    assert float(rows) == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))) / 2)
    assert float(columns) == pytest.approx((math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2)
    rows, columns = info_nce(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor(1.0))
    assert float(rows) == pytest.approx((math.log(1 + math.exp(-1)) + math.log(2)) / 2)
    assert float(columns) == pytest.approx((math.log(2) + math.log(1 + math.exp(-1))) / 2)


def test_debiased_negatives_by_hand(seed: int) -> None:
    """The formula as it is written, at scores where no exponential is lost."""
    torch.manual_seed(seed)
    scores, scale, rate = torch.rand(6, 6, dtype=torch.float64) * 2 - 1, torch.tensor(3.0), 0.1
    expected = []
    for one in (scores, scores.T):
        e = (scale * one).exp()
        positive = e.diagonal()
        negatives = (e.sum(dim=1) - positive) / 5
        least = math.exp(-float(scale))
        guessed = ((negatives - rate * positive) / (1 - rate)).clamp(min=least)
        expected.append((-(positive / (positive + 5 * guessed)).log()).mean())
    found = info_nce(scores, scale, None, rate)
    torch.testing.assert_close(found, tuple(expected))
    # A share near zero is the paper's loss.
    torch.testing.assert_close(info_nce(scores, scale, None, 1e-12), info_nce(scores, scale))


def test_debiased_negatives_are_finite_at_any_score() -> None:
    """κ reaches 100, and the exponential of 200 is no float32."""
    scores = torch.tensor([[1.0, -1.0], [1.0, -1.0]], requires_grad=True)
    for rate in (1e-3, 0.1, 0.9):
        loss = torch.stack(info_nce(scores, torch.tensor(100.0), None, rate)).sum()
        (gradient,) = torch.autograd.grad(loss, scores)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("prior", [0.1, 1.0, 10.0])
def test_bottleneck_by_hand(prior: float) -> None:
    """β weighs it against InfoNCE, so a wrong factor would move every result of Tables 3 and 6."""
    # Video 0: μ = 2, σ = √2. Video 1: μ = 0, σ = 3√2.
    delta = torch.tensor([[[1.0], [-3.0]], [[3.0], [3.0]]], dtype=torch.float64)

    def kl(mean: float, std: float) -> float:
        std += STD_FLOOR
        return 0.5 * ((std**2 + mean**2) / prior**2 - 1 - 2 * math.log(std / prior))

    expected = (kl(2, math.sqrt(2)) + kl(0, 3 * math.sqrt(2))) / 2
    assert float(bottleneck(delta, prior)) == pytest.approx(expected)
    # The same against PyTorch's own KL.
    normal = torch.distributions.Normal
    ours = normal(delta.mean(0), delta.std(0) + STD_FLOOR)
    theirs = torch.distributions.kl_divergence(ours, normal(0.0, prior)).sum(1).mean()
    assert float(bottleneck(delta, prior)) == pytest.approx(float(theirs))


def test_bottleneck_reductions_differ_by_the_width(delta: Tensor) -> None:
    """β = 1e-4 with sum and β = 0.07 with mean are the two conventions; D stands between them."""
    width = delta.shape[-1]
    torch.testing.assert_close(
        bottleneck(delta, reduction="sum"), width * bottleneck(delta, reduction="mean")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bottleneck_survives_equal_increments(seed: int, dtype: torch.dtype) -> None:
    """Clips of one frame give all texts one increment; √ has no slope there, and a nan would end the run."""
    torch.manual_seed(seed)
    one = torch.randn(1, 2, 3, dtype=dtype) * 7
    spread = torch.randn(5, 1, 3, dtype=dtype)
    # A mean of equal numbers may round; these are equal up to that.
    delta = torch.cat([one.expand(5, -1, -1), spread], dim=1).requires_grad_()
    bottleneck(delta).backward()
    assert delta.grad is not None
    assert delta.grad.isfinite().all()
    # σ carries no gradient, so what is left is μ's: μ / (M·N) for every text.
    expected = delta.detach().mean(0)[:2] / (3 * 5)
    torch.testing.assert_close(delta.grad[:, :2], expected.expand(5, -1, -1))
    value = bottleneck(one.expand(5, -1, -1).contiguous())
    by_hand = 0.5 * (STD_FLOOR**2 + one.square() - 1 - 2 * math.log(STD_FLOOR))
    torch.testing.assert_close(value, by_hand.sum(-1).mean())


def test_bottleneck_still_pulls_where_increments_differ_little() -> None:
    """The guard against rounding noise must not swallow small but real differences."""
    delta = 1 + 1e-4 * torch.tensor([[[-1.0]], [[0.0]], [[1.0]]])
    delta.requires_grad_()
    bottleneck(delta).backward()
    assert delta.grad is not None
    # −∂ log σ/∂Δ pushes the outer ones apart.
    assert delta.grad[0, 0, 0] > 1e3
    assert delta.grad[2, 0, 0] < -1e3


def test_radii_by_hand() -> None:
    """The bound λ decides when the term stops; its sign decides whether radii spread or collapse."""
    delta = torch.tensor([[[3.0, 0.0], [0.0, 5.0]], [[1.0, 0.0], [0.0, -1.0]]])
    # Norms 3, 5 (variance 2) and 1, 1 (variance 0).
    assert float(radii(delta, bound=10)) == pytest.approx(-1)
    assert float(radii(delta, bound=0.5)) == -0.5


def test_radii_give_no_gradient_below_the_bound(delta: Tensor) -> None:
    """Else radii would be driven apart for ever and training would diverge."""
    radii(100 * delta, bound=0.5).backward()
    assert delta.grad is not None
    assert not delta.grad.any()
    delta.grad = None
    radii(delta, bound=1e6).backward()
    assert delta.grad.any()


def test_direction_by_hand() -> None:
    """The mean includes j = k: without it every value but that of collapsed increments would be another."""
    delta = torch.tensor([[[2.0, 0.0], [0.0, 3.0]], [[1.0, 0.0], [-1.0, 0.0]], [[1.0, 1.0], [4.0, 4.0]]])
    orthogonal = math.log((1 + math.exp(-2)) / 2 + 1e-8)
    opposite = math.log((1 + math.exp(-4)) / 2 + 1e-8)
    equal = math.log(1 + 1e-8)
    assert float(direction(delta, alpha=2.0)) == pytest.approx((orthogonal + opposite + equal) / 3)
    assert float(direction(delta[:1], alpha=0.5)) == pytest.approx(math.log((1 + math.exp(-0.5)) / 2))


@pytest.mark.parametrize(
    "term",
    [
        bottleneck,
        lambda delta: bottleneck(delta, 0.1, "mean"),
        lambda delta: radii(delta, bound=1e6),
        direction,
        lambda delta: direction(delta, 5.0),
    ],
    ids=["bottleneck", "bottleneck mean", "radii", "direction", "direction alpha 5"],
)
def test_gradients_equal_finite_differences(term: Callable[[Tensor], Tensor], delta: Tensor) -> None:
    """A term whose gradient is not its own trains something else than it reports."""
    assert torch.autograd.gradcheck(term, (delta,))


def test_info_nce_gradient_equals_finite_differences(seed: int) -> None:
    """The same for scores and the learned scale."""
    torch.manual_seed(seed)
    scores = torch.rand(4, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(info_nce, (scores, scale))
    # Away from the bound, where the debiased form has a corner.
    assert torch.autograd.gradcheck(lambda *given: info_nce(*given, None, 0.01), (0.1 * scores, scale))
