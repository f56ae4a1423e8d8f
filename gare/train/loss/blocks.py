"""The pairs of a worker's texts with all videos, block by block, and the values that the loss keeps.

O owners of a basis, X others, S sampled texts, L basis vectors, D embedding width.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gare.config import LossConfig
from gare.model.budget import MEGABYTE, Budget
from gare.model.factorized.pairs import PairNumbers
from gare.model.factorized.prepared import Embeddings, PreparedText, PreparedVideo
from gare.model.factorized.quadratic_forms import gram
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.fused.blocks import FusedRequest
from gare.model.scorer import PairScorer
from gare.model.streaming import count_pair_numbers
from gare.train.loss.gather import sum_over_workers, world_size

#: Number of blocks computed (or recomputed) between two calls that return free heap memory.
TRIM_EVERY = 16
#: Bytes of a block on a CPU, so that its numbers stay in the cache.
BLOCK_BYTES = 8 * MEGABYTE
SUMS_INCREMENTS = "the bottleneck of texts sums increments themselves"


@dataclass(frozen=True)
class PairSides:
    """The two sides of the pairs of this worker.

    Attributes:
        owner: video or text, whichever owns the basis; none for the baseline, which is computed as video.
        owners: side that owns the basis.
        others: the other side.
        own: this worker's rows of the global batch.
        positions: numbers of frames of a video and of words of a text.
    """

    owner: str
    owners: PreparedVideo | PreparedText
    others: Embeddings | PreparedVideo
    own: slice
    positions: tuple[int, int]

    @property
    def num_others(self) -> int:
        """X, the number of texts or videos."""
        return len(self.others)


@dataclass(frozen=True)
class BlockRequest:
    """Request of the values that the regularisers need of a block besides scores and lengths.

    Attributes:
        moments: whether the bottleneck's anchors own the basis, so that moments follow from coefficients.
        sums: whether the anchors are the other side, so that the increments themselves must be summed.
        normalised: whether the bottleneck uses increments scaled to length 1.
        sample: whether the diversity needs coefficients, and of which of this worker's texts: indices on the
            CPU, None for all.
        plain: whether diagnostics need the scores without increments.
    """

    moments: bool
    sums: bool
    normalised: bool
    sample: tuple[bool, Tensor | None]
    plain: bool


@dataclass(frozen=True)
class Block:
    """Values that the loss keeps of a block of owners with all others.

    Attributes:
        scores: (O, X).
        norms: (O, X) of the increments; None for the baseline.
        moments: of the owners' coefficients over the others: mean (O, L) and scatter (O, L, L) about it.
        sums: (2, X, D) over the owners, of Δ minus the reference and of its square.
        sampled: coefficients of the texts of the diversity, (O, L, S) or (S, L, X).
        plain: (O, X) scores without increments, without gradient.
    """

    scores: Tensor
    norms: Tensor | None = None
    moments: tuple[Tensor, Tensor] | None = None
    sums: Tensor | None = None
    sampled: Tensor | None = None
    plain: Tensor | None = None


def sides_of(
    scorer: PairScorer,
    text: TextFeatures,
    video: VideoFeatures,
    keep: Tensor | None,
    own: slice,
    *,
    with_dropped: bool = False,
) -> PairSides:
    """Prepares this worker's texts and all workers' videos for the model's variant, with dropout ``keep``."""
    maps = scorer.basis_maps()
    positions = (video.mask.shape[1], text.mask.shape[1])
    if scorer.context_of == "text" and maps is not None:
        texts = scorer.prepare_text(text, maps, None if keep is None else keep[own])
        return PairSides("text", texts, scorer.with_basis(video, maps, None), own, positions)
    owners = scorer.with_basis(video, maps, keep, with_dropped=with_dropped)
    return PairSides(scorer.context_of, owners, scorer.query_embeddings(text.embedding), own, positions)


def blocks_of(
    scorer: PairScorer, sides: PairSides, wanted: BlockRequest, reference: Tensor | None
) -> Iterator[Block]:
    """Yields blocks of owners with all others; the backward recomputes them if all exceed the budget."""
    num_owners = len(sides.owners)
    fused = takes_kernel(scorer, sides, wanted)
    numbers = count_pair_numbers(scorer, *sides.positions, fused=fused)
    held = sides.owners.dtype.itemsize * sides.num_others * numbers
    budget = Budget.of(scorer.config.memory_mb, sides.owners.device)
    size = max(budget.block(BLOCK_BYTES) // held, 1)
    recompute = torch.is_grad_enabled() and held * num_owners > budget.total
    parts: Iterator[PreparedVideo | PreparedText] = sides.owners.split(size)
    for number, owners in enumerate(parts):
        first = number * size
        texts = wanted.sample[1]
        if texts is not None and sides.owner == "text":
            texts = texts[(texts >= first) & (texts < first + size)] - first
        texts = None if texts is None else texts.to(sides.owners.device)
        arguments = (scorer, sides.owner, owners, sides.others, wanted, texts, reference)
        run: Callable[..., Block] = compute_fused_block if fused else compute_block
        if not recompute:
            yield run(*arguments)
            continue
        if not fused and number % TRIM_EVERY == 0:
            run = _compute_block_on_trimmed_heap
        block: Block = checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)
        yield block


def sums_increments(owner: str, config: LossConfig) -> bool:
    """Returns True if the bottleneck's anchors do not own the basis, so that increments must be summed."""
    return owner != "none" and bool(config.bottleneck_weight) and config.bottleneck_anchor != owner


