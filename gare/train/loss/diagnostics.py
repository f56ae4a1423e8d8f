"""The paper's measures of Δ, cheap enough to log during training.

They use a few texts of this worker and all videos, and the coefficients of the factorised form: no increment
is built, and the basis of the videos is the one that the step computed.

S texts measured, M videos, F frames, L basis vectors, D embedding width; (S, M) numbers of pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gare.model.factorized.pairs import PairNumbers, corrected_square
from gare.model.factorized.prepared import Embeddings, PreparedText, PreparedVideo
from gare.model.scorer import PairScorer
from gare.train.loss.sharded import StepObservations


@dataclass(frozen=True)
class _Rows:
    """Numbers of S texts with all videos, however they were computed.

    Attributes:
        pairs: their numbers, (S, M) or, where videos own the basis, (M, S).
        text: (S, D) t_i.
        video: v̄_j and the frames.
        basis: (M, L, D) of the videos or (S, L, D) of the texts; None for the baseline.
        by_video: whether pairs and basis belong to the videos.
        own: (S,) column of each text's own video.
    """

    pairs: PairNumbers
    text: Tensor
    video: PreparedVideo
    basis: Tensor | None
    by_video: bool
    own: Tensor

    def of(self, numbers: Tensor) -> Tensor:
        """Arranges numbers of pairs as (S, M)."""
        return numbers.T if self.by_video else numbers

    def weighted_deltas(self, factors_SM: Tensor) -> Tensor:
        """Computes Σ_j x_ij Δ_ij (S, D)."""
        assert self.pairs.weights is not None
        assert self.basis is not None
        if self.by_video:
            weights_MLS = self.pairs.weights * factors_SM.T.unsqueeze(1)
            return weights_MLS.flatten(0, 1).T @ self.basis.flatten(0, 1)
        weights_SL1 = self.pairs.weights @ factors_SM.unsqueeze(2)
        return (weights_SL1.transpose(1, 2) @ self.basis).squeeze(1)

    def weighted_pooled(self, factors_SM: Tensor) -> Tensor:
        """Computes Σ_j x_ij p_ij (S, D)."""
        weights_MFS = self.pairs.pooling * factors_SM.T.unsqueeze(1)
        return weights_MFS.flatten(0, 1).T @ self.video.features.frames.flatten(0, 1)

    def delta_mean(self) -> Tensor:
        """Computes ⟨Δ_ij, v̄_j⟩ (S, M)."""
        assert self.pairs.weights is not None
        assert self.basis is not None
        if self.by_video:
            products_ML1 = self.basis @ self.video.mean.unsqueeze(2)
            return (self.pairs.weights * products_ML1).sum(dim=1).T
        return (self.pairs.weights * (self.basis @ self.video.mean.T)).sum(dim=1)

    def deltas(self, num_videos: int) -> Tensor:
        """Builds Δ_ij (S, V, D) of at most a number of videos, evenly chosen."""
        assert self.pairs.weights is not None
        assert self.basis is not None
        chosen = _evenly_chosen(self.video.mean.shape[0], num_videos, self.text.device)
        if self.by_video:
            return torch.einsum("vls,vld->svd", self.pairs.weights[chosen], self.basis[chosen])
        return torch.einsum("slv,sld->svd", self.pairs.weights[:, :, chosen], self.basis)


#: Videos whose increments are built to measure their spread over texts.
SPREAD_VIDEOS = 32


@torch.no_grad()
def diagnose(scorer: PairScorer, seen: StepObservations, num_texts: int) -> dict[str, float]:
    """Computes measures of the step's batch, by the names they are logged under.

    ``tension/``: for each text the gradient of the diagonal's InfoNCE at its (corrected) embedding, summed
    over videos: its length (net), the sum of lengths (gross) and the share that cancels, with Δ and before it
    (the paper's Figures 2, 4, 7). ``delta/``: angles of Δ to the gap and to the text, lengths and distances,
    of positive and negative pairs (Figures 3, 8); ``delta/sigma``, the bottleneck's σ_j over these texts, its
    mean over dimensions and some videos. ``gap/``: distance of the modalities' means, alignment and
    uniformity (Wang & Isola, arXiv 2005.10242) of unit embeddings.

    Args:
        scorer: of the model.
        seen: from ``sharded.loss_shares``.
        num_texts: number of this worker's texts to measure, evenly spread over its share.
    """
    rows = _rows(scorer, seen, num_texts)
    measures = _tension(scorer, seen, rows) | _modalities(seen)
    if rows.pairs.norms is not None:
        measures |= _delta(scorer, rows)
    return {name: float(value) for name, value in measures.items()}


def _rows(scorer: PairScorer, seen: StepObservations, num_texts: int) -> _Rows:
    sides = seen.sides
    count = sides.own.stop - sides.own.start
    chosen = _evenly_chosen(count, num_texts, seen.scale.device)
    if isinstance(sides.owners, PreparedText):
        assert isinstance(sides.others, PreparedVideo)
        owners, video = sides.owners[chosen], sides.others
        pairs = scorer.pair_numbers(owners, video)
        text, basis = owners.embeddings.vectors, owners.basis.vectors
        return _Rows(pairs, text, video, basis, False, chosen + sides.own.start)
    assert isinstance(sides.others, Embeddings)
    texts, video = sides.others[chosen], sides.owners
    held = None if video.basis is None else video.basis.vectors
    return _Rows(
        scorer.pair_numbers(video, texts), texts.vectors, video, held, True, chosen + sides.own.start
    )


def _evenly_chosen(count: int, most: int, device: torch.device) -> Tensor:
    """Returns the indices of at most a number of rows, evenly spread over all."""
    return torch.linspace(0, count - 1, min(most, count)).long().to(device)


def _tension(scorer: PairScorer, seen: StepObservations, rows: _Rows) -> dict[str, Tensor]:
    pairs = rows.pairs
    pooled_square, text_pooled = rows.of(pairs.pooled_square), rows.of(pairs.text_pooled)
    text_square = rows.text.square().sum(dim=1, keepdim=True).clamp(min=1e-24)
    plain = text_pooled / (text_square * pooled_square).sqrt().clamp(min=1e-12)
    slope = _slope(plain, seen.plain_columns, seen.scale, rows.own)
    before = _net_and_gross(rows, plain, slope, text_square, pooled_square, "none")
    measures = {f"tension/{name}_before": value for name, value in before.items()}
    if pairs.norms is None or pairs.text_delta is None or pairs.delta_pooled is None:
        return measures
    text_square, pooled_square = corrected_square(
        scorer.config.corrected_side,
        text_square,
        pooled_square,
        rows.of(pairs.text_delta),
        rows.of(pairs.delta_pooled),
        rows.of(pairs.norms).square(),
    )
    scores = rows.of(pairs.scores)
    slope = _slope(scores, seen.columns, seen.scale, rows.own)
    after = _net_and_gross(rows, scores, slope, text_square, pooled_square, scorer.config.corrected_side)
    return measures | {f"tension/{name}": value for name, value in after.items()}


def _slope(scores_SM: Tensor, columns_M: Tensor, scale: Tensor, own_S: Tensor) -> Tensor:
    """Computes ∂L/∂s_ij of InfoNCE with the diagonal as positives."""
    logits = scale * scores_SM
    both = logits.softmax(dim=1) + (logits - columns_M).exp()
    both[torch.arange(len(own_S), device=own_S.device), own_S] -= 2
    return both * (scale / (2 * scores_SM.shape[1]))


def _net_and_gross(
    rows: _Rows, scores: Tensor, slope: Tensor, text_square: Tensor, video_square: Tensor, side: str
) -> dict[str, Tensor]:
    """Measures the gradient of cos(a, b) at the text side a: G·(b/(‖a‖‖b‖) − s·a/‖a‖²) for each pair."""
    towards = slope / (text_square * video_square).sqrt().clamp(min=1e-12)
    back = slope * scores / text_square
    net = rows.weighted_pooled(towards) - back.sum(dim=1, keepdim=True) * rows.text
    if side == "text":
        net = net - rows.weighted_deltas(back)
    elif side == "video":
        net = net + rows.weighted_deltas(towards)
    lengths = slope.abs() * (1 - scores.square()).clamp(min=0).sqrt() / text_square.sqrt()
    net_S, gross_S = net.norm(dim=1), lengths.sum(dim=1)
    cancelled = 1 - (net_S / gross_S.clamp(min=1e-30)).mean()
    return {"net": net_S.mean(), "gross": gross_S.mean(), "cancelled": cancelled}


def _delta(scorer: PairScorer, rows: _Rows) -> dict[str, Tensor]:
    pairs = rows.pairs
    assert pairs.norms is not None
    assert pairs.text_delta is not None
    norms, text_delta = rows.of(pairs.norms), rows.of(pairs.text_delta)
    delta_mean, text_mean = rows.delta_mean(), rows.text @ rows.video.mean.T
    text_square = rows.text.square().sum(dim=1, keepdim=True)
    gap_square = text_square + rows.video.mean.square().sum(dim=1) - 2 * text_mean
    gap_delta = delta_mean - text_delta
    # The corrected side moves by Δ: t_i + Δ_ij to v̄_j, or t_i to v̄_j + Δ_ij.
    moved = gap_square + norms.square() + (-2 if scorer.config.corrected_side == "text" else 2) * gap_delta
    numbers = {
        "cos_gap": gap_delta / (norms * gap_square.clamp(min=0).sqrt()).clamp(min=1e-12),
        "cos_text": text_delta / (norms * text_square.sqrt()).clamp(min=1e-12),
        "norm": norms,
        "distance_before": gap_square.clamp(min=0).sqrt(),
        "distance": moved.clamp(min=0).sqrt(),
    }
    if scorer.config.corrected_side == "text":
        numbers["text_norm"] = (text_square + 2 * text_delta + norms.square()).clamp(min=0).sqrt()
    positive = functional.one_hot(rows.own, norms.shape[1]).bool()
    measures = {"delta/text_norm_before": text_square.sqrt().mean()}
    for name, values in numbers.items():
        measures[f"delta/{name}_positive"] = values[positive].mean()
        measures[f"delta/{name}_negative"] = values[~positive].mean()
    if len(rows.text) > 1:  # a single row has no spread
        measures["delta/sigma"] = rows.deltas(SPREAD_VIDEOS).std(dim=0).mean()
    return measures


def _modalities(seen: StepObservations) -> dict[str, Tensor]:
    sides = seen.sides
    if isinstance(sides.owners, PreparedText):
        assert isinstance(sides.others, PreparedVideo)
        text, video = sides.owners.embeddings.vectors, sides.others.mean[sides.own]
    else:
        assert isinstance(sides.others, Embeddings)
        text, video = sides.others.vectors, sides.owners.mean[sides.own]
    unit_text, unit_video = functional.normalize(text, dim=1), functional.normalize(video, dim=1)
    measures = {
        "gap/modality": (text.mean(dim=0) - video.mean(dim=0)).norm(),
        "gap/alignment": (unit_text - unit_video).square().sum(dim=1).mean(),
    }
    if len(text) > 1:  # a single row has no spread
        measures["gap/uniformity_text"] = _uniformity(unit_text)
        measures["gap/uniformity_video"] = _uniformity(unit_video)
    return measures


def _uniformity(unit: Tensor) -> Tensor:
    """Computes log mean exp(−2‖x − y‖²) over pairs of different rows; needs two rows or more."""
    close = (4 * (unit @ unit.T) - 4).exp()
    count = len(unit)
    return ((close.sum() - close.diagonal().sum()) / (count * (count - 1))).log()
