"""The loss terms, each from the scores or increments of all pairs.

N texts, M videos, D embedding width. Every term is a scalar.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

#: Added to σ of the bottleneck; its whole value if the increments of an anchor are equal.
STD_FLOOR = 1e-6
#: Added to the mean of the directional diversity before its logarithm.
DIRECTION_FLOOR = 1e-8
#: A variance below the square of this many units in the last place is rounding.
NOISE_ULPS = 16


def info_nce(
    scores_NN: Tensor, scale: Tensor, video_ids_N: Tensor | None = None, false_negatives: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Computes InfoNCE over rows (text→video) and columns (video→text), means over the batch.

    CE_rows(κS) = mean_i −log softmax_j(κ s_ij) at j = i; the other direction on Sᵀ.

    Args:
        scores_NN: cosine scores, text i belongs to video i.
        scale: κ, a scalar.
        video_ids_N: the video of each pair; all pairs of a video are then each other's positives, and a row's
            term is the mean of −log softmax over them (SupCon's "out" form, arXiv 2004.11362). None for the
            paper's diagonal.
        false_negatives: τ⁺ of ``debiased_nce``, with the diagonal as positives; 0 for the paper's.
    """
    logits_NN = scale * scores_NN
    if false_negatives:
        positive_N = logits_NN.diagonal()
        eye_NN = torch.eye(len(logits_NN), dtype=torch.bool, device=logits_NN.device)
        negative_NN = logits_NN.masked_fill(eye_NN, -torch.inf)
        of_rows, of_columns = (
            debiased_nce(
                positive_N, negative_NN.logsumexp(dim), len(logits_NN), scale, false_negatives
            ).mean()
            for dim in (1, 0)
        )
        return of_rows, of_columns
    if video_ids_N is None:
        target_N = torch.arange(len(logits_NN), device=logits_NN.device)
        return functional.cross_entropy(logits_NN, target_N), functional.cross_entropy(logits_NN.T, target_N)
    share_NN = positive_shares(video_ids_N, video_ids_N, logits_NN.dtype)
    rows, columns = (
        -(share_NN * logits.log_softmax(dim=1)).sum(dim=1).mean() for logits in (logits_NN, logits_NN.T)
    )
    return rows, columns


def debiased_nce(
    positive_n: Tensor, negatives_n: Tensor, num_pairs: int, scale: Tensor, rate: float
) -> Tensor:
    """Computes −log( e^p / (e^p + (N−1)·G) ) with G = max( (mean_neg e^l − τ⁺ e^p) / (1 − τ⁺), e^{−κ} ).

    A share τ⁺ of the negatives is taken to be false, as near to the anchor as its positive; e^{−κ} is the
    least that a negative can give.

    Args:
        positive_n: p, logits of the positives.
        negatives_n: log Σ e^l over the N − 1 others of each anchor.
        num_pairs: N, at least two.
        scale: κ.
        rate: τ⁺.

    Source: Chuang et al., arXiv 2007.00224, with one positive.
    """
    least_n = -scale - positive_n
    apart_n = negatives_n - math.log(num_pairs - 1) - positive_n
    lowest_n = torch.logaddexp(math.log1p(-rate) + least_n, least_n.new_tensor(math.log(rate)))
    # Near the bound the difference of both is lost in rounding.
    above_n = (apart_n > lowest_n) & (math.log(rate) - apart_n < -1e-6)
    safe_n = torch.where(above_n, apart_n, 0.0)
    debiased_n = safe_n + torch.log1p(-rate * (-safe_n).exp()) - math.log1p(-rate)
    ratio_n = torch.where(above_n, debiased_n, least_n)
    return functional.softplus(ratio_n + math.log(num_pairs - 1))


