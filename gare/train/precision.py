"""The precision of a training run: what ``auto`` becomes, and what a device can compute in."""

from __future__ import annotations

import torch

from gare.errors import ConfigError


def resolve_precision(precision: str, device: torch.device) -> str:
    """The precision that a setting means on a device.

    Args:
        precision: of ``train.precision``; auto becomes bf16 on a GPU that has it in hardware, else float32.
            A CPU gets float32: some have bf16 too, and a run would depend on which.
        device: to train on.

    Raises:
        ConfigError: for bf16 on a GPU that does not have it in hardware.
    """
    if precision == "auto":
        return "bf16" if device.type == "cuda" and has_bf16() else "float32"
    if precision == "bf16" and device.type == "cuda" and not has_bf16():
        raise ConfigError(
            f"{torch.cuda.get_device_name()} has no bf16 in hardware",
            where="train.precision",
            accepted="GPUs from NVIDIA's Ampere (A100, RTX 30) on, or train.precision=float32 for a new run",
        )
    return precision


def has_bf16() -> bool:
    """True if the GPU of this process computes bf16 in hardware."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def use_tf32(on: bool) -> None:
    """Lets this process compute products and convolutions of float32 on a GPU in TF32, or forbids it.

    torch's own default has convolutions in TF32 and matrix products not.
    """
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
