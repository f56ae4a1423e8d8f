"""Gathering rows from all workers, with the true gradient.

R workers, each with its own block of rows; everyone gets all blocks in the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gare.errors import GareError
from gare.train.stages import stage


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
        with stage("communication"):
            dist.all_gather(blocks, local)
        return torch.cat(blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # A copy: the incoming gradient may be another consumer's too, and the all-reduce works in place.
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        # gloo has no reduce-scatter; an all-reduce of the same bytes and a slice give the same sum.
        with stage("communication"):
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


class _Sum(torch.autograd.Function):
    """All-reduce by sum; its backward is the same of the gradients."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.clone(memory_format=torch.contiguous_format)
        with stage("communication"):
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        with stage("communication"):
            dist.all_reduce(grad)
        return grad


def sum_over_workers(local: Tensor) -> Tensor:
    """The sum of all workers' tensors of one shape, differentiable, the same on each."""
    if world_size() == 1:
        return local
    total: Tensor = _Sum.apply(local)  # type: ignore[no-untyped-call]
    return total


def max_over_workers(local: Tensor) -> Tensor:
    """The largest of all workers' numbers, element by element, without gradient."""
    highest = local.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        with stage("communication"):
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return highest


def any_worker(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Which of the flags one worker or more has set, the same on all. All must call it."""
    if world_size() == 1:
        return list(flags)
    return [bool(flag) for flag in max_over_workers(torch.tensor(list(map(int, flags)), device=device))]


def require_equal_rows(count: int, device: torch.device) -> None:
    """Refuses a batch of which workers hold unequal shares, on all of them together.

    Raises:
        GareError: with the smallest and the largest share.
    """
    if world_size() == 1:
        return
    extremes = torch.tensor([count, -count], device=device)
    with stage("communication"):
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    most, least = int(extremes[0]), -int(extremes[1])
    if most != least:
        raise GareError(
            f"workers hold from {least} to {most} pairs of one batch",
            where="training step",
            accepted="the same number on each worker: a train.batch_size that the workers divide",
        )


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
