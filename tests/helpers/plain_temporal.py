"""The temporal transformer in a few lines of plain PyTorch.

F frames, D embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gare.model.encoders.temporal import TemporalTransformer


def plain_temporal(temporal: TemporalTransformer, frames_FD: Tensor, mask_F: Tensor) -> Tensor:
    """Computes CLIP4Clip's: positions, pre-norm attention and MLP blocks, and the input added at the end.

    Args:
        temporal: module with the weights.
        frames_FD: frame positions of one clip.
        mask_F: bool; a position without a frame gets no attention, but has an output like any other.
    """
    x = frames_FD + temporal.positions.weight[: len(frames_FD)]
    for layer in temporal.blocks.layers:
        normed = functional.layer_norm(
            x, x.shape[1:], layer.layer_norm1.weight, layer.layer_norm1.bias, 1e-12
        )
        attention = layer.self_attn
        query, key, value = (
            part(normed).unflatten(1, (temporal.heads, -1)).transpose(0, 1)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        logits = query @ key.transpose(1, 2) / query.shape[2] ** 0.5 - 1e6 * (~mask_F)
        x = x + attention.out_proj((logits.softmax(dim=-1) @ value).transpose(0, 1).flatten(1))
        normed = functional.layer_norm(
            x, x.shape[1:], layer.layer_norm2.weight, layer.layer_norm2.bias, 1e-12
        )
        inner = layer.mlp.fc1(normed)
        x = x + layer.mlp.fc2(inner * torch.sigmoid(1.702 * inner))
    return frames_FD + x
