"""The loss terms, each from the scores or increments of all pairs.

N texts, M videos, D embedding width. Every term is a scalar.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

#: Added to σ of the bottleneck, and all that is left of it where the increments of an anchor are equal.
STD_FLOOR = 1e-6


def info_nce(scores_NN: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """InfoNCE over rows (text→video) and columns (video→text), means over the batch.

    CE_rows(κS) = mean_i −log softmax_j(κ s_ij) at j = i; the other direction on Sᵀ.

    Args:
        scores_NN: cosine scores, text i belongs to video i.
        scale: κ, a scalar.
    """
    logits_NN = scale * scores_NN
    target_N = torch.arange(len(logits_NN), device=logits_NN.device)
    return functional.cross_entropy(logits_NN, target_N), functional.cross_entropy(logits_NN.T, target_N)


def bottleneck(
    delta_NMD: Tensor, prior_std: float = 1.0, reduction: Literal["sum", "mean"] = "sum"
) -> Tensor:
    """Relaxed information bottleneck L_IB = mean_j KL( N(μ_j, diag σ_j²) ‖ N(0, σ_prior² I) ).

    μ_j = mean_i Δ_ij and σ_j = std_i Δ_ij (unbiased) + 1e-6, over the texts of the batch. Where all Δ_ij of
    a video are equal, σ_j is 1e-6 and carries no gradient.

    Args:
        delta_NMD: increments, N ≥ 2.
        prior_std: σ_prior.
        reduction: over the D dimensions; ``sum`` is the released code's, ``mean`` the paper's.
    """
    mean_MD = delta_NMD.mean(dim=0)
    centred_NMD = delta_NMD - mean_MD
    variance_MD = centred_NMD.square().sum(dim=0) / (len(delta_NMD) - 1)
    # Equal increments leave rounding noise, not zeros, and √ has no finite slope there.
    noise_MD = (4 * torch.finfo(delta_NMD.dtype).eps * delta_NMD.detach().abs().amax(dim=0)).square()
    varies_MD = variance_MD > noise_MD
    std_MD = torch.where(varies_MD, variance_MD, 1.0).sqrt() * varies_MD + STD_FLOOR
    ratio_MD = (std_MD.square() + mean_MD.square()) / prior_std**2
    kl_MD = 0.5 * (ratio_MD - 1 - 2 * (std_MD / prior_std).log())
    return (kl_MD.sum(dim=1) if reduction == "sum" else kl_MD.mean(dim=1)).mean()


def radii(delta_NMD: Tensor, bound: float = 0.5) -> Tensor:
    """Trust-region radii L_ε = max(−mean_i Var_j ‖Δ_ij‖₂, −λ), the variance unbiased.

    At the bound the term is constant, so it gives no gradient.

    Args:
        delta_NMD: increments, M ≥ 2.
        bound: λ.
    """
    norms_NM = torch.linalg.vector_norm(delta_NMD, dim=-1)
    spread: Tensor = norms_NM.var(dim=1).mean()
    return (-spread).clamp(min=-bound)


def direction(delta_NMD: Tensor, alpha: float = 2.0) -> Tensor:
    """Directional diversity L_dir = mean_i log( mean_{j,k} exp(−α(1 − cos(Δ_ij, Δ_ik))) + 1e-8 ).

    The mean over pairs of videos includes j = k.

    Args:
        delta_NMD: increments.
        alpha: α.
    """
    unit_NMD = functional.normalize(delta_NMD, dim=-1)
    cosine_NMM = unit_NMD @ unit_NMD.transpose(1, 2)
    return ((-alpha * (1 - cosine_NMM)).exp().mean(dim=(1, 2)) + 1e-8).log().mean()
