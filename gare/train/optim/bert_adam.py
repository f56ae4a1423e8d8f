"""The optimiser that the released GARE code trains with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

#: Steps after which Adam's bias correction is 1 in every precision; in float32 one more step changes nothing.
STEPS_WITHOUT_BIAS = 1e9


class BertAdam(Optimizer):
    """Adam without bias correction, each parameter's gradient clipped to norm 1, decoupled weight decay.

    m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²,  θ ← θ − lr·(m/(√v + ε) + decay·θ), with g scaled down to
    ‖g‖ ≤ ``max_norm`` for each parameter by itself.

    By default parameters go through torch's fused AdamW kernel, which computes this formula if the bias
    correction is 1. Parameters in half precision, and all parameters if ``fused`` is off, are updated one
    operation after the other as in the released training. Each operation is rounded to the parameter's
    precision, and so are the moments: the second moment of small gradients is then 0 in fp16.

    Source: released code, which took it from the first BERT ports to PyTorch.

    Args:
        params: parameters or groups of them; groups may set ``lr`` and ``weight_decay``.
        lr: learning rate.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: decay of the weights, not of the moments.
        max_norm: bound on the norm of each parameter's gradient.
        fused: whether float32 uses the fused kernel, which rounds differently from the released code.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.2,
        max_norm: float = 1.0,
        *,
        fused: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_norm": max_norm}
        super().__init__(params, defaults)
        self.fused = fused
        # Not part of the state: it never changes, and checkpoints of earlier versions lack it.
        self._steps: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient; the gradients are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            held = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in held:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
            for some in _by_device_and_dtype(held):
                means = [self.state[parameter]["exp_avg"] for parameter in some]
                squares = [self.state[parameter]["exp_avg_sq"] for parameter in some]
                found = [parameter.grad for parameter in some if parameter.grad is not None]
                gradients = _clipped(found, group["max_norm"])
                if self.fused and some[0].dtype not in (torch.float16, torch.bfloat16):
                    self._step_fused(some, gradients, means, squares, group)
                else:
                    _step_in_order(some, gradients, means, squares, group)
        return loss

    def _step_fused(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        means: list[Tensor],
        squares: list[Tensor],
        group: dict[str, Any],
    ) -> None:
        device = parameters[0].device
        if device not in self._steps:
            self._steps[device] = torch.tensor(STEPS_WITHOUT_BIAS, device=device)
        adamw(
            parameters,
            gradients,
            means,
            squares,
            [],
            [self._steps[device]] * len(parameters),
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _by_device_and_dtype(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return list(groups.values())


def _clipped(gradients: Sequence[Tensor], max_norm: float) -> list[Tensor]:
    """Scales gradients that are too long down to the norm, in new memory."""
    norms = torch.stack(torch._foreach_norm(list(gradients)))
    # In the gradients' own precision, as in the released code. All at once: one wait for the device.
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0).tolist()
    return [
        gradient if factor == 1 else gradient * factor
        for gradient, factor in zip(gradients, factors, strict=True)
    ]


def _step_in_order(
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    group: dict[str, Any],
) -> None:
    """Updates by the released code's operations, in its order."""
    beta1, beta2 = group["betas"]
    # Never scale or add numbers in place: on a CPU (torch 2.13) that rounds the numbers to fp16 first.
    torch._foreach_copy_(means, torch._foreach_mul(means, beta1))
    torch._foreach_add_(means, gradients, alpha=1 - beta1)
    torch._foreach_copy_(squares, torch._foreach_mul(squares, beta2))
    torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
    updates = torch._foreach_div(means, torch._foreach_add(torch._foreach_sqrt(squares), group["eps"]))
    if group["weight_decay"]:
        torch._foreach_add_(updates, torch._foreach_mul(parameters, group["weight_decay"]))
    torch._foreach_sub_(parameters, torch._foreach_mul(updates, group["lr"]))
