"""The training objective: encode a worker's share of the batch, gather, score all pairs, add up the terms.

b pairs on this worker, N pairs over all R workers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gare.config import LossConfig, TrainConfig
from gare.data.batch import Batch, FeatureBatch
from gare.data.images import normalise
from gare.errors import GareError
from gare.model.encoders.clip import ClipTowers
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.model.scorer import PairScorer
from gare.model.streaming import slices
from gare.train.loss.blocks import why_not_fused
from gare.train.loss.gather import (
    Rows,
    exchange_row_counts,
    gather,
    start_gather,
    sum_over_workers,
    world_size,
)
from gare.train.loss.losses import bottleneck, direction, info_nce, orthogonality, radii
from gare.train.loss.sharded import StepObservations, loss_shares
from gare.train.stages import stage

logger = logging.getLogger(__name__)

Encoded = TypeVar("Encoded", TextFeatures, VideoFeatures)


@dataclass(frozen=True)
class LossTerms:
    """The loss of the global batch and its parts, scalars; the regularisers are unweighted.

    Attributes:
        total: L = ½(nce_t2v + nce_v2t) + β·bottleneck + λ_ε·radii + λ_dir·direction.
        nce_t2v: InfoNCE over rows (text → video).
        nce_v2t: InfoNCE over columns (video → text).
        bottleneck: L_IB, zero for the baseline and if its weight is zero.
        radii: L_ε, zero in the same cases.
        direction: L_dir, zero in the same cases.
        scale: κ.
        objective: the scalar that this worker backpropagates: the mean of the workers' gradients is L's.
        seen: values for diagnostics, in the factorised form and if they are wanted.
    """

    total: Tensor
    nce_t2v: Tensor
    nce_v2t: Tensor
    bottleneck: Tensor
    radii: Tensor
    direction: Tensor
    scale: Tensor
    objective: Tensor
    seen: StepObservations | None = None

    def named(self) -> dict[str, Tensor]:
        """Returns the terms by the names they are logged under, detached."""
        terms = {
            name: value for name, value in vars(self).items() if name not in ("scale", "objective", "seen")
        }
        return {f"loss/{name}": value.detach() for name, value in terms.items()} | {
            "train/scale": self.scale.detach()
        }


@dataclass(frozen=True)
class StepRandomness:
    """Random draws of a step's loss.

    The draws are for the global batch, so that the number of workers changes nothing.

    Attributes:
        sample: indices of the texts of the directional diversity; None for all. On the CPU, because each
            worker selects its own, and counting them must not wait for a GPU.
        keep: dropout of the contexts of ψ; None, in training, for dropout drawn for each pair.
    """

    sample: Tensor | None = None
    keep: Tensor | None = None

    @classmethod
    def of_step(cls, scorer: PairScorer, config: LossConfig, num_pairs: int, seed: int) -> StepRandomness:
        """Draws by global index from a seed, the same on every worker and kind of device."""
        generator = torch.Generator().manual_seed(seed)
        sample = None
        if scorer.increment is not None and config.samples_texts(num_pairs, scorer.config.clip.embed_dim):
            order = torch.randperm(num_pairs, generator=generator)
            sample = order[: config.direction_texts].sort().values
        return cls(sample, scorer.draw_dropout(num_pairs, generator))


def loss_terms(
    model: GARE,
    text: TextFeatures,
    video: VideoFeatures,
    config: LossConfig,
    draws: StepRandomness | None = None,
    video_ids: Tensor | None = None,
) -> LossTerms:
    """Computes all terms in the direct form, over a batch in which text i belongs to video i.

    Args:
        model: to score with.
        text: all captions of the batch.
        video: all clips of the batch.
        config: of the loss.
        draws: of the step; None for diversity of all texts and dropout drawn for each pair.
        video_ids: the video of each pair, if all pairs of a video are each other's positives.
    """
    draws = draws or StepRandomness()
    pairs = model.scorer.pairs(text, video, draws.keep)
    scale = model.logit_scale.exp()
    nce = info_nce(pairs.scores, scale, video_ids, config.false_negatives)
    zero = torch.zeros_like(nce[0])
    if pairs.delta is None:
        return _weighted(config, nce, (zero, zero, zero), scale)
    spread_out = pairs.delta if draws.sample is None else pairs.delta[draws.sample]
    # A term that is off is not computed: it costs nothing, and cannot become nan by 0 · inf.
    terms = (
        bottleneck(
            pairs.delta,
            config.prior_std,
            config.kl_reduction,
            normalised=config.kl_normalised,
            anchor=config.bottleneck_anchor,
        )
        if config.bottleneck_weight
        else zero,
        radii(pairs.delta, config.radii_bound, config.radii_bound_form) if config.radii_weight else zero,
        zero
        if not config.direction_weight
        else orthogonality(spread_out)
        if config.direction_form == "orthogonality"
        else direction(spread_out, config.direction_alpha),
    )
    return _weighted(config, nce, terms, scale)


def sharded_terms(
    model: GARE,
    text: TextFeatures,
    video: VideoFeatures,
    config: LossConfig,
    draws: StepRandomness,
    video_ids: Tensor | None = None,
    *,
    rows: Rows | None = None,
    watched: bool = False,
) -> LossTerms:
    """Computes all terms in the factorised form, from this worker's captions and the clips of all workers."""
    scale = model.logit_scale.exp()
    part = loss_shares(
        model.scorer,
        scale,
        text,
        video,
        config,
        sample=draws.sample,
        keep=draws.keep,
        video_ids=video_ids,
        rows=rows,
        watched=watched,
    )
    own = _weighted(
        config,
        (part.nce_t2v, part.nce_v2t),
        (part.bottleneck, part.radii, part.direction),
        scale,
    )
    with torch.no_grad():
        values = sum_over_workers(torch.stack([getattr(own, name) for name in _SUMMED]))
    # Workers' gradients are averaged, but their shares must be summed.
    summed = dict(zip(_SUMMED, values.unbind(), strict=True))
    return LossTerms(**summed, scale=own.scale, objective=own.total * world_size(), seen=part.seen)


