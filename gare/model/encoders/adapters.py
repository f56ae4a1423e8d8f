"""Linear adapters behind the towers, one for captions and one for frames.

D embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearAdapter(nn.Module):
    """Linear adapter x + A·x, without bias, so that padding stays zero; A starts at zero, the identity.

    Weight decay of A pulls towards the towers' own output and not towards zero.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width))

    def forward(self, features: Tensor) -> Tensor:
        """Features (…, D) → (…, D)."""
        return features + nn.functional.linear(features, self.weight)


class Adapters(nn.Module):
    """The adapters of captions and of frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.text = LinearAdapter(width)
        self.video = LinearAdapter(width)
