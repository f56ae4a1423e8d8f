"""Large matrix products at a stated precision."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Precision = Literal["exact", "tf32", "bf16"]


def product(a_XD: Tensor, b_YD: Tensor, precision: str = "exact") -> Tensor:
    """A·Bᵀ (X, Y).

    Args:
        a_XD: float32, or float64 for tests.
        b_YD: likewise.
        precision: exact keeps float32's errors: by three products in TF32 where the device has tensor cores
            for them; ``tf32`` takes one, ``bf16`` one of rounded operands. On a CPU all are float32.
    """
    if precision == "exact" and not _has_tf32(a_XD):
        return a_XD @ b_YD.T
    if precision != "exact" and a_XD.device.type == "cpu":
        return a_XD @ b_YD.T
    found: Tensor = _Product.apply(a_XD, b_YD, precision)  # type: ignore[no-untyped-call]
    return found


def _has_tf32(tensor: Tensor) -> bool:
    return (
        tensor.is_cuda
        and tensor.dtype == torch.float32
        and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
    )


class _Product(torch.autograd.Function):
    """A·Bᵀ whose gradients are products of the same precision."""

    @staticmethod
    def forward(ctx: Any, a_XD: Tensor, b_YD: Tensor, precision: str) -> Tensor:
        ctx.save_for_backward(a_XD, b_YD)
        ctx.precision = precision
        return _times(a_XD, b_YD.T, precision)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XY: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a_XD, b_YD = ctx.saved_tensors
        needs_a, needs_b, _ = ctx.needs_input_grad
        return (
            _times(grad_XY, b_YD, ctx.precision) if needs_a else None,
            _times(grad_XY.T, a_XD, ctx.precision) if needs_b else None,
            None,
        )


def _times(a: Tensor, b: Tensor, precision: str) -> Tensor:
    if precision == "bf16":
        return (a.bfloat16() @ b.bfloat16()).to(a.dtype)
    if precision == "exact":
        a, b = split_product(a, b)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return a @ b
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def split_product(a_XD: Tensor, b_DY: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (X, 3D) and (3D, Y) whose product in TF32 has float32's errors.

    Each number is the sum of one that TF32 holds exactly and a rest. Of the four products of these only that
    of the rests is left out, which is 2⁻²² of the whole. One product adds up the other three in float32.

    Source: 3×TF32 as CUTLASS emulates float32.
    """
    a_high, b_high = round_to_tf32(a_XD), round_to_tf32(b_DY)
    a_rest, b_rest = a_XD - a_high, b_DY - b_high
    return torch.cat([a_rest, a_high, a_high], dim=1), torch.cat([b_high, b_rest, b_high], dim=0)


def round_to_tf32(values: Tensor) -> Tensor:
    """The nearest numbers of 10 bits behind the point, which TF32 holds exactly; float32."""
    bits = values.contiguous().view(torch.int32)
    # Half of the last place that stays, then the 13 bits behind it are cut off.
    rounded = (bits + 0x1000) & ~0x1FFF
    return rounded.view(torch.float32)
