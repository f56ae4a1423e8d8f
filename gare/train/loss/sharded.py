"""The factorised loss of a global batch, each worker with its own rows of it.

A worker scores its n texts against all N videos, block by block, and exchanges only numbers by video with the
others: the column sums of InfoNCE, the moments of the bottleneck, the spread of the radii. It backpropagates
its share ℓ_r; the workers' shares sum to the loss, so the gradient is that of one worker with the whole
batch. No N×M×D tensor is built, except per block where Δ itself is needed.

n texts of this worker, N texts or videos of all R workers, O owners of a basis, X others, A anchors of the
bottleneck, S sampled texts, L basis vectors, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gare.config import LossConfig
from gare.model.budget import MEGABYTE, Budget
from gare.model.factorized.basis import BasisMaps, centred
from gare.model.factorized.prepared import PreparedVideo
from gare.model.factorized.quadratic_forms import quadratic_form
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.scorer import PairScorer
from gare.train.loss.blocks import (
    Block,
    BlockRequest,
    PairSides,
    blocks_of,
    reference_of,
    sides_of,
    sums_increments,
)
from gare.train.loss.direction import factorized_direction
from gare.train.loss.gather import Rows, max_over_workers, sum_over_workers, world_size
from gare.train.loss.losses import (
    NOISE_ULPS,
    bounded,
    debiased_nce,
    divergence,
    positive_shares,
    rounding_noise,
)

#: Bytes, on a CPU, of a chunk of texts whose cosines are computed together.
CHUNK_BYTES = 32 * MEGABYTE


@dataclass(frozen=True)
class LossShares:
    """This worker's part of each term of the global batch, scalars that sum to the term over the workers.

    ``seen`` is for diagnostics, if they are wanted.
    """

    nce_t2v: Tensor
    nce_v2t: Tensor
    bottleneck: Tensor
    radii: Tensor
    direction: Tensor
    seen: StepObservations | None


@dataclass(frozen=True)
class StepObservations:
    """Values that a step computed on its way, without gradient, for diagnostics.

    Attributes:
        sides: of the pairs.
        text: this worker's captions.
        columns: (N,) log Σ_i exp(κ s_ij) of each video over all texts.
        plain_columns: the same of the scores without increments, cos(t_i, p_ij).
        scale: κ.
    """

    sides: PairSides
    text: TextFeatures
    columns: Tensor
    plain_columns: Tensor
    scale: Tensor

    def features(self, most: int) -> tuple[TextFeatures, VideoFeatures]:
        """Returns this worker's first pairs, ``most`` at most, without gradient."""
        video = self.sides.owners if isinstance(self.sides.owners, PreparedVideo) else self.sides.others
        assert isinstance(video, PreparedVideo)
        own = slice(self.sides.own.start, min(self.sides.own.start + most, self.sides.own.stop))
        return self.text[:most].detach(), video.features[own].detach()


def loss_shares(
    scorer: PairScorer,
    scale: Tensor,
    text: TextFeatures,
    video: VideoFeatures,
    config: LossConfig,
    *,
    sample: Tensor | None = None,
    keep: Tensor | None = None,
    video_ids: Tensor | None = None,
    rows: Rows | None = None,
    watched: bool = False,
) -> LossShares:
    """Computes this worker's share of the loss terms in the factorised form; a term that is off is zero.

    Args:
        scorer: of a model with a ψ of one layer, or none.
        scale: κ, a scalar.
        text: this worker's n captions.
        video: the clips of all workers.
        config: of the loss.
        sample: global indices of the texts of the directional diversity, on the CPU; None for all.
        keep: dropout of the global batch's N contexts, from ``PairScorer.draw_dropout``.
        video_ids: (N,) the video of each pair, if all pairs of a video are each other's positives.
        rows: of each worker; None if this is the only worker.
        watched: whether the result must hold the values for diagnostics; the same on all workers.

    Source: docs/design/factorized.md, points 6 and 7, and its row-sharded training.
    """
    num_pairs = len(video)
    own = (rows or Rows((num_pairs,))).own
    dropout = config.dropout_spread if config.bottleneck_weight and scorer.increment is not None else 0.0
    sides = sides_of(scorer, text, video, keep, own, with_dropped=bool(dropout))
    own_sample = None if sample is None else sample[(sample >= own.start) & (sample < own.stop)] - own.start
    wanted = _wanted(sides, config, own_sample, watched)
    reference = reference_of(scorer, sides, wanted) if wanted.sums else None
    blocks = list(blocks_of(scorer, sides, wanted, reference))
    logits = scale * _join(sides, [block.scores for block in blocks])
    columns = _columns(logits)
    nce = (
        _debiased_nce(logits, scale, own, config.false_negatives)
        if config.false_negatives
        else _info_nce(logits, columns, own, video_ids)
    )
    seen = None
    if watched:
        plain = _join(sides, [block.plain for block in blocks if block.plain is not None])
        with torch.no_grad():
            seen = StepObservations(sides, text, columns.detach(), _columns(scale * plain), scale.detach())
    zero = torch.zeros_like(nce[0])
    norms = [block.norms for block in blocks if block.norms is not None]
    if not norms:
        return LossShares(*nce, zero, zero, zero, seen)
    bottleneck = radii = direction = zero
    if config.radii_weight:
        spread = sum_over_workers(_join(sides, norms).var(dim=1).sum()) / num_pairs
        radii = bounded(spread, config.radii_bound, config.radii_bound_form) / world_size()
    if wanted.moments:
        maps = scorer.basis_maps() if dropout else None
        bottleneck = _owners_bottleneck(sides, blocks, config, maps) / num_pairs
    elif reference is not None:
        bottleneck = _others_bottleneck(sides, blocks, reference, config) / num_pairs
    if wanted.sample[0]:
        total = _direction(scorer, sides, blocks, own_sample, config)
        direction = total / (num_pairs if sample is None else len(sample))
    return LossShares(*nce, bottleneck, radii, direction, seen)


