"""Random changes of training clips, the same for all frames of a clip.

M clips, F frames, H×W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gare.config import AugmentConfig

#: kornia's magnitudes run to 30 where timm's run to 10.
KORNIA_SCALE = 3.0


def augment(frames: Tensor, config: AugmentConfig, seeds: Sequence[int]) -> Tensor:
    """Changes each clip by its own seed: random crop, mirror, then RandAugment.

    RandAugment draws N operations with replacement, each with magnitude N(m, noise²) on timm's scale; the
    operations and their ranges are kornia's. All that are drawn are carried out, as in its paper, unless
    ``probability`` says otherwise.

    Args:
        frames: (M, F, H, W, 3) uint8.
        config: what to do; the default does nothing.
        seeds: of the M clips; the random state of the caller is left as it is.

    Returns:
        (M, F, H, W, 3) uint8.

    Source: RandAugment, arXiv 1909.13719.
    """
    steps = _steps(config, frames.shape[2:4])
    if not steps:
        return frames
    clips = []
    with torch.random.fork_rng(devices=[]):
        for clip, seed in zip(frames, seeds, strict=True):
            torch.manual_seed(seed)
            values = clip.movedim(-1, -3).float() / 255
            for step in steps:
                values = step(values)
            clips.append((values.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1))
    return torch.stack(clips)


def _steps(config: AugmentConfig, size: torch.Size) -> list[Any]:
    if not (config.operations or config.flip or config.crop_scale < 1):
        return []
    from kornia.augmentation import RandomHorizontalFlip, RandomResizedCrop
    from kornia.augmentation.auto import RandAugment

    steps: list[Any] = []
    if config.crop_scale < 1:
        scale = (config.crop_scale, 1.0)
        steps.append(
            RandomResizedCrop(
                tuple(size), scale=scale, ratio=(1.0, 1.0), same_on_batch=True, resample="bicubic"
            )
        )
    if config.flip:
        steps.append(RandomHorizontalFlip(p=config.flip, same_on_batch=True))
    policy = RandAugment(n=1, m=1)

    def operation(clip: Tensor) -> Tensor:
        if config.probability < 1 and float(torch.rand(())) >= config.probability:
            return clip
        drawn = (config.magnitude + config.noise * float(torch.randn(()))) * KORNIA_SCALE
        policy.m = min(max(drawn, 1e-3), 30 - 1e-3)
        parameters = policy.forward_parameters(torch.Size((1, *clip.shape[1:])))
        changed: Tensor = policy(clip, params=_for_all_frames(parameters, len(clip)))
        return changed

    return steps + [operation] * config.operations


def _for_all_frames(parameters: Any, num_frames: int) -> Any:
    """Parameters that were drawn for one picture, repeated for each frame of a clip."""
    if isinstance(parameters, Tensor):
        return parameters.repeat_interleave(num_frames, dim=0) if parameters.shape[:1] == (1,) else parameters
    if isinstance(parameters, dict):
        return {
            # The shape that the draw was for, not a draw.
            name: torch.tensor([num_frames, *value[1:]])
            if name == "forward_input_shape"
            else _for_all_frames(value, num_frames)
            for name, value in parameters.items()
        }
    if isinstance(parameters, list):
        return [item._replace(data=_for_all_frames(item.data, num_frames)) for item in parameters]
    return parameters
