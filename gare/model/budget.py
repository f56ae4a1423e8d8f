"""The memory that scores and losses may take on a device, and the block size that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

MEGABYTE = 10**6
#: ``model.memory_mb`` auto without a GPU.
CPU_BYTES = 256 * MEGABYTE
#: ``model.memory_mb`` auto with a GPU, as a share of its free memory: gradients take as much again.
FREE_SHARE = 0.4
#: Bytes of a block on a GPU: launches cost little beside its work, and larger blocks are hardly faster.
GPU_BLOCK_BYTES = 1000 * MEGABYTE


@dataclass(frozen=True)
class Budget:
    """Bytes that scoring may take beyond its inputs and results.

    Attributes:
        total: bytes held at once.
        device: that holds them.
    """

    total: int
    device: torch.device

    @classmethod
    def of(cls, memory_mb: float | Literal["auto"], device: torch.device) -> Budget:
        """Returns the budget of a setting on a device."""
        if memory_mb != "auto":
            return cls(int(memory_mb * MEGABYTE), device)
        if device.type != "cuda":
            return cls(CPU_BYTES, device)
        free, _ = torch.cuda.mem_get_info(device)
        # Memory that torch has cached counts as free, too.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return cls(int(FREE_SHARE * free), device)

    def block(self, cached: int) -> int:
        """Returns the bytes of a block of pairs.

        Args:
            cached: bytes that stay in a processor's cache, so that blocks are fast on a CPU.
        """
        return cached if self.device.type == "cpu" else min(self.total // 4, GPU_BLOCK_BYTES)
