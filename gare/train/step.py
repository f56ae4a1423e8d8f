"""One optimiser step of the global batch, the same on one worker and on many."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gare.config import Config, TrainConfig
from gare.data.batch import Batch, FeatureBatch
from gare.errors import DivergedError
from gare.model.encoders.clip import ClipTowers
from gare.model.encoders.compiled import checkpoint_activations, compile_towers
from gare.model.encoders.released_fp16 import convert_to_released_fp16
from gare.model.gare import GARE
from gare.train.input.sampler import step_seed
from gare.train.loss.diagnostics import diagnose
from gare.train.loss.gather import gather_names, rank, world_size
from gare.train.loss.objective import LossTerms, Objective
from gare.train.loss.sharded import StepObservations
from gare.train.loss.trust_region import trust_region_step
from gare.train.optim.optimizer import build_optimizer, clip_gradients, freeze, set_learning_rate
from gare.train.optim.precision import precision_on, use_tf32
from gare.train.stages import stage

logger = logging.getLogger(__name__)

#: Pairs of this worker for which the analytic trust-region step is computed, in the direct form.
TRUST_REGION_PAIRS = 32
#: Pairs of the compiler's first call on a CPU, where those of a whole step would take minutes.
REHEARSED_ON_CPU = 2
#: Largest number of video ids named by a failed step.
MAX_IDS_NAMED = 128


@dataclass
class Learner:
    """Model, objective and optimiser of one worker.

    Attributes:
        model: the model itself, not wrapped.
        objective: the objective around the model, wrapped by DDP if there are several workers.
        optimizer: over the model's parameters.
        config: of the run.
        num_steps: of the whole run, for the schedule.
        step: optimiser steps done.
    """

    model: GARE
    objective: nn.Module
    optimizer: Optimizer
    config: Config
    num_steps: int
    step: int = 0


def build_learner(model: GARE, config: Config, num_steps: int, device: torch.device) -> Learner:
    """Moves the model to the device, applies ``train.freeze``, wraps its objective, builds the optimiser.

    Raises:
        ConfigError: for a precision that the device does not support, or if ``train.compile`` is towers and
            the compiler fails.
    """
    use_tf32(config.train.tf32)
    precision = precision_on(config.train.precision, device)
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    if precision == "fp16_released" and isinstance(model.towers, ClipTowers):
        convert_to_released_fp16(model.towers)
    freeze(model, config.train)
    bare = Objective(model, config.loss, config.train).to(device)
    _prepare_towers(bare, config.train, device)
    objective: nn.Module = bare
    if world_size() > 1:
        objective = DistributedDataParallel(
            objective, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
    return Learner(model, objective, build_optimizer(model, config.train), config, num_steps)


def _prepare_towers(objective: Objective, train: TrainConfig, device: torch.device) -> None:
    """Sets up activation checkpointing and the compiler, before DDP wraps the model; only with towers."""
    towers = objective.model.towers
    if not isinstance(towers, ClipTowers):
        return
    if train.activation_checkpointing:
        checkpoint_activations(towers)
    # As many pairs as a step has in one pass: the sizes of the first call decide which kernels are chosen.
    share = -(-train.batch_size // world_size())
    pairs = min(train.micro_batch or share, share if device.type == "cuda" else REHEARSED_ON_CPU)
    objective.train()
    compile_towers(
        towers,
        train.compile,
        device,
        lambda: objective.rehearse(pairs),
        key="train.compile",
        say=logger.debug if rank() else logger.info,
    )


def train_step(
    learner: Learner, batch: Batch | FeatureBatch, video_ids: Sequence[str] = ()
) -> dict[str, float]:
    """Does one optimiser step on this worker's share of the global batch.

    Args:
        learner: to train.
        batch: this worker's share.
        video_ids: of the batch's clips, to name them if the step fails.

    Returns:
        The loss terms of the global batch, κ, the gradient norm before clipping and the learning-rate factor.

    Raises:
        DivergedError: for a loss or a gradient that is not finite; the weights are then as before the step.
    """
    train = learner.config.train
    learner.model.train()
    factor = set_learning_rate(learner.optimizer, learner.step, learner.num_steps, train)
    is_last = learner.step == learner.num_steps - 1
    watched = bool(train.diagnostics_every) and (is_last or learner.step % train.diagnostics_every == 0)
    terms = compute_gradients(learner, batch, video_ids, watched=watched)
    with stage("optimizer"):
        norm = clip_gradients(learner.model, train.max_grad_norm)
    if not math.isfinite(norm):
        wrong = [
            name
            for name, parameter in learner.model.named_parameters()
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ]
        where = f", first in {wrong[0]}" if wrong else ""
        raise _not_finite(learner, f"the gradient is not finite{where}, though the loss is", video_ids)
    values = {name: float(value) for name, value in terms.named().items()}
    values |= {"train/grad_norm": norm, "train/lr_factor": factor}
    if terms.seen is not None:
        # Before the weights change: the measures belong to the loss that was computed.
        with stage("diagnostics"):
            values |= _measures(learner, terms.seen)
    with stage("optimizer"):
        learner.optimizer.step()
        learner.model.towers.clamp_logit_scale()
    learner.step += 1
    return values


def _measures(learner: Learner, seen: StepObservations) -> dict[str, float]:
    """Computes the diagnostics of a step."""
    model, train = learner.model, learner.config.train
    measures = diagnose(model.scorer, seen, train.diagnostics_texts)
    if train.trust_region_radius and model.increment is not None:
        text, video = seen.features(TRUST_REGION_PAIRS)
        if text.words is not None or not model.scorer.needs_words:
            measures |= trust_region_step(model, text, video, train.trust_region_radius).measures()
    return measures


def compute_gradients(
    learner: Learner, batch: Batch | FeatureBatch, video_ids: Sequence[str] = (), *, watched: bool = False
) -> LossTerms:
    """Runs forward and backward, which leave the gradient of the global batch's loss on every parameter.

    Args:
        learner: to train.
        batch: this worker's share.
        video_ids: of the batch's clips, to name them if the loss is not finite.
        watched: whether the terms must hold the values for diagnostics.
    """
    learner.optimizer.zero_grad(set_to_none=True)
    # Random draws depend on (seed, step): the same on every worker, and the same again after a restart.
    seed = step_seed(learner.config.train.seed, learner.step)
    torch.manual_seed(seed)
    terms: LossTerms = learner.objective(batch, seed, watched=watched)
    if not torch.isfinite(terms.total):
        values = {name: float(value) for name, value in terms.named().items() if name != "loss/total"}
        wrong = ", ".join(
            f"{name} is {value:g}" for name, value in values.items() if not math.isfinite(value)
        )
        raise _not_finite(learner, f"the loss is not finite: {wrong or 'the sum of its terms'}", video_ids)
    with stage("backward"):
        terms.objective.backward()  # type: ignore[no-untyped-call]
    return terms


def _not_finite(learner: Learner, what: str, video_ids: Sequence[str]) -> DivergedError:
    # The loss is of the global batch, so all workers come here together.
    ids = gather_names(video_ids)
    more = f" and {len(ids) - MAX_IDS_NAMED} more" if len(ids) > MAX_IDS_NAMED else ""
    return DivergedError(
        f"{what}; videos of the batch: {', '.join(ids[:MAX_IDS_NAMED])}{more}" if ids else what,
        where=f"step {learner.step}",
        accepted="a lower train.lr, or look at the batch's videos; the last checkpoint is untouched",
    )
