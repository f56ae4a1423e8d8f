"""RandAugment of a batch's clips with torch: made for a GPU, where clips share the passes of one kind.

M clips, F frames, H×W pixels; n of the M clips in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample

from gare.config import AugmentConfig
from gare.train.input.randaugment import FILL, SLACK, Step, StepKind, draw_operations, steps_of

#: Values that one pass works on: 16 clips of 12 frames of 224² pixels. A pass holds up to five times
#: their size as float32, 0.6 GB.
MAX_VALUES = 16 * 12 * 224 * 224 * 3


def augment_batch(frames: Tensor, config: AugmentConfig, seeds: Sequence[int]) -> Tensor:
    """Changes each clip by its own seed: random crop, mirror, then RandAugment, all frames of a clip alike.

    Tone is exactly Pillow's. Warps interpolate with Pillow's cubic kernel, except for a small term, see
    ``_sample``. A clip's result does not depend on the others in the batch. The host never waits for the
    device.

    Args:
        frames: (M, F, H, W, 3) uint8, on any device; left as they are.
        config: which changes to make; the default makes none.
        seeds: of the M clips.

    Returns:
        (M, F, H, W, 3) uint8 on the same device; ``frames`` itself if no seed draws a change.

    Raises:
        ValueError: if there are not as many seeds as clips.
    """
    if len(seeds) != len(frames):
        raise ValueError(f"{len(seeds)} seeds for {len(frames)} clips")
    clips = [steps_of(draw_operations(config, seed), *frames.shape[2:4]) for seed in seeds]
    passes = list(_shared_passes(clips, max(1, MAX_VALUES // max(1, frames[:1].numel()))))
    if not passes:
        return frames
    positions = _copied([one.clips for one in passes], frames.device)
    arguments = _copied([one.argument for one in passes], frames.device)
    out = frames.clone()
    for one, position_n, argument in zip(passes, positions, arguments, strict=True):
        changed = _PASSES[one.kind](out.index_select(0, position_n), argument)
        out.index_copy_(0, position_n, changed)
    return out


@dataclass(frozen=True)
class _Pass:
    """A step that several clips take at once.

    Attributes:
        kind: of the step.
        clips: (n,) int64 positions.
        argument: (n, …) float32, arguments of the clips' steps.
    """

    kind: StepKind
    clips: NDArray[np.int64]
    argument: NDArray[np.float32]


def _shared_passes(clips: Sequence[Sequence[Step]], max_clips: int) -> Iterator[_Pass]:
    """Groups the clips' first steps by their kind, then the second ones, and so on."""
    for steps in zip_longest(*clips):
        for kind in get_args(StepKind):
            same = [idx for idx, step in enumerate(steps) if step is not None and step.kind == kind]
            for start in range(0, len(same), max_clips):
                chosen = same[start : start + max_clips]
                argument = _stacked([steps[idx].argument for idx in chosen], padded=kind == "warp")
                yield _Pass(kind, np.array(chosen, dtype=np.int64), argument)


def _stacked(arguments: Sequence[NDArray[np.generic]], *, padded: bool) -> NDArray[np.float32]:
    if padded:
        # Under the identity no pixel is outside the frame, so it changes nothing in a path.
        longest = max(len(path) for path in arguments)
        here = np.eye(3)[None, :2]
        arguments = [np.concatenate([here.repeat(longest - len(path), axis=0), path]) for path in arguments]
    return np.stack(arguments).astype(np.float32)


def _copied(arrays: Sequence[NDArray[np.generic]], device: torch.device) -> list[Tensor]:
    """Copies arrays of one dtype to a device in one transfer; the host does not wait for it."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        flat = flat.pin_memory()
    flat = flat.to(device, non_blocking=True)
    parts = torch.split(flat, [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def _mirror(clips: Tensor, _: Tensor) -> Tensor:
    return clips.flip(3)


# --- tone; tables are (n, F or 1, 3 or 1, 256) ---


def _table(clips: Tensor, table: Tensor) -> Tensor:
    return _apply_tables(clips, table[:, None, None])


def _apply_tables(clips: Tensor, tables: Tensor) -> Tensor:
    idx = clips.int() + _table_starts(tables.shape, clips.device)
    return tables.to(torch.uint8).reshape(-1).index_select(0, idx.view(-1)).view(clips.shape)


def _table_starts(shape: Sequence[int], device: torch.device) -> Tensor:
    """Returns where each pixel's table starts among all tables' values, (n, F or 1, 1, 1, 3 or 1) int32."""
    num, frames, channels, size = shape
    starts = torch.arange(0, num * frames * channels * size, size, dtype=torch.int32, device=device)
    return starts.view(num, frames, 1, 1, channels)


def _all_values(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(256, dtype=dtype, device=device)


def _autocontrast(clips: Tensor, _: Tensor) -> Tensor:
    low, high = clips.amin(dim=(2, 3))[..., None].double(), clips.amax(dim=(2, 3))[..., None].double()
    span = (high - low).clamp(min=1)
    # torch divides a number by a tensor as a product with the reciprocal, which rounds twice.
    scale = torch.full_like(span, 255) / span
    values = _all_values(torch.float64, clips.device)
    stretched = (values * scale - low * scale).clamp(0, 255)
    return _apply_tables(clips, torch.where(high > low, stretched, values))


def _equalize(clips: Tensor, _: Tensor) -> Tensor:
    shape = (*clips.shape[:2], 3, 256)
    bins = (clips.int() + _table_starts(shape, clips.device)).view(-1).long()
    counts = torch.zeros(shape, dtype=torch.int32, device=clips.device)
    one = torch.ones((), dtype=torch.int32, device=clips.device)
    counts.view(-1).scatter_add_(0, bins, one.expand(bins.shape))
    values = _all_values(torch.int64, clips.device)
    last = torch.where(counts > 0, values, 0).amax(dim=-1, keepdim=True)
    step = (counts.sum(dim=-1, keepdim=True) - counts.gather(-1, last)) // 255
    below = counts.cumsum(dim=-1) - counts
    spread = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return _apply_tables(clips, torch.where(step > 0, spread, values))


def _contrast(clips: Tensor, factor_n: Tensor) -> Tensor:
    num = clips.shape[2] * clips.shape[3]
    totals = _grey(clips).sum(dim=(2, 3))
    means = ((2 * totals + num) // (2 * num)).float()[..., None, None]
    values = _all_values(torch.float32, clips.device)
    blended = means + factor_n.view(-1, 1, 1, 1) * (values - means)
    return _apply_tables(clips, blended.clamp(0, 255))


def _grey(clips: Tensor) -> Tensor:
    """Computes Pillow's grey, (n, F, H, W) int32."""
    red, green, blue = clips.unbind(-1)
    return (red.int() * 19595 + green.int() * 38470 + blue.int() * 7471 + 32768) >> 16