def _wanted(sides: PairSides, config: LossConfig, own_sample: Tensor | None, watched: bool) -> BlockRequest:
    """Lists the values that the configured terms need of each block."""
    has_delta, sums = sides.owner != "none", sums_increments(sides.owner, config)
    return BlockRequest(
        has_delta and bool(config.bottleneck_weight) and not sums,
        sums,
        config.kl_normalised,
        (has_delta and bool(config.direction_weight), own_sample),
        watched,
    )


def _join(sides: PairSides, by_owner: list[Tensor]) -> Tensor:
    """Joins blocks (O, X) of owners to (n, N) of this worker's texts."""
    joined = torch.cat(by_owner)
    return joined if sides.owner == "text" else joined.T


def _columns(logits: Tensor) -> Tensor:
    """Computes log Σ_i exp(logits_ij) (N,) over the texts of all workers."""
    highest = max_over_workers(logits.amax(dim=0))
    return highest + sum_over_workers((logits - highest).exp().sum(dim=0)).log()


def _info_nce(logits: Tensor, columns: Tensor, own: slice, video_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums rows of its texts and columns of its videos, over N; logits (n, N), columns from ``_columns``."""
    if video_ids is None:
        positive = logits[:, own].diagonal().sum()
    else:
        positive = (positive_shares(video_ids[own], video_ids, logits.dtype) * logits).sum()
    num_pairs = logits.shape[1]
    # If a video has several captions, some may be other workers' rows; summed over all workers, rows and
    # columns have the same positives.
    return (logits.logsumexp(dim=1).sum() - positive) / num_pairs, (columns[own].sum() - positive) / num_pairs


def _debiased_nce(logits: Tensor, scale: Tensor, own: slice, rate: float) -> tuple[Tensor, Tensor]:
    """Sums the debiased rows of its texts and columns of its videos, over N; logits (n, N)."""
    num_pairs = logits.shape[1]
    positive = logits[:, own].diagonal()
    is_own = torch.zeros_like(logits, dtype=torch.bool)
    is_own[:, own].fill_diagonal_(True)
    negative = logits.masked_fill(is_own, -torch.inf)
    rows, columns = (
        debiased_nce(positive, sums, num_pairs, scale, rate).sum() / num_pairs
        for sums in (negative.logsumexp(dim=1), _columns(negative)[own])
    )
    return rows, columns


def _owners_bottleneck(
    sides: PairSides, blocks: list[Block], config: LossConfig, maps: BasisMaps | None
) -> Tensor:
    """Sums the KL of this worker's anchors, which own the basis.

    Args:
        sides: of the pairs.
        blocks: of all pairs.
        config: of the loss.
        maps: ψ's, to add the spread that dropout of each pair would make; None: not.
    """
    assert sides.owners.basis is not None
    moments = [block.moments for block in blocks if block.moments is not None]
    mean, scatter = (torch.cat(parts) for parts in zip(*moments, strict=True))
    vectors, count = sides.owners.basis.vectors, sides.num_others
    if sides.owner == "video":
        # Each worker has a part of the texts: the moments of the parts are merged.
        part, count = count, len(sides.owners)
        whole = sum_over_workers(mean * (part / count))
        apart = mean - whole
        # The mean of equal numbers may round to another number, which must not be taken for spread: σ has a
        # huge gradient where it is small. Numbers that are equal by chance still have their own gradients.
        is_rounding = apart.abs() <= 4 * torch.finfo(apart.dtype).eps * whole.abs()
        apart = (apart - apart.detach() * is_rounding).unsqueeze(2)
        scatter = sum_over_workers(scatter + part * (apart @ apart.transpose(1, 2)))
        mean, scatter, vectors = whole[sides.own], scatter[sides.own], vectors[sides.own]
    covariance = scatter / (count - 1)
    variance = quadratic_form(covariance, vectors)
    with torch.no_grad():
        eps, squares = torch.finfo(vectors.dtype).eps, vectors.square()
        # Coefficients describe differences, and are exact where increments differ. Only for equal frames,
        # where rounding is multiplied with rounding, they say nothing.
        held = mean.square().unsqueeze(1)
        noise = rounding_noise((held @ squares).squeeze(1).sqrt()) * eps
        if config.kl_normalised:
            # Coefficients that compensate each other's changes of length cancel in the sum.
            diagonal = covariance.diagonal(dim1=1, dim2=2)
            noise += 2 * NOISE_ULPS * eps * (diagonal.unsqueeze(1) @ squares).squeeze(1)
        noise = noise.masked_fill(_others_are_alike(sides), torch.inf)
    if maps is not None:
        spread = spread_by_dropout(sides, maps, mean, scatter / count, config.dropout_spread)
        variance = variance + spread
    mean = (mean.unsqueeze(1) @ vectors).squeeze(1)
    return divergence(mean, variance, noise, config.prior_std, config.kl_reduction).sum()


def spread_by_dropout(
    sides: PairSides, maps: BasisMaps, mean: Tensor, covariance: Tensor, dropout: float
) -> Tensor:
    """Computes the variance (A, D) that dropout of each pair would add to an anchor's increments.

    Dropout multiplies each number h_d of W_1 y + b_1 by a factor of mean 1 and variance v = p/(1 − p), so
    that Δ_e varies by Σ_d (W_μ γ3 P)²_ed · v h_d² / s², with LN3's deviation s. Of its square, dropout is a
    part too: s² + v·mean_d h_d² on average. h/s is a combination with the coefficients of Δ, so that its mean
    square over the others follows from their moments. What is left out, changes of s by single numbers and
    the mean of a quotient, is smaller by 1/D.

    Args:
        sides: of the pairs, with what dropout acts on.
        maps: of ψ.
        mean: (A, L) of the coefficients over the others.
        covariance: (A, L, L) of the coefficients about it.
        dropout: p.
    """
    assert sides.owners.basis is not None
    dropped = sides.owners.basis.dropped
    assert dropped is not None
    dropped = dropped[sides.own]
    square = quadratic_form(covariance, dropped) + (mean.unsqueeze(1) @ dropped).squeeze(1).square()
    noise = dropout / (1 - dropout) * square
    noise = noise / (1 + noise.mean(dim=1, keepdim=True))
    spread: Tensor = noise @ centred(maps.to_vectors).square().T
    return spread


@torch.no_grad()
def _others_are_alike(sides: PairSides) -> Tensor:
    """Returns True (scalar) if the query vectors differ only by rounding; then so do an owner's increments.

    This cannot be tested on the coefficients: cancelling attention logits can make the rounding of their
    summands arbitrarily large there.
    """
    queries = sides.others.mean if isinstance(sides.others, PreparedVideo) else sides.others.vectors
    ends = torch.stack([queries.amax(dim=0), -queries.amin(dim=0)])
    if sides.owner == "video":
        ends = max_over_workers(ends)
    return (ends.sum(dim=0).square() <= rounding_noise(ends.abs().amax(dim=0))).all()


def _others_bottleneck(
    sides: PairSides, blocks: list[Block], reference: Tensor, config: LossConfig
) -> Tensor:
    """Sums the KL of this worker's anchors, which do not own the basis."""
    sums = torch.stack([block.sums for block in blocks if block.sums is not None]).sum(dim=0)
    count = len(sides.owners)
    if sides.owner == "text":
        sums, reference = sum_over_workers(sums)[:, sides.own], reference[sides.own]
        count = sides.num_others
    mean = sums[0] / count
    variance = (sums[1] - sums[0] * mean) / (count - 1)
    mean = reference + mean
    # Each increment is itself a sum of products.
    noise = rounding_noise(NOISE_ULPS * mean.detach().abs())
    return divergence(mean, variance, noise, config.prior_std, config.kl_reduction).sum()


def _direction(
    scorer: PairScorer, sides: PairSides, blocks: list[Block], sample: Tensor | None, config: LossConfig
) -> Tensor:
    """Sums the diversity of this worker's texts, or of those that were drawn."""
    assert sides.owners.basis is not None
    vectors = sides.owners.basis.vectors
    if sides.owner == "text" and sample is not None:
        vectors = vectors[sample.to(vectors.device)]
    budget = Budget.of(scorer.config.memory_mb, vectors.device)
    return factorized_direction(
        torch.cat([block.sampled for block in blocks if block.sampled is not None]),
        vectors,
        "text" if sides.owner == "text" else "video",
        config.direction_form,
        config.direction_alpha,
        min(budget.total, budget.block(CHUNK_BYTES)),
        scorer.config.products,
    )
