"""Optimiser, parameter groups and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from gare.config import TrainConfig
from gare.model.gare import GARE
from gare.train.optim.bert_adam import BertAdam

#: ε of both optimisers.
EPS = 1e-6


def build_optimizer(model: GARE, config: TrainConfig) -> Optimizer:
    """Builds AdamW or BertAdam with groups by part: one rate for CLIP, one for the rest, no decay on biases.

    β₁ 0.9, β₂ 0.98, ε 1e-6 as in the released training; the groups hold their peak rate as ``peak_lr``.
    """
    groups: list[dict[str, object]] = []
    for name, parameters in _parameter_groups(model, config):
        peak = _peak_rate(name.split("/")[0], config)
        decay = 0.0 if name.endswith("bias") else config.weight_decay
        groups.append(
            {"name": name, "params": parameters, "lr": peak, "peak_lr": peak, "weight_decay": decay}
        )
    if config.optimizer == "bert_adam":
        # The released precision follows the released code, operation by operation.
        fused = config.precision != "fp16_released"
        return BertAdam(groups, betas=(0.9, 0.98), eps=EPS, fused=fused)
    return AdamW(groups, betas=(0.9, 0.98), eps=EPS, fused=True)


def _peak_rate(part: str, config: TrainConfig) -> float:
    rate = config.lr if part in ("head", "adapters") else config.clip_lr
    return rate if part in ("head", "scale") else rate * config.encoder_lr_factor


def freeze(model: GARE, config: TrainConfig) -> None:
    """Turns off gradients in the parts that ``train.freeze`` names; the logit scale always learns."""
    what = config.freeze
    if what == "auto":
        what = "patch_conv" if config.clip_weights or config.start_from else "none"
    for name, parameter in model.named_parameters():
        tower = _tower(name)
        frozen = {
            "none": False,
            "patch_conv": name.endswith("patch_embedding.weight"),
            "image": tower == "image",
            "text": tower == "text",
            "towers": tower in ("image", "text"),
            "baseline": tower != "scale" and not name.startswith(("increment.", "radius.")),
            "encoders": tower in ("image", "text", "adapters"),
        }
        if frozen[what]:
            parameter.requires_grad_(False)


def _tower(name: str) -> str:
    """Returns image, text, scale, adapters or head for the name of a parameter of ``GARE``."""
    if name.startswith("adapters."):
        return "adapters"
    if not name.startswith("towers.clip."):
        return "head"
    part = name.removeprefix("towers.clip.").split(".")[0]
    return "scale" if part == "logit_scale" else "text" if part.startswith("text") else "image"


def _parameter_groups(model: GARE, config: TrainConfig) -> Iterator[tuple[str, list[nn.Parameter]]]:
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "bias" if name.endswith("bias") else "weight"
        part = _tower(name)
        if part == "adapters" and config.encoder_lr_factor == 1:
            # One group, as in checkpoints of versions without the factor.
            part = "head"
        groups.setdefault(f"{part}/{kind}", []).append(parameter)
    yield from groups.items()


def set_learning_rate(optimizer: Optimizer, step: int, num_steps: int, config: TrainConfig) -> float:
    """Sets every group's rate for this step and returns the factor on the peak.

    Args:
        optimizer: from ``build_optimizer``.
        step: 0 for the first step.
        num_steps: steps of the whole run.
        config: its optimiser decides between ``rate_factor`` and ``rate_factor_released``; for the latter,
            ``schedule_epochs`` are converted to steps in proportion to the run's epochs.
    """
    factor = _rate_factor_of_run(step, num_steps, config)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return factor


def _rate_factor_of_run(step: int, num_steps: int, config: TrainConfig) -> float:
    if config.optimizer != "bert_adam":
        return rate_factor(step, num_steps, config.warmup_fraction)
    period = num_steps * (config.schedule_epochs or config.epochs) / config.epochs
    return rate_factor_released(step, period, config.warmup_fraction)


def rate_factor(step: int, num_steps: int, warmup_fraction: float) -> float:
    """Computes linear warm-up, then 0.5(1 + cos πx), where x is the share of the whole run that is done.

    The cosine is not restarted after the warm-up. Source: released training, in which the first step has rate
    0; ours starts at the end of the first step's share, so that no step is lost.
    """
    done = (step + 1) / (num_steps + 1)
    if done < warmup_fraction:
        return done / warmup_fraction
    return 0.5 * (1 + math.cos(math.pi * done))


def rate_factor_released(step: int, num_steps: float, warmup_fraction: float) -> float:
    """Computes the released schedule: ``rate_factor`` with x = step / num_steps, so that the first rate is 0.

    Beyond ``num_steps`` it rises again, to 1 at twice ``num_steps``. Source: released training, where
    ``num_steps`` is that of 5 epochs.
    """
    done = step / num_steps
    if done < warmup_fraction:
        return done / warmup_fraction
    return 0.5 * (1 + math.cos(math.pi * done))


def reach_of_towers(config: TrainConfig, num_steps: int) -> float:
    """Estimates the farthest that a weight of the towers can move in a run.

    It is their rate times the sum of the schedule's factors: an update of Adam is hardly longer than 1.
    """
    factors = (_rate_factor_of_run(step, num_steps, config) for step in range(num_steps))
    return _peak_rate("image", config) * sum(factors)


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Clips the global gradient norm in place and returns the norm before clipping."""
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
