"""The analytic trust-region step on the increments, from the paper's derivation.

From a state Δ of the pairs, InfoNCE falls along −g_ij = −∂L/∂Δ_ij; the largest step that keeps
‖Δ_ij − α·g_ij‖ ≤ ε is compared with the increments that ψ has learned. It uses the direct form, so it is for
small batches.

N texts and videos of a batch, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from gare.errors import ConfigError
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.train.loss.losses import info_nce


@dataclass(frozen=True)
class TrustRegionStep:
    """One step and its effects.

    Attributes:
        delta: (N, N, D) increments after the step.
        predicted: Σ_ij α_ij ‖g_ij‖², the decrease of InfoNCE to first order.
        real: the actual decrease.
        cosine: (N, N) of the step with ψ's increments.
        length: (N, N) of the step over that of ψ's increments.
        outside: share of the pairs whose state already lies outside the radius, which take no step.
    """

    delta: Tensor
    predicted: float
    real: float
    cosine: Tensor
    length: Tensor
    outside: float

    def measures(self) -> dict[str, float]:
        """Returns means over positive and over negative pairs, by the names they are logged under."""
        positive = torch.eye(len(self.cosine), dtype=torch.bool, device=self.cosine.device)
        found = {
            "trust_region/predicted": self.predicted,
            "trust_region/real": self.real,
            "trust_region/outside": self.outside,
        }
        for name, values in (("cosine", self.cosine), ("length", self.length)):
            found[f"trust_region/{name}_positive"] = float(values[positive].mean())
            found[f"trust_region/{name}_negative"] = float(values[~positive].mean())
        return found


def trust_region_step(
    model: GARE,
    text: TextFeatures,
    video: VideoFeatures,
    radius: float,
    start: Literal["coupled", "learned"] = "coupled",
) -> TrustRegionStep:
    """Computes the step from the coupled state Δ = 0, or from the increments that ψ has learned.

    α_ij is the positive root of ‖Δ_ij‖² − 2α Δ_ij·g_ij + α²‖g_ij‖² = ε².

    Args:
        model: to compare the increments of; without dropout.
        text: N captions.
        video: their N clips.
        radius: ε, positive.
        start: state to step from.

    Raises:
        ConfigError: for the baseline, which has no increments, or a radius that is not positive.

    Source: the paper's Figure 9 and its derivation of Δ.
    """
    if model.increment is None:
        raise ConfigError(
            "the baseline has no increments", where="trust region", accepted="model.increment=true"
        )
    if radius <= 0:
        raise ConfigError(f"is {radius:g}", where="trust region's radius", accepted="more than 0")
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            learned = model.scorer.deltas(text, video)
            pooled = model.scorer.pooled(text, video)
    finally:
        model.train(training)
    assert learned is not None
    scale = model.logit_scale.detach().exp()
    with torch.enable_grad():
        state = (torch.zeros_like(learned) if start == "coupled" else learned).requires_grad_()
        before = _loss(model, text.embedding.detach(), pooled, state, scale)
        (gradient,) = torch.autograd.grad(before, state)
    with torch.no_grad():
        alpha, inside = _largest_step(state, gradient, radius)
        moved = state - alpha.unsqueeze(2) * gradient
        after = _loss(model, text.embedding, pooled, moved, scale)
        step = -alpha.unsqueeze(2) * gradient
        return TrustRegionStep(
            moved,
            float((alpha * gradient.square().sum(dim=2)).sum()),
            float(before - after),
            functional.cosine_similarity(step, learned, dim=2),
            step.norm(dim=2) / learned.norm(dim=2).clamp(min=1e-12),
            float((~inside).double().mean()),
        )


def _loss(model: GARE, text_ND: Tensor, pooled_NMD: Tensor, delta_NMD: Tensor, scale: Tensor) -> Tensor:
    text_NMD = text_ND.unsqueeze(1)
    if model.config.corrected_side == "text":
        text_NMD = text_NMD + delta_NMD
    else:
        pooled_NMD = pooled_NMD + delta_NMD
    rows, columns = info_nce(functional.cosine_similarity(text_NMD, pooled_NMD, dim=2), scale)
    return (rows + columns) / 2


def _largest_step(state: Tensor, gradient: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Returns α (N, N), 0 for pairs that are outside already, and a mask of those that are inside."""
    square, along = gradient.square().sum(dim=2), (state * gradient).sum(dim=2)
    room = radius**2 - state.square().sum(dim=2)
    inside = (room >= 0) & (square > 0)
    root = (along.square() + square * room.clamp(min=0)).sqrt()
    return torch.where(inside, (along + root) / square.clamp(min=torch.finfo(square.dtype).tiny), 0), inside
