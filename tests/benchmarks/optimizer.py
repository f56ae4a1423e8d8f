"""``python -m tests.benchmarks.optimizer``: BertAdam's own step over that of torch's fused AdamW.

Over the parameters of GARE at ViT-B/32, with gradients whose norms are at most 1, as after the global clip.
The loop is BertAdam as its formula, parameter by parameter; in order is what
``train.precision=fp16_released`` takes. On the GPU where there is one. Tables go to stderr, one JSON line to
stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gare.config import Config
from gare.model.gare import GARE
from gare.train.optim.bert_adam import BertAdam
from tests.benchmarks.measure import interleaved


class _Loop:
    """BertAdam as in its formula, parameter by parameter."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        self.held = [(one, torch.zeros_like(one), torch.zeros_like(one)) for one in parameters]
        self.lr, self.weight_decay = lr, weight_decay

    @torch.no_grad()
    def step(self) -> None:
        for parameter, mean, square in self.held:
            assert parameter.grad is not None
            grad = parameter.grad * (1 / (parameter.grad.norm() + 1e-6)).clamp(max=1.0)
            mean.lerp_(grad, 0.1)
            square.mul_(0.98).addcmul_(grad, grad, value=0.02)
            update = mean / (square.sqrt() + 1e-6)
            update += self.weight_decay * parameter
            parameter.sub_(self.lr * update)


def measure(shapes: list[torch.Size], device: torch.device, rounds: int) -> dict[str, float]:
    """Returns the median seconds of one step by optimiser."""
    generator = torch.Generator().manual_seed(0)
    # One set of parameters for all: four sets with their moments would take 10 GB.
    held = [nn.Parameter(0.02 * torch.randn(shape, generator=generator).to(device)) for shape in shapes]
    for parameter in held:
        parameter.grad = torch.full_like(parameter, 1e-6)

    def timed(step: Callable[[], object]) -> Callable[[], object]:
        def call() -> None:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return call

    rates = {"lr": 1e-6, "weight_decay": 0.2}
    return interleaved(
        {
            "AdamW, fused": timed(torch.optim.AdamW(held, fused=True, **rates).step),
            "BertAdam": timed(BertAdam(held, **rates).step),
            "BertAdam, in order": timed(BertAdam(held, fused=False, **rates).step),
            "BertAdam, a loop": timed(_Loop(held, **rates).step),
        },
        rounds,
    )


def main() -> None:
    """Measures and prints the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="steps of each, in turns")
    rounds = parser.parse_args().rounds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors: list[Tensor] = list(GARE(Config().model).parameters())
    seconds = measure([tensor.shape for tensor in tensors], device, rounds)
    numbers = sum(tensor.numel() for tensor in tensors)
    print(f"{len(tensors)} tensors, {numbers / 1e6:.0f} M numbers, {device.type}", file=sys.stderr)
    for name, value in seconds.items():
        print(f"{name:20} {1000 * value:8.1f} ms  {value / seconds['AdamW, fused']:5.2f}", file=sys.stderr)
    ratios = {name: round(value / seconds["AdamW, fused"], 3) for name, value in seconds.items()}
    print(json.dumps({"device": device.type, "seconds": seconds, "over_fused_adamw": ratios}))


if __name__ == "__main__":
    main()
