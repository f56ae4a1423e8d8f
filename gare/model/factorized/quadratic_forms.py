"""Squared lengths of combinations of vectors, from the Gram matrix of the vectors.

The quadratic forms here are of Gram matrices, which are symmetric. Autograd does not know that and would
compute every product twice, so the gradients are written out here.

O owners, K vectors of an owner, X combinations of them, D width of the vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gare.tensor_group import TensorGroup

#: ε of every LayerNorm in ψ.
NORM_EPS = 1e-5
#: Lengths below this count as this, as in PyTorch's normalize.
SHORTEST = 1e-12


class _Gram(torch.autograd.Function):
    """G = VVᵀ. From dG = dV·Vᵀ + V·dVᵀ, the gradient of V is (∂G + ∂Gᵀ)V."""

    @staticmethod
    def forward(ctx: Any, vectors_OKD: Tensor) -> Tensor:
        ctx.save_for_backward(vectors_OKD)
        return vectors_OKD @ vectors_OKD.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_OKK: Tensor) -> Tensor:
        (vectors_OKD,) = ctx.saved_tensors
        product: Tensor = (grad_OKK + grad_OKK.transpose(1, 2)) @ vectors_OKD
        return product


def gram(vectors_OKD: Tensor) -> Tensor:
    """Computes the products (O, K, K) of each owner's vectors with each other."""
    products: Tensor = _Gram.apply(vectors_OKD)  # type: ignore[no-untyped-call]
    return products


class _Quadratic(torch.autograd.Function):
    """q = wᵀGw of every column w, for a symmetric G: dq = wᵀdG·w + 2(Gw)ᵀdw."""

    @staticmethod
    def forward(ctx: Any, matrix_OKK: Tensor, weights_OKX: Tensor) -> Tensor:
        product_OKX = matrix_OKK @ weights_OKX
        ctx.save_for_backward(weights_OKX, product_OKX)
        return (weights_OKX * product_OKX).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_OX: Tensor) -> tuple[Tensor, Tensor]:
        weights_OKX, product_OKX = ctx.saved_tensors
        grad_matrix_OKK = (weights_OKX * grad_OX.unsqueeze(1)) @ weights_OKX.transpose(1, 2)
        return grad_matrix_OKK, product_OKX * (2 * grad_OX).unsqueeze(1)


def quadratic_form(matrix_OKK: Tensor, weights_OKX: Tensor) -> Tensor:
    """Computes wᵀGw (O, X) of every column w of the weights, for symmetric matrices G."""
    values: Tensor = _Quadratic.apply(matrix_OKK, weights_OKX)  # type: ignore[no-untyped-call]
    return values


@dataclass(frozen=True, repr=False)
class Length(TensorGroup):
    """The squared length of a base vector plus a combination c of others: at_base + cᵀ(gram·c + 2·slope).

    Attributes:
        gram: (O, K, K) Gram matrix of the others.
        slope: (O, K) their products with the base.
        at_base: (O,) squared length of the base, including any constant that is added to every length.
    """

    gram: Tensor
    slope: Tensor
    at_base: Tensor

    @classmethod
    def of(cls, vectors_OLD: Tensor) -> Length:
        """Builds the length from vectors as they are, the base last."""
        products = gram(vectors_OLD)
        others = products[:, :-1]
        return cls(others[:, :, :-1], others[:, :, -1], products[:, -1, -1].clamp(min=SHORTEST**2))

    @classmethod
    def deviation(cls, vectors_OLD: Tensor) -> Length:
        """Builds it from centred vectors over √D and LayerNorm's ε: its square is LayerNorm's variance."""
        products = gram(vectors_OLD) / vectors_OLD.shape[2]
        others = products[:, :-1]
        return cls(others[:, :, :-1], others[:, :, -1], products[:, -1, -1] + NORM_EPS)

    def scales(self, weights_OKX: Tensor, least: float = NORM_EPS) -> tuple[Tensor, Tensor]:
        """Returns 1 over the length (O, 1, X) of combinations (O, K, X), and how far it is from the base's.

        Squared lengths that rounding takes below ``least`` count as ``least``. The difference is computed
        directly, because subtracting two nearly equal scales would lose its digits in float32.
        """
        along = 2 * self.slope.unsqueeze(1) @ weights_OKX
        change = quadratic_form(self.gram, weights_OKX).unsqueeze(1) + along
        base = self.at_base.reshape(-1, 1, 1)
        scale, at_base = (base + change).clamp(min=least).rsqrt(), base.rsqrt()
        return scale, -change * (scale * at_base).square() / (scale + at_base)
