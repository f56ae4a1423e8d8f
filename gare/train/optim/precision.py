"""The precision of a training run: resolution of ``auto``, and checks of what a device supports."""

from __future__ import annotations

import torch

from gare.errors import ConfigError


def resolve_precision(precision: str, *, on_gpus: bool, have_bf16: bool) -> str:
    """Resolves a precision setting for the devices of a run.

    Args:
        precision: of ``train.precision``; auto becomes bf16 on GPUs that have it in hardware, else float32.
            CPUs get float32: only some have bf16, and a run must not depend on which.
        on_gpus: whether the run trains on GPUs.
        have_bf16: whether all GPUs compute bf16 in hardware.

    Raises:
        ConfigError: for bf16 on a GPU that does not have it in hardware.
    """
    if precision == "auto":
        return "bf16" if on_gpus and have_bf16 else "float32"
    if precision == "bf16" and on_gpus and not have_bf16:
        raise ConfigError(
            "is bf16, which a GPU of this run does not have in hardware",
            where="train.precision",
            accepted="GPUs from NVIDIA's Ampere (A100, RTX 30) on, or another precision in a new run",
        )
    return precision


def precision_on(precision: str, device: torch.device) -> str:
    """Applies ``resolve_precision`` to the device of this process.

    Raises:
        ConfigError: for bf16 on a GPU that does not have it in hardware.
    """
    on_gpu = device.type == "cuda"
    have_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return resolve_precision(precision, on_gpus=on_gpu, have_bf16=have_bf16)


def use_tf32(on: bool) -> None:
    """Lets this process compute products and convolutions of float32 on a GPU in TF32, or forbids it.

    By torch's own default, convolutions use TF32 and matrix products do not.
    """
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