def _colour(clips: Tensor, factor_n: Tensor) -> Tensor:
    return _blend(_grey(clips)[..., None].float(), clips, factor_n)


def _sharpness(clips: Tensor, factor_n: Tensor) -> Tensor:
    base = clips.short()
    rows = base[:, :, :-2] + base[:, :, 1:-1] + base[:, :, 2:]
    sums = rows[:, :, :, :-2] + rows[:, :, :, 1:-1] + rows[:, :, :, 2:] + 4 * base[:, :, 1:-1, 1:-1]
    # Pillow's SMOOTH, rounded; it copies the pixels at the border.
    base[:, :, 1:-1, 1:-1] = (2 * sums + 13) // 26
    return _blend(base.float(), clips, factor_n)


def _blend(base: Tensor, clips: Tensor, factor_n: Tensor) -> Tensor:
    """Does Pillow's Image.blend: base + factor · (clips − base), truncated."""
    # Not with add's alpha, which a device may compute with a single rounding.
    values = (clips.float() - base).mul_(factor_n.view(-1, 1, 1, 1, 1)).add_(base)
    return values.clamp_(0, 255).to(torch.uint8)


# --- geometry ---


def _warp(clips: Tensor, path_nK23: Tensor) -> Tensor:
    num, frames, height, width = clips.shape[:4]
    x = torch.arange(width, device=clips.device) + 0.5
    y = (torch.arange(height, device=clips.device) + 0.5)[:, None]
    inside = torch.ones((num, height, width), dtype=torch.bool, device=clips.device)
    for maps_n23 in path_nK23.unbind(1):
        xx, xy, x0, yx, yy, y0 = maps_n23.reshape(num, 6, 1, 1).unbind(1)
        source_x, source_y = xx * x + xy * y + x0, yx * x + yy * y + y0
        inside &= (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    # The frames of a clip share its coordinates, as if they were channels.
    planes = clips.permute(0, 1, 4, 2, 3).reshape(num, frames * 3, height, width).float()
    warped = _sample(planes, source_x, source_y).add_(SLACK).clamp_(0, 255)
    warped = torch.where(inside[:, None], warped, FILL).to(torch.uint8)
    return warped.view(num, frames, 3, height, width).permute(0, 1, 3, 4, 2)


def _sample(planes: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Interpolates with Pillow's cubic kernel, a = −1, at coordinates (n, H, W); the border is repeated.

    torch's cubic has a = −0.75, and the kernel is linear in a. With a = 0 it is linear interpolation whose
    fraction t is replaced by 3t² − 2t³; so k(−1) = 4/3·k(−0.75) − 1/3·k(0) along one axis. Along both, 4/9 of
    the product of the axes' differences k(−0.75) − k(0) is left out, weights of up to 0.005.
    """
    cubic = grid_sample(
        planes, _grid(planes, x, y), mode="bicubic", padding_mode="border", align_corners=False
    )
    smooth = grid_sample(
        planes,
        _grid(planes, _smoothed(x), _smoothed(y)),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return cubic.mul_(4 / 3).sub_(smooth.div_(3))


def _grid(planes: Tensor, x: Tensor, y: Tensor) -> Tensor:
    height, width = planes.shape[2:]
    return torch.stack((2 * x / width - 1, 2 * y / height - 1), dim=-1)


def _smoothed(coordinates: Tensor) -> Tensor:
    below = (coordinates - 0.5).floor()
    t = coordinates - 0.5 - below
    return below + 0.5 + t * t * (3 - 2 * t)


_PASSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mirror": _mirror,
    "warp": _warp,
    "table": _table,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "contrast": _contrast,
    "colour": _colour,
    "sharpness": _sharpness,
}
