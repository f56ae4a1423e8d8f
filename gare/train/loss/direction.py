"""Directional diversity of factorised increments, computed with its gradient, a few texts at a time.

Its value needs the cosines of every two increments of a text, M² numbers. Keeping those of all texts for the
backward would take N·M² numbers, so the gradient is computed while they are available.

S sampled texts, M videos, L basis vectors, D embedding width, c texts of a chunk.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gare.model.factorized.quadratic_forms import SHORTEST
from gare.model.products import add_product, multiply
from gare.model.streaming import round_down_to_vector_units
from gare.train.loss.losses import DIRECTION_FLOOR

Form = Literal["log_mean_exp", "orthogonality"]


def factorized_direction(
    weights: Tensor,
    vectors: Tensor,
    owner: Literal["video", "text"],
    form: Form,
    alpha: float,
    memory_bytes: int,
    precision: str = "exact",
) -> Tensor:
    """Computes the sum of the directional diversity of S texts, a scalar.

    The two forms are ``losses.direction`` and ``losses.orthogonality``.

    Args:
        weights: (M, L, S) where videos own the basis, (S, L, M) where texts do.
        vectors: the basis, (M, L, D) or (S, L, D).
        owner: of the basis.
        form: of the diversity.
        alpha: α of log_mean_exp.
        memory_bytes: bytes that a chunk of texts may take.
        precision: of the products, see ``gare.model.products``.
    """
    total: Tensor = _Direction.apply(  # type: ignore[no-untyped-call]
        weights, vectors, owner, form, alpha, memory_bytes, precision
    )
    return total


class _Direction(torch.autograd.Function):
    """Value and gradient in one pass over the texts."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        vectors: Tensor,
        owner: str,
        form: Form,
        alpha: float,
        memory_bytes: int,
        precision: str,
    ) -> Tensor:
        by_video = owner == "video"
        num_texts = weights.shape[2] if by_video else weights.shape[0]
        num_videos = weights.shape[0] if by_video else weights.shape[2]
        width = vectors.shape[2]
        learns = any(ctx.needs_input_grad[:2])
        grad_weights = torch.empty_like(weights) if learns else None
        grad_vectors = torch.zeros_like(vectors) if learns else None
        text_bytes = weights.element_size() * num_videos * (3 * num_videos + 2 * width)
        size = round_down_to_vector_units(memory_bytes // text_bytes)
        total = weights.new_zeros(())
        for first in range(0, num_texts, size):
            some = slice(first, first + size)
            part = weights[:, :, some] if by_video else weights[some]
            basis = vectors if by_video else vectors[some]
            # (M, c, D) or (c, M, D): a batch of small products over the owners.
            delta = multiply(part.transpose(1, 2), basis, precision)
            value, grad = _texts_direction(
                delta.transpose(0, 1) if by_video else delta, form, alpha, precision, learns
            )
            total += value
            if grad is None or grad_weights is None or grad_vectors is None:
                continue
            if by_video:
                grad = grad.transpose(0, 1)
                grad_weights[:, :, some] = multiply(basis, grad.transpose(1, 2), precision)
                add_product(grad_vectors, part, grad, precision)
            else:
                grad_weights[some] = multiply(basis, grad.transpose(1, 2), precision)
                grad_vectors[some] = multiply(part, grad, precision)
        if learns:
            ctx.save_for_backward(grad_weights, grad_vectors)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_weights, grad_vectors = ctx.saved_tensors
        return grad * grad_weights, grad * grad_vectors, None, None, None, None, None


def _texts_direction(
    delta_cMD: Tensor, form: Form, alpha: float, precision: str, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """Computes the sum of the texts' diversities, and its gradient with respect to their increments.

    The M² products are divided by the lengths, not the increments: apart from the two products there is no
    pass over M·D numbers.
    """
    num_videos = delta_cMD.shape[1]
    products_cMM = _products(delta_cMD, precision)
    inverse_cM = products_cMM.diagonal(dim1=1, dim2=2).clamp(min=SHORTEST**2).rsqrt()
    inverse_cMM = inverse_cM.unsqueeze(2) * inverse_cM.unsqueeze(1)
    cosine_cMM = products_cMM.mul_(inverse_cMM)
    if form == "log_mean_exp":
        close_cMM = (alpha * cosine_cMM).sub_(alpha).exp_()
        mean_c11 = close_cMM.mean(dim=(1, 2), keepdim=True) + DIRECTION_FLOOR
        value = mean_c11.log().sum()
        slope_cMM = close_cMM.mul_(2 * alpha / num_videos**2 / mean_c11)
    else:
        cosine_cMM.diagonal(dim1=1, dim2=2).zero_()
        others = num_videos * (num_videos - 1)
        value = cosine_cMM.square().sum() / others
        slope_cMM = cosine_cMM * (4 / others)
    if not learns:
        return value, None
    # Cosines are symmetric, so slopes count twice; Σ_k slope·cos is the part along Δ_ij, which the
    # normalisation removes; it is subtracted from the diagonal.
    along_cM = torch.linalg.vecdot(slope_cMM, cosine_cMM)
    slope_cMM *= inverse_cMM
    slope_cMM.diagonal(dim1=1, dim2=2).sub_(along_cM * inverse_cM.square())
    return value, multiply(slope_cMM, delta_cMD, precision)


def _products(vectors_cMD: Tensor, precision: str) -> Tensor:
    """Computes products (c, M, M) of vectors with each other; one of two equal quarters is copied."""
    count = vectors_cMD.shape[1]
    products_cMM = vectors_cMD.new_empty(len(vectors_cMD), count, count)
    first, second = slice(0, count // 2), slice(count // 2, count)
    products_cMM[:, first] = multiply(vectors_cMD[:, first], vectors_cMD.transpose(1, 2), precision)
    products_cMM[:, second, first] = products_cMM[:, first, second].transpose(1, 2)
    lower = vectors_cMD[:, second]
    products_cMM[:, second, second] = multiply(lower, lower.transpose(1, 2), precision)
    return products_cMM
