"""Transfer of a batch of frames to the device, as uint8 and as float32."""

from __future__ import annotations

import torch

from gare.data.images import normalise
from tests.benchmarks.gpu.bench import Bench, Row, say, seconds_of

#: Number of clips normalised on the host, to time one.
ON_HOST = 16


def measure(bench: Bench) -> Row:
    """Measures ms per clip of each way."""
    clips, frames, side = (4, 2, 16) if bench.tiny else (128, 12, 224)
    held = torch.randint(0, 256, (clips, frames, side, side, 3), dtype=torch.uint8)
    pinned = held.pin_memory() if bench.is_gpu else held
    floats = torch.randn(clips, frames, 3, side, side)
    on_device = held.to(bench.device)
    few = held[:ON_HOST]
    calls = {
        "uint8_copy": (clips, lambda: pinned.to(bench.device, non_blocking=True, copy=True)),
        "uint8_copy_and_normalise": (
            clips,
            lambda: normalise(pinned.to(bench.device, non_blocking=True, copy=True)),
        ),
        "normalise_on_device": (clips, lambda: normalise(on_device)),
        "float32_copy": (clips, lambda: floats.to(bench.device, copy=True)),
        "normalise_on_host": (len(few), lambda: normalise(few)),
    }
    ms = {}
    for name, (count, call) in calls.items():
        ms[name] = seconds_of(bench, call, most=20).seconds * 1e3 / count
    say(f"  {clips} clips of {frames} frames of {side} px, ms a clip; uint8 from pinned memory:")
    for name, value in ms.items():
        say(f"    {name:<26} {value:.4f}")
    return {
        "clips": clips,
        "frames": frames,
        "image_px": side,
        "is_pinned": bench.is_gpu,
        "ms_per_clip": ms,
        "bytes_per_clip": {"uint8": held[0].nbytes, "float32": floats[0].nbytes},
    }
