"""Products of vectors with each other and the quadratic forms of them, against PyTorch's own."""

from __future__ import annotations

import torch

from gare.model.factorized.quadratic_forms import Length, gram, quadratic_form


def test_gradients_are_those_of_finite_differences(seed: int) -> None:
    """They are written out by hand: else every gradient of the factorised form is wrong."""
    torch.manual_seed(seed)
    vectors = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)

    def form(vectors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return quadratic_form(gram(vectors), weights)

    combined = weights.transpose(1, 2) @ vectors
    torch.testing.assert_close(form(vectors, weights), combined.square().sum(dim=2))
    assert torch.autograd.gradcheck(gram, vectors)
    assert torch.autograd.gradcheck(form, (vectors, weights))


def test_scales_are_those_of_the_vectors(seed: int) -> None:
    """Else increments come out with the wrong length, and so do scores."""
    torch.manual_seed(seed)
    vectors = torch.randn(3, 5, 6, dtype=torch.float64)
    weights = torch.randn(3, 4, 7, dtype=torch.float64)
    combined = vectors[:, -1:] + weights.transpose(1, 2) @ vectors[:, :-1]
    scale, change = Length.of(vectors).scales(weights)
    torch.testing.assert_close(scale.squeeze(1), 1 / combined.square().sum(dim=2).sqrt())
    at_base = 1 / vectors[:, -1].square().sum(dim=1).sqrt()
    torch.testing.assert_close(change.squeeze(1), scale.squeeze(1) - at_base.unsqueeze(1))
    scale, _ = Length.deviation(vectors).scales(weights)
    torch.testing.assert_close(scale.squeeze(1), 1 / (combined.square().mean(dim=2) + 1e-5).sqrt())