def positive_shares(own_n: Tensor, all_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns (n, N): 1 over a row's number of positives where the column has the row's video, else 0."""
    same_nN = own_n.unsqueeze(1) == all_N
    return same_nN / same_nN.sum(dim=1, keepdim=True).to(dtype)


def bottleneck(
    delta_NMD: Tensor,
    prior_std: float = 1.0,
    reduction: Literal["sum", "mean"] = "sum",
    *,
    normalised: bool = False,
    anchor: Literal["video", "text"] = "video",
) -> Tensor:
    """Computes the relaxed information bottleneck L_IB = mean_j KL( N(μ_j, diag σ_j²) ‖ N(0, σ_prior² I) ).

    μ_j = mean_i Δ_ij and σ_j = std_i Δ_ij (unbiased) + 1e-6, over the texts of the batch. If all Δ_ij of a
    video are equal, σ_j is 1e-6 and has no gradient. The KL of one video, before its reduction over d:
    ½(σ² + μ²)/σ_prior² − ½ − log(σ/σ_prior).

    Args:
        delta_NMD: increments, at least two for each anchor.
        prior_std: σ_prior.
        reduction: over the D dimensions; ``sum`` is the released code's, ``mean`` the paper's.
        normalised: whether to use Δ_ij/‖Δ_ij‖ in place of Δ_ij (the paper's Table 6).
        anchor: ``text`` takes μ_i and σ_i of each text over the videos (the paper's Table 9).
    """
    if normalised:
        delta_NMD = functional.normalize(delta_NMD, dim=-1)
    if anchor == "text":
        delta_NMD = delta_NMD.transpose(0, 1)
    mean_MD = delta_NMD.mean(dim=0)
    centred_NMD = delta_NMD - mean_MD
    variance_MD = centred_NMD.square().sum(dim=0) / (len(delta_NMD) - 1)
    noise_MD = rounding_noise(delta_NMD.detach().abs().amax(dim=0))
    return divergence(mean_MD, variance_MD, noise_MD, prior_std, reduction).mean()


def rounding_noise(magnitude: Tensor) -> Tensor:
    """Estimates the variance that rounding leaves in equal vectors of a magnitude (…, D).

    A number that is small compared with the others of its vector is a sum that cancelled, with a rounding
    error as large as theirs.
    """
    typical = magnitude.square().mean(dim=-1, keepdim=True).sqrt()
    magnitude = torch.maximum(magnitude, typical)
    noise: Tensor = (NOISE_ULPS * torch.finfo(magnitude.dtype).eps * magnitude).square()
    return noise


def divergence(
    mean_MD: Tensor,
    variance_MD: Tensor,
    noise_MD: Tensor,
    prior_std: float,
    reduction: Literal["sum", "mean"],
) -> Tensor:
    """Computes KL( N(μ, diag σ²) ‖ N(0, σ_prior² I) ) of each anchor (M,), reduced over the D dimensions.

    Args:
        mean_MD: μ.
        variance_MD: unbiased; σ = √variance + 1e-6.
        noise_MD: variance up to which σ is 1e-6 without gradient, since √ has no finite slope at 0.
        prior_std: σ_prior.
        reduction: over the D dimensions.
    """
    varies_MD = variance_MD > noise_MD
    std_MD = torch.where(varies_MD, variance_MD, 1.0).sqrt() * varies_MD + STD_FLOOR
    ratio_MD = (std_MD.square() + mean_MD.square()) / prior_std**2
    kl_MD = 0.5 * (ratio_MD - 1 - 2 * (std_MD / prior_std).log())
    return kl_MD.sum(dim=1) if reduction == "sum" else kl_MD.mean(dim=1)


def radii(delta_NMD: Tensor, bound: float = 0.5, form: Literal["hard", "smooth"] = "hard") -> Tensor:
    """Computes the trust-region radii L_ε = −mean_i Var_j ‖Δ_ij‖₂ (unbiased), with the lower bound −λ.

    Hard: max(L_ε, −λ), constant at the bound, so that it gives no gradient there; the released code's value
    there is 0 and not −λ, with the same gradient. Smooth:
    log(exp L_ε + exp(−λ)), the paper's Appendix C.3.

    Args:
        delta_NMD: increments, M ≥ 2.
        bound: λ.
        form: of the bound.
    """
    norms_NM = torch.linalg.vector_norm(delta_NMD, dim=-1)
    return bounded(norms_NM.var(dim=1).mean(), bound, form)


def bounded(spread: Tensor, bound: float, form: Literal["hard", "smooth"]) -> Tensor:
    """Computes L_ε from the mean variance of the lengths, a scalar, with the lower bound −λ."""
    if form == "smooth":
        return torch.logaddexp(-spread, spread.new_tensor(-bound))
    return (-spread).clamp(min=-bound)


def direction(delta_NMD: Tensor, alpha: float = 2.0) -> Tensor:
    """Computes the diversity L_dir = mean_i log( mean_{j,k} exp(−α(1 − cos(Δ_ij, Δ_ik))) + 1e-8 ).

    It is the directional diversity of increments; the mean over pairs of videos includes j = k.

    Args:
        delta_NMD: increments.
        alpha: α.
    """
    unit_NMD = functional.normalize(delta_NMD, dim=-1)
    cosine_NMM = unit_NMD @ unit_NMD.transpose(1, 2)
    return ((-alpha * (1 - cosine_NMM)).exp().mean(dim=(1, 2)) + DIRECTION_FLOOR).log().mean()


def orthogonality(delta_NMD: Tensor) -> Tensor:
    """Computes the orthogonality form of directional diversity: mean_i mean_{j≠k} cos²(Δ_ij, Δ_ik).

    Args:
        delta_NMD: increments, M ≥ 2.

    Source: the paper's Appendix C.2.
    """
    unit_NMD = functional.normalize(delta_NMD, dim=-1)
    squared_NMM = (unit_NMD @ unit_NMD.transpose(1, 2)).square()
    num_videos = delta_NMD.shape[1]
    others_N = squared_NMM.sum(dim=(1, 2)) - squared_NMM.diagonal(dim1=1, dim2=2).sum(dim=1)
    return others_N.mean() / (num_videos * (num_videos - 1))
