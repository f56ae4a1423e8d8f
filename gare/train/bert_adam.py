"""The optimiser that the released GARE code trains with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class BertAdam(Optimizer):
    """Adam without bias correction, each parameter's gradient clipped to norm 1, decoupled weight decay.

    m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²,  θ ← θ − lr·(m/(√v + ε) + decay·θ), with g scaled down to
    ‖g‖ ≤ ``max_norm`` for each parameter by itself.

    Source: released code, which took it from the first BERT ports to PyTorch.

    Args:
        params: parameters or groups of them; groups may set ``lr`` and ``weight_decay``.
        lr: learning rate.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: decay of the weights, not of the moments.
        max_norm: bound on the norm of each parameter's gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.2,
        max_norm: float = 1.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_norm": max_norm}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; gradients themselves are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                grad = parameter.grad
                grad = grad * (group["max_norm"] / (grad.norm() + 1e-6)).clamp(max=1.0)
                state["exp_avg"].lerp_(grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                update = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"])
                update += group["weight_decay"] * parameter
                parameter.sub_(group["lr"] * update)
        return loss
