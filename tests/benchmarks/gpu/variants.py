"""The training step before and after its speed-up: compiled or not, by optimiser, by kept activations.

All rows are of GARE in bf16, measured in one run on one card, so that their ratios hold there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from tests.benchmarks.gpu.bench import Row


@dataclass(frozen=True)
class Variant:
    """Settings with which a step is measured.

    Attributes:
        name: name of its row.
        settings: overrides of the configuration.
        is_old: True for the old optimiser, BertAdam as a loop over parameters.
    """

    name: str
    settings: tuple[str, ...]
    is_old: bool = False


OLD, NEW, ADAMW, SMALL = "old", "new", "new, adamw", "new, activation checkpointing"
VARIANTS = (
    Variant(OLD, ("train.compile=off", "train.optimizer=bert_adam"), is_old=True),
    Variant("old, fused optimizer", ("train.compile=off", "train.optimizer=bert_adam")),
    Variant(NEW, ("train.compile=towers", "train.optimizer=bert_adam")),
    Variant(ADAMW, ("train.compile=towers", "train.optimizer=adamw")),
    Variant(
        SMALL, ("train.compile=towers", "train.optimizer=bert_adam", "train.activation_checkpointing=true")
    ),
)


def ratios(rows: Iterable[Row]) -> dict[str, float]:
    """Returns ratios of rows; leaves out a ratio if one of its rows is missing or has another batch size."""
    by_name = {row["variant"]: row for row in rows if "step_ms" in row}
    pairs = {
        "step_new_over_old": (NEW, OLD, "step_ms"),
        "step_bert_adam_over_adamw": (NEW, ADAMW, "step_ms"),
        "step_checkpointed_over_new": (SMALL, NEW, "step_ms"),
        "gb_checkpointed_over_new": (SMALL, NEW, "peak_gb"),
    }
    return {
        name: by_name[above][key] / by_name[below][key]
        for name, (above, below, key) in pairs.items()
        if {above, below} <= by_name.keys() and by_name[above]["pairs"] == by_name[below]["pairs"]
    }


class LoopingBertAdam(Optimizer):
    """BertAdam as a loop over parameters, as it was before its fused kernel: the old step's optimiser.

    Args:
        optimizer: optimiser whose parameters, learning rates and decay it takes over.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        keys = ("params", "lr", "peak_lr", "weight_decay")
        super().__init__([{key: group[key] for key in keys} for group in optimizer.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                moments = self.state[parameter]
                if not moments:
                    moments["mean"], moments["square"] = (torch.zeros_like(parameter) for _ in range(2))
                grad = parameter.grad
                grad = grad * (1.0 / (grad.norm() + 1e-6)).clamp(max=1.0)
                moments["mean"].lerp_(grad, 1 - 0.9)
                moments["square"].mul_(0.98).addcmul_(grad, grad, value=1 - 0.98)
                update = moments["mean"] / (moments["square"].sqrt() + 1e-6)
                update += group["weight_decay"] * parameter
                parameter.sub_(group["lr"] * update)
