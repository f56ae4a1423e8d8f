"""The step before and after it was made faster: compiled or not, by optimiser, with activations kept or not.

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
    """Settings that a step is measured with.

    Attributes:
        name: of its row.
        settings: beside those of the configuration.
        is_old: True if the optimiser is the loop over parameters that BertAdam was.
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
    """What the rows come to; a ratio is left out where one of its rows is, or is of another batch."""
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
    """BertAdam parameter by parameter, as it was before it had a fused kernel: the old step's optimiser.

    Args:
        optimizer: whose parameters it takes over, with their rates and decay.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        keys = ("params", "lr", "peak_lr", "weight_decay")
        super().__init__([{key: group[key] for key in keys} for group in optimizer.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
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