def why_not_fused(scorer: PairScorer, config: LossConfig) -> str:
    """Returns the reason why a loss cannot use the fused kernels; empty if it can."""
    return SUMS_INCREMENTS if sums_increments(scorer.context_of, config) else ""


def takes_kernel(scorer: PairScorer, sides: PairSides, wanted: BlockRequest) -> bool:
    """Returns True if the fused kernels compute blocks of these sides; otherwise logs the reason once.

    Raises:
        ConfigError: if the kernels are required and cannot be used.
    """
    reason = SUMS_INCREMENTS if wanted.sums else ""
    return scorer.takes_kernel(sides.positions[0], sides.owners.dtype, sides.owners.device, reason)


def compute_fused_block(
    scorer: PairScorer,
    owner: str,
    owners: PreparedVideo,
    others: Embeddings,
    wanted: BlockRequest,
    texts: Tensor | None,
    reference: Tensor | None,
) -> Block:
    """Computes the same as ``compute_block`` by the fused kernels, for videos that own the basis."""
    del owner, reference
    sample = "all" if texts is None else texts
    request = FusedRequest(
        norms=True,
        plain=wanted.plain,
        sample=sample if wanted.sample[0] else None,
        moments=wanted.moments,
        normalised=wanted.normalised,
    )
    found = scorer.fused_pairs(owners, others, request)
    moments = None if found.mean is None or found.scatter is None else (found.mean, found.scatter)
    return Block(found.scores, found.norms, moments, None, found.sampled, found.plain)


def _compute_block_on_trimmed_heap(*arguments: Any) -> Block:
    """Computes a block after returning free heap memory of earlier ones; again in the backward."""
    give_back_free_memory()
    return compute_block(*arguments)


def compute_block(
    scorer: PairScorer,
    owner: str,
    owners: PreparedVideo | PreparedText,
    others: Embeddings | PreparedVideo,
    wanted: BlockRequest,
    texts: Tensor | None,
    reference: Tensor | None,
) -> Block:
    """Computes a block of pairs by plain operations.

    Args:
        scorer: of the model.
        owner: as in ``PairSides``.
        owners: the block's owners of a basis, or videos for the baseline.
        others: all of the other side.
        wanted: the values to return.
        texts: indices of the diversity's texts among the block's owners or the others; None for all.
        reference: from ``reference_of``, if increments are summed.
    """
    pairs = scorer.pair_numbers(owners, others)
    plain = _plain(pairs, owners, others) if wanted.plain else None
    if pairs.weights is None:
        return Block(pairs.scores, plain=plain)
    moments = sums = sampled = None
    if wanted.moments:
        weights = _looked_at(scorer, pairs, owners, others, wanted)
        mean = weights.mean(dim=2, keepdim=True)
        apart = weights - mean
        moments = (mean.squeeze(2), gram(apart))
    if wanted.sums and reference is not None:
        assert owners.basis is not None
        weights = _looked_at(scorer, pairs, owners, others, wanted)
        apart = weights.transpose(1, 2) @ owners.basis.vectors - reference
        sums = torch.stack([apart.sum(dim=0), apart.square().sum(dim=0)])
    if wanted.sample[0]:
        sampled = pairs.weights
        if texts is not None:
            sampled = sampled[texts] if owner == "text" else sampled[:, :, texts]
    return Block(pairs.scores, pairs.norms, moments, sums, sampled, plain)


@torch.no_grad()
def _plain(
    pairs: PairNumbers, owners: PreparedVideo | PreparedText, others: Embeddings | PreparedVideo
) -> Tensor:
    """Computes cos(t_i, p_ij) of a block."""
    if isinstance(owners, PreparedText):
        square = owners.embeddings.square.unsqueeze(1)
    else:
        assert isinstance(others, Embeddings)
        square = others.square
    return pairs.text_pooled / (square * pairs.pooled_square).sqrt().clamp(min=1e-12)


def _looked_at(
    scorer: PairScorer,
    pairs: PairNumbers,
    owners: PreparedVideo | PreparedText,
    others: Embeddings | PreparedVideo,
    wanted: BlockRequest,
) -> Tensor:
    """Returns coefficients of the increments that the bottleneck uses."""
    assert pairs.weights is not None
    assert pairs.norms is not None
    if not wanted.normalised:
        return pairs.weights
    if scorer.radius is None:
        return pairs.weights / pairs.norms.clamp(min=1e-12).unsqueeze(1)
    # Dividing by the radius afterwards would leave its rounding error.
    unit = scorer.pair_numbers(owners, others, unit_radius=True).weights
    assert unit is not None
    return unit


@torch.no_grad()
def reference_of(scorer: PairScorer, sides: PairSides, wanted: BlockRequest) -> Tensor:
    """Returns (X, D), close to each other's mean increment, so that squares about it do not cancel.

    The mean over a few owners is as far from the mean over all as the increments spread. Workers that add up
    their sums use the same reference.
    """
    parts: Iterator[PreparedVideo | PreparedText] = sides.owners.split(4)
    some = next(parts)
    assert some.basis is not None
    weights = _looked_at(scorer, scorer.pair_numbers(some, sides.others), some, sides.others, wanted)
    local = (weights.transpose(1, 2) @ some.basis.vectors).mean(dim=0)
    return sum_over_workers(local) / world_size() if sides.owner == "text" else local


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return None
    return found


def give_back_free_memory() -> None:
    """Returns the free parts of the C library's heap to the system, including those between used parts.

    Large temporary tensors between small ones that stay leave holes into which the next ones do not fit: a
    step of 4,096 pairs, which needs some 2 GB, held 6 GB, and now and then more than 24 GB. The call costs
    less than a millisecond for each hundred megabytes returned.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