_SUMMED = ("total", "nce_t2v", "nce_v2t", "bottleneck", "radii", "direction")


def _weighted(
    config: LossConfig, nce: tuple[Tensor, Tensor], terms: tuple[Tensor, Tensor, Tensor], scale: Tensor
) -> LossTerms:
    total = (nce[0] + nce[1]) / 2
    weights = (config.bottleneck_weight, config.radii_weight, config.direction_weight)
    for weight, term in zip(weights, terms, strict=True):
        total = total + weight * term
    return LossTerms(total, *nce, *terms, scale, total)


class Objective(nn.Module):
    """The model and its loss as one module, so that DDP wraps the whole of it.

    In the factorised form every worker scores its own texts against the clips of all; in the direct form it
    computes the loss of the whole batch from gathered features. Either way the gather's backward sums the
    workers' gradients and DDP averages them, which is the gradient of one worker with the whole batch. In
    bf16 the encoders run under autocast, in ``fp16_released`` the towers are converted; features are float32
    after the encoders, and so are scores and losses.

    Args:
        model: to train.
        loss: weights and forms of the terms.
        train: its precision and ``micro_batch`` are used.
    """

    def __init__(self, model: GARE, loss: LossConfig, train: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self.config = loss
        self.train_config = train
        self._said = False

    def forward(self, batch: Batch | FeatureBatch, seed: int = 0, *, watched: bool = False) -> LossTerms:
        """Computes the loss of the global batch; ``batch`` is this worker's share of it.

        Args:
            batch: b pairs, at least one.
            seed: of the random draws in the loss, the same on every worker.
            watched: whether the terms must hold the values for diagnostics.

        Raises:
            GareError: if a worker has no pair, or if positives go by video and the batch lacks video ids.
        """
        scorer = self.model.scorer
        rows = exchange_row_counts(len(batch.frames), batch.frames.device)
        video = self._encode_video(batch)
        # Frames are most of the traffic; texts are encoded meanwhile.
        frames, mask = start_gather(video.frames, rows), start_gather(video.mask, rows)
        text = self._encode_text(batch)
        video_ids = None
        if self.config.positives == "video":
            if batch.video_ids is None:
                raise GareError("the batch does not say whose its captions are", where="loss.positives video")
            video_ids = gather(batch.video_ids, rows)
        video = VideoFeatures(frames.wait(), mask.wait())
        draws = StepRandomness.of_step(scorer, self.config, len(video), seed)
        path = scorer.path()
        if self.config.dropout_spread and scorer.increment is not None:
            path = "factorized"
        elif world_size() == 1:  # several workers must not choose by their own devices
            path = scorer.path_of_step(video.frames, why_not_fused(scorer, self.config))
        if path == "factorized":
            with stage("head"):
                return sharded_terms(
                    self.model, text, video, self.config, draws, video_ids, rows=rows, watched=watched
                )
        seen = self._seen(text, video, rows) if watched else None
        # Words are large; they are gathered only if ψ attends to them.
        words = gather(text.words, rows) if text.words is not None and scorer.needs_words else None
        text = TextFeatures(gather(text.embedding, rows), words, gather(text.mask, rows))
        torch.manual_seed(seed)
        with stage("head"):
            terms = loss_terms(self.model, text, video, self.config, draws, video_ids)
        return replace(terms, seen=seen)

    @torch.no_grad()
    def _seen(self, text: TextFeatures, video: VideoFeatures, rows: Rows) -> StepObservations | None:
        """Scores a step of the direct form again, factorised and without dropout, for diagnostics.

        Returns None, and logs it once, for a model that has no factorised form even without dropout.
        """
        model, training = self.model, self.model.training
        model.eval()
        try:
            if not (reason := model.scorer.why_direct):
                off = {"bottleneck_weight": 0.0, "radii_weight": 0.0, "direction_weight": 0.0}
                alone = self.config.model_copy(update=off)
                with stage("diagnostics"):
                    return sharded_terms(
                        model, text, video, alone, StepRandomness(), rows=rows, watched=True
                    ).seen
            if not self._said:
                logger.warning("tension, increments and modality gap are not measured: %s", reason)
                self._said = True
            return None
        finally:
            model.train(training)

    def _encode_text(self, batch: Batch | FeatureBatch) -> TextFeatures:
        """Encodes this worker's captions, float32 at least."""
        text = TextFeatures.cat(self._in_parts(self.encode_captions, batch))
        words = None if text.words is None else self._divided(text.words)
        return TextFeatures(self._divided(text.embedding), words, text.mask)

    def _encode_video(self, batch: Batch | FeatureBatch) -> VideoFeatures:
        """Encodes this worker's clips, float32 at least."""
        video = VideoFeatures.cat(self._in_parts(self.encode_clips, batch))
        return VideoFeatures(self._divided(video.frames), video.mask)

    def _in_parts(
        self, encode: Callable[[Batch | FeatureBatch], Encoded], batch: Batch | FeatureBatch
    ) -> list[Encoded]:
        """Encodes a batch whole, or in micro-batches.

        With ``train.micro_batch`` the towers' activations are freed after each micro-batch. Once the gradient
        at its features is known, the backward encodes the micro-batch again with the same random state
        (GradCache, arXiv 2101.06983).
        """
        count = len(batch.frames)
        size = self.train_config.micro_batch or count
        if size >= count or not torch.is_grad_enabled():
            return [encode(batch)]
        return [
            checkpoint(encode, batch[rows], use_reentrant=False, preserve_rng_state=True)
            for rows in slices(count, size)
        ]

    def _divided(self, features: Tensor) -> Tensor:
        """Returns the features; the encoders get divided gradients if the released recipe does so.

        Source: released code, whose gather keeps only a worker's own gradient while DDP averages over R.
        """
        train = self.train_config
        has_towers = isinstance(self.model.towers, ClipTowers)
        if train.precision != "fp16_released" or not has_towers or train.encoder_gradient_divisor == 1:
            return features
        return divide_gradient(features, train.encoder_gradient_divisor)

    def rehearse(self, num_pairs: int) -> None:
        """Runs the towers forward and backward on blank pairs, as a step does; no gradient is left."""
        config, device = self.model.config, self.model.logit_scale.device
        side = config.clip.image_size
        text_mask, frame_mask = (
            torch.ones(num_pairs, most, dtype=torch.bool, device=device)
            for most in (config.max_words, config.max_frames)
        )
        pictures = torch.zeros(*frame_mask.shape, side, side, 3, dtype=torch.uint8, device=device)
        blank = Batch(text_mask.long(), text_mask, pictures, frame_mask)
        text, video = self.encode_captions(blank), self.encode_clips(blank)
        learning = [one for one in self.model.towers.parameters() if one.requires_grad]
        if learning:
            total = text.embedding.sum() + video.frames.sum()
            torch.autograd.grad(total, learning, allow_unused=True)

    def encode_captions(self, part: Batch | FeatureBatch) -> TextFeatures:
        """Encodes the captions of a micro-batch, or of a whole one, in one pass; float32 at least."""
        with self._encoding(part):
            if isinstance(part, Batch):
                text = self.model.encode_text(part.token_ids.long(), part.token_mask)
            else:
                kind = self.model.logit_scale.dtype
                words = None if part.words is None else part.words.to(kind)
                stored = TextFeatures(part.text.to(kind), words, part.token_mask.bool())
                text = self.model.text_from_towers(stored)
        return text.float() if self.train_config.precision == "bf16" else text

    def encode_clips(self, part: Batch | FeatureBatch) -> VideoFeatures:
        """Encodes the clips of a micro-batch, or of a whole one, in one pass; float32 at least."""
        frames = part.frames
        if isinstance(part, Batch) and frames.dtype == torch.uint8:
            # Normalised here, not when batches are made: floats are four times as large, and this way only
            # those of one micro-batch exist.
            with stage("normalise"):
                frames = normalise(frames)
        with self._encoding(part):
            if isinstance(part, Batch):
                video = self.model.encode_video(frames, part.frame_mask)
            else:
                video = self.model.video_from_towers(frames.to(self.model.logit_scale.dtype), part.frame_mask)
        return video.float() if self.train_config.precision == "bf16" else video

    @contextmanager
    def _encoding(self, part: Batch | FeatureBatch) -> Iterator[None]:
        """Marks the towers' stage, under autocast if in bf16."""
        bf16 = self.train_config.precision == "bf16"
        with stage("towers"), torch.autocast(part.frames.device.type, torch.bfloat16, enabled=bf16):
            yield


class _DividedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, divisor: float) -> Tensor:
        ctx.divisor = divisor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.divisor, None


def divide_gradient(tensor: Tensor, divisor: float) -> Tensor:
    """Returns the tensor unchanged; its gradient is divided on the way back."""
    divided: Tensor = _DividedGradient.apply(tensor, divisor)  # type: ignore[no-untyped-call]
    return divided
