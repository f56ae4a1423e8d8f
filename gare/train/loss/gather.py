"""Gathering of rows from all workers, with the true gradient.

R workers, each with its own block of b rows of a global batch of N; every worker gets all blocks in the order
of the ranks. Blocks may differ in size: a batch is the same for any number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gare.errors import GareError
from gare.train.stages import stage


def world_size() -> int:
    """Returns the number of workers that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns this worker's rank; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


@dataclass(frozen=True)
class Rows:
    """The workers' rows of a global batch: one block each, in the order of the ranks.

    Attributes:
        counts: rows of each worker, not necessarily equal.
    """

    counts: tuple[int, ...]

    @property
    def own(self) -> slice:
        """Rows of this worker."""
        first = sum(self.counts[: rank()])
        return slice(first, first + self.counts[rank()])

    @property
    def most(self) -> int:
        """Rows of the largest block."""
        return max(self.counts)


def exchange_row_counts(count: int, device: torch.device) -> Rows:
    """Gathers how many rows of a batch each worker holds; this one holds ``count``. All workers must call it.

    Raises:
        GareError: if any worker holds no row; raised on all workers.
    """
    if world_size() == 1:
        rows = Rows((count,))
    else:
        counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
        counts[rank()] = count
        with stage("communication"):
            dist.all_reduce(counts)
        rows = Rows(tuple(counts.tolist()))
    if not min(rows.counts):
        raise GareError(
            f"{world_size()} workers hold {', '.join(map(str, rows.counts))} pairs of one batch",
            where="training step",
            accepted="one pair or more on each worker: a larger train.batch_size, or fewer workers",
        )
    return rows


class PendingGather:
    """An all-gather in progress: it overlaps the work between its start and ``wait``, forward and backward.

    In the backward, the gradient is sent when the backward of ``wait`` runs, and is needed when that of the
    start runs. PyTorch runs the backward in reverse order of the forward, so the work in between overlaps
    here, too.

    PyTorch's own differentiable all_gather gives gloo the incoming gradient in its memory layout, and a
    non-contiguous one comes back silently permuted (2.13). Here both directions are contiguous.

    Args:
        local: this worker's rows.
        rows: of all workers.
    """

    def __init__(self, local: Tensor, rows: Rows) -> None:
        self.rows = rows
        self.local = local
        self._is_alone = world_size() == 1
        self._work: dist.Work | None = None
        self._grad: Tensor | None = None
        if not self._is_alone:
            self._token: Tensor = _StartGather.apply(local.contiguous(), self)  # type: ignore[no-untyped-call]

    def wait(self) -> Tensor:
        """Waits for and returns all workers' rows; to be called once."""
        local = self.local
        del self.local
        if self._is_alone:
            return local
        # The token's graph refers to this object: keeping it here would make a cycle that holds the step's
        # features.
        token = self._token
        del self._token
        gathered: Tensor = _WaitForGather.apply(token, self)  # type: ignore[no-untyped-call]
        return gathered

    def send(self, local: Tensor) -> None:
        """Starts to gather."""
        missing = self.rows.most - len(local)
        if missing:  # collectives need equal blocks
            local = torch.cat([local, local.new_zeros(missing, *local.shape[1:])])
        self._sent = local  # kept until it has been sent
        self._blocks = [torch.empty_like(local) for _ in self.rows.counts]
        self._work = dist.all_gather(self._blocks, local, async_op=True)

    def receive(self) -> Tensor:
        """Waits for the rows."""
        self._finish()
        blocks = [block[:count] for block, count in zip(self._blocks, self.rows.counts, strict=True)]
        del self._sent, self._blocks
        return torch.cat(blocks)

    def send_back(self, grad: Tensor) -> None:
        """Starts to sum all workers' gradients of all rows."""
        # A copy: the incoming gradient may have other consumers, and the all-reduce works in place.
        self._grad = grad.clone(memory_format=torch.contiguous_format)
        # gloo has no reduce-scatter; an all-reduce and a slice give the same sum.
        self._work = dist.all_reduce(self._grad, async_op=True)

    def receive_back(self) -> Tensor:
        """Waits for the sum and returns this worker's rows of it."""
        self._finish()
        assert self._grad is not None
        grad, self._grad = self._grad[self.rows.own].contiguous(), None
        return grad

    def _finish(self) -> None:
        assert self._work is not None
        with stage("communication"):
            self._work.wait()
        self._work = None


class _StartGather(torch.autograd.Function):
    """Starts a gathering; its result only links the end to the start, and has no value."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, gathering: PendingGather) -> Tensor:
        ctx.gathering = gathering
        gathering.send(local)
        return local.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.gathering.receive_back(), None


class _WaitForGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, gathering: PendingGather) -> Tensor:
        ctx.gathering = gathering
        return gathering.receive()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.gathering.send_back(grads[0])
        return grads[0].new_zeros(()), None


def start_gather(local: Tensor, rows: Rows) -> PendingGather:
    """Starts to gather all workers' rows, (b, …) on each worker → (N, …) by ``wait``, differentiable.

    The gradient of the local rows is the sum over the workers of their gradients. With every worker
    computing the whole batch's loss, DDP's mean over workers then gives the gradient of one worker that
    holds the whole batch.

    Args:
        local: this worker's rows, as many as ``rows`` says.
        rows: from ``exchange_row_counts``, the same on all workers.
    """
    return PendingGather(local, rows)


def gather(local: Tensor, rows: Rows) -> Tensor:
    """Gathers all workers' rows like ``start_gather``, and waits for them at once."""
    return start_gather(local, rows).wait()


class _Sum(torch.autograd.Function):
    """All-reduce by sum; its backward sums the gradients likewise."""

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
    """Sums all workers' tensors of one shape, differentiable; the result is the same on each."""
    if world_size() == 1:
        return local
    total: Tensor = _Sum.apply(local)  # type: ignore[no-untyped-call]
    return total


def max_over_workers(local: Tensor) -> Tensor:
    """Returns the largest of all workers' numbers, element by element, without gradient."""
    highest = local.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        with stage("communication"):
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return highest


def any_worker(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Joins flags by "or" over the workers, the same on all. All workers must call it."""
    if world_size() == 1:
        return list(flags)
    return [bool(flag) for flag in max_over_workers(torch.tensor(list(map(int, flags)), device=device))]


def gather_names(local: Sequence[str]) -> list[str]:
    """Gathers all workers' strings, rank by rank. All workers must call it."""
    if world_size() == 1:
        return list(local)
    parts: list[list[str]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, list(local))
    return [name for part in parts for name in part]


def gather_unequal(local: Tensor) -> Tensor:
    """Gathers all workers' rows, of any number each, rank by rank, without gradient."""
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
