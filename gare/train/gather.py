"""Gathering rows from all workers, with the true gradient.

R workers, each with its own block of rows; everyone gets all blocks in the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Workers that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This worker's place among them."""
    return dist.get_rank() if world_size() > 1 else 0


class _Gather(torch.autograd.Function):
    """All-gather of equal blocks; its backward sums what every worker says about the local block.

    PyTorch's own differentiable all_gather hands gloo the incoming gradient as it lies in memory, and a
    non-contiguous one comes back permuted without a word (2.13). Here both directions are contiguous.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        blocks = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(blocks, local)
        return torch.cat(blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # A copy: the incoming gradient may be another consumer's too, and the all-reduce works in place.
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        # gloo has no reduce-scatter; an all-reduce of the same bytes and a slice give the same sum.
        dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()].contiguous()


def gather(local: Tensor) -> Tensor:
    """All workers' rows: (b, …) on each of R workers → (R·b, …), differentiable.

    The gradient of the local rows is the sum over the workers of their gradients. With every worker
    computing the whole batch's loss, DDP's mean over workers then gives the gradient of one worker that
    holds the whole batch. b must be the same everywhere.
    """
    if world_size() == 1:
        return local
    gathered: Tensor = _Gather.apply(local.contiguous())  # type: ignore[no-untyped-call]
    return gathered


def gather_names(local: Sequence[str]) -> list[str]:
    """All workers' strings, rank by rank. All must call it."""
    if world_size() == 1:
        return list(local)
    parts: list[list[str]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, list(local))
    return [name for part in parts for name in part]


def gather_unequal(local: Tensor) -> Tensor:
    """All workers' rows where their numbers differ, rank by rank, without gradient."""
    if world_size() == 1:
        return local
    counts = [torch.zeros(1, dtype=torch.int64, device=local.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(local)], device=local.device))
    longest = int(max(counts))
    padded = local.new_zeros(longest, *local.shape[1:])
    padded[: len(local)] = local
    blocks = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(blocks, padded)
    return torch.cat([block[: int(count)] for block, count in zip(blocks, counts, strict=True)])
