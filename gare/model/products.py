"""Matrix products at a stated precision.

``exact`` is as accurate as float32: on a GPU with tensor cores, by one TF32 product of operands that are
split in two. ``tf32`` takes the operands as they are, ``bf16`` rounds them. On a CPU, and for float64, all
three compute in the operands' own precision.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_SWITCH = threading.Lock()


def product(a_XD: Tensor, b_YD: Tensor, precision: str = "exact") -> Tensor:
    """Computes A·Bᵀ (X, Y); its gradients are products of the same precision."""
    if _is_plain(a_XD):
        return a_XD @ b_YD.T
    found: Tensor = _Product.apply(a_XD, b_YD, precision)  # type: ignore[no-untyped-call]
    return found


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a_XD: Tensor, b_YD: Tensor, precision: str) -> Tensor:
        ctx.save_for_backward(a_XD, b_YD)
        ctx.precision = precision
        return multiply(a_XD, b_YD.T, precision)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XY: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a_XD, b_YD = ctx.saved_tensors
        needs_a, needs_b, _ = ctx.needs_input_grad
        return (
            multiply(grad_XY, b_YD, ctx.precision) if needs_a else None,
            multiply(grad_XY.T, a_XD, ctx.precision) if needs_b else None,
            None,
        )


def multiply(a: Tensor, b: Tensor, precision: str = "exact") -> Tensor:
    """Computes A·B of matrices or batches of matrices; has no gradient where it is not a plain product."""
    if _is_plain(a):
        return a @ b
    if precision == "bf16":
        return (a.bfloat16() @ b.bfloat16()).to(a.dtype)
    if precision == "exact":
        if torch.cuda.get_device_capability(a.device) < (8, 0):  # no TF32
            return a @ b
        a, b = split_factors(a, b)
    # PyTorch's switch is global to the process: no other thread may see it changed, or reset it too late.
    with _SWITCH:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return a @ b
        finally:
            torch.set_float32_matmul_precision(before)


def add_product(total: Tensor, a: Tensor, b: Tensor, precision: str = "exact") -> None:
    """Adds A·B to a batch of matrices in place."""
    if _is_plain(a):
        total.baddbmm_(a, b)
    else:
        total += multiply(a, b, precision)


def _is_plain(tensor: Tensor) -> bool:
    return not tensor.is_cuda or tensor.dtype != torch.float32


def split_factors(a_XD: Tensor, b_DY: Tensor) -> tuple[Tensor, Tensor]:
    """Returns factors (…, X, 3D) and (…, 3D, Y) whose product in TF32 is as accurate as float32.

    Each number is split into a TF32 number and a remainder. Of the four products only that of the two
    remainders is left out, 2⁻²² of the whole; a single product adds up the other three in float32.

    Source: 3×TF32 as CUTLASS emulates float32.
    """
    a_high, b_high = round_to_tf32(a_XD), round_to_tf32(b_DY)
    a_rest, b_rest = a_XD - a_high, b_DY - b_high
    return torch.cat([a_rest, a_high, a_high], dim=-1), torch.cat([b_high, b_rest, b_high], dim=-2)


def round_to_tf32(values: Tensor) -> Tensor:
    """Rounds to the nearest float32 numbers with 10 fraction bits, which TF32 holds exactly."""
    bits = values.contiguous().view(torch.int32)
    # Add half a unit of the last bit that is kept, then cut off the 13 bits below it.
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
