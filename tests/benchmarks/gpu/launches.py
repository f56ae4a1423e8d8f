"""Launches in the head of a step: the number of operations, and the same as one CUDA graph.

b pairs, F frames, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gare.config import LossConfig
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.train.loss.objective import StepRandomness, sharded_terms

#: Operations that launch nothing on a device.
FREE = ("empty", "empty_like", "new_empty", "detach", "set_", "alias", "_unsafe_view", "lift_fresh")


class _Count(TorchDispatchMode):
    """Counts operations that compute something, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        self.operations += not func.is_view and name not in FREE
        return func(*args, **(kwargs or {}))


def operations_of(call: Callable[[], object]) -> int:
    """Counts PyTorch's operations in a call; launches of Triton's kernels are not among them."""
    with _Count() as count:
        call()
    return count.operations


class _Head(nn.Module):
    """The factorised head as a module on tensors, as CUDA graphs require."""

    def __init__(self, model: GARE, loss: LossConfig, draws: StepRandomness) -> None:
        super().__init__()
        self.model, self.loss, self.draws = model, loss, draws

    def forward(self, embedding: Tensor, text_mask: Tensor, frames: Tensor, frame_mask: Tensor) -> Tensor:
        text, video = TextFeatures(embedding, None, text_mask), VideoFeatures(frames, frame_mask)
        return sharded_terms(self.model, text, video, self.loss, self.draws).objective


def graphed_step(
    model: GARE, text: TextFeatures, video: VideoFeatures, loss: LossConfig, draws: StepRandomness
) -> Callable[[], object]:
    """Builds a training step of the head as two CUDA graphs, forward and backward.

    Args:
        model: model in training mode, without towers, on a GPU.
        text: features whose embedding takes gradients.
        video: features whose frames take gradients.
        loss: configuration of the loss.
        draws: random draws, the same in every step, which does not change its cost.

    Raises:
        RuntimeError: if the head cannot be captured, or the graph gives another loss or gradient.
    """
    arguments = (text.embedding, text.mask, video.frames, video.mask)
    head = _Head(model, loss, draws)
    expected = _gradients(head(*arguments), video.frames, model)
    sample = tuple(one.detach().clone().requires_grad_(one.requires_grad) for one in arguments)
    graphed = torch.cuda.make_graphed_callables(head, sample, allow_unused_input=True)
    found = _gradients(graphed(*arguments), video.frames, model)
    for one, other in zip(found, expected, strict=True):
        if not torch.allclose(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max())):
            raise RuntimeError("the graph of the head computes something else than the head")
    return lambda: graphed(*arguments).backward()


def _gradients(objective: Tensor, frames: Tensor, model: GARE) -> list[Tensor]:
    """Returns the objective, and its gradients for the frames and for ψ's output."""
    learning = [frames] if model.increment is None else [frames, model.increment.mean.weight]
    return [objective.detach().clone(), *(one.clone() for one in torch.autograd.grad(objective, learning))]
