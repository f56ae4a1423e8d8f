"""Generator of the inputs and weights of tests/golden, by the rule in its README."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "golden"


def draw(name: str, shape: tuple[int, ...], seed: int, scale: float) -> np.ndarray:
    generator = np.random.default_rng([zlib.crc32(name.encode()), seed])
    return (scale * generator.standard_normal(shape)).astype(np.float32)


def draw_weight(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Draws a weight of the released state dict, by its name."""
    if not shape:
        return torch.tensor(math.log(1 / 0.07))
    noise = np.random.default_rng([zlib.crc32(name.encode()), seed]).standard_normal(shape)
    if name.endswith("weight") and len(shape) == 1:
        value = 1 + 0.1 * noise
    elif name.endswith("bias") or len(shape) == 1 or "embedding" in name:
        value = 0.1 * noise
    elif name.endswith(("text_projection", ".proj")) or name == "proj":
        value = noise / math.sqrt(shape[0])
    else:
        value = noise / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(value.astype(np.float32))


def head_inputs(
    num_texts: int, num_videos: int, num_frames: int, width: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws text (N, D) and frame features (M, F, D) of head_*.npz."""
    text = draw("text", (num_texts, width), seed, 0.4) + draw("gap_t", (width,), seed, 0.3)
    video = draw("video", (num_videos, num_frames, width), seed, 0.4) + draw("gap_v", (width,), seed, 0.3)
    return torch.from_numpy(text), torch.from_numpy(video)
