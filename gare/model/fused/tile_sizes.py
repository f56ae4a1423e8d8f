"""Sizes of the fused kernels' tiles, and the reasons why they cannot run somewhere."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

#: Attention weights of a video whose tiles fit a multiprocessor: 64 frames, or 5 heads of 12.
MOST_WEIGHTS = 64
#: Shared memory that programs take, bytes, by rows of their tiles; as compiled for an H100.
SHARED_BYTES = {16: 40_000, 32: 80_000, 64: 210_000}


def why_unavailable(num_weights: int, dtype: torch.dtype, device: torch.device) -> str:
    """Returns the reason why the kernels cannot run; empty if they can.

    Args:
        num_weights: attention weights of a video, frames times heads.
        dtype: of the features.
        device: of the features.
    """
    if num_weights > MOST_WEIGHTS:
        return f"frames times heads are {num_weights}, and the kernel holds {MOST_WEIGHTS}"
    if not _has_triton():
        return "Triton is not installed (pip install 'gare[kernels]')"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"Triton has no kernels for {device.type}"
    if dtype != torch.float32 and not (interpreted and dtype == torch.float64):
        return f"features are {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        has: int | None = getattr(properties, "shared_memory_per_block_optin", None)
        needs = SHARED_BYTES[tile_rows(num_weights)]
        if has is not None and needs > has:
            return f"its tiles take {needs:,} bytes of shared memory, and the GPU has {has:,}"
        return _fault_of(device)
    return ""


@functools.cache
def _fault_of(device: torch.device) -> str:
    """Returns the reason why Triton cannot run the smallest kernel on a GPU; empty if it can."""
    from gare.model.fused import kernels

    try:
        written = torch.zeros(1, device=device)
        with on_device_of(written):
            kernels.touch[(1,)](written)
        return "" if float(written) == 1 else "Triton's kernels do nothing on this GPU"
    except Exception as error:  # from a compiler, a driver, or a card that is too old
        return f"Triton fails on this GPU: {type(error).__name__}: {str(error)[:200]}"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class Tiles(NamedTuple):
    """Size of a program of the kernels.

    Attributes:
        texts: texts that it takes at a time, a power of two, 16 at least.
        warps: warps that work on them.
    """

    texts: int
    warps: int


def tiles_of(num_weights: int) -> Tiles:
    """Returns the size of a program, such that its tiles (almost) fit in registers."""
    return Tiles(32 if num_weights <= 32 else 16, 8)


def tile_rows(count: int) -> int:
    """Returns the rows of a tile, a power of two."""
    return max(16, 1 << (count - 1).bit_length())


def on_device_of(tensor: Tensor) -> torch.cuda.device:
    """Returns a context in which kernels start on a tensor's GPU; it changes nothing for a CPU tensor."""
    return torch.cuda.device(tensor.get_device() if tensor.is_cuda else -1)
