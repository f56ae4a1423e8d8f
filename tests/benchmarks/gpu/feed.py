"""Loaded batches on their way to the device: what they cost the thread that copies and the one that steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch

from gare.config import AugmentConfig
from gare.train.input.augment_batch import augment_batch
from gare.train.input.feed import Feed, Tensors
from gare.train.input.loader import Arrays
from tests.benchmarks.gpu.bench import Bench, Row, say

#: Batches that load kernels and take memory.
LEFT_OUT = 3


def measure(bench: Bench) -> Row:
    """Milliseconds a clip of both threads, and of the device, with augmentation and without."""
    clips, frames, side = (4, 2, 16) if bench.tiny else (128, 12, 224)
    rng = np.random.default_rng(bench.seed)
    chunk: Arrays = {
        "frames": rng.integers(0, 256, (clips, frames, side, side, 3), dtype=np.uint8),
        "frame_mask": np.ones((clips, frames), np.bool_),
        "token_ids": rng.integers(0, 49408, (clips, 32)).astype(np.int32),
        "token_mask": np.ones((clips, 32), np.bool_),
        "seconds": np.zeros((1, 3)),
    }
    kinds = {"plain": AugmentConfig(), "augmented": bench.config.augment}
    step_s = 0.01 if bench.tiny else 0.3
    found: Row = {"clips": clips, "frames": frames, "image_px": side, "ms_per_clip": {}}
    for name, augment in kinds.items():
        found["ms_per_clip"][name] = ms_of_a_clip(bench.device, chunk, augment, step_s)
        parts = ", ".join(f"{part} {ms:.4f}" for part, ms in found["ms_per_clip"][name].items())
        say(f"  {name:<10} ms a clip: {parts}")
    return found


def ms_of_a_clip(
    device: torch.device, chunk: Arrays, augment: AugmentConfig, step_s: float, batches: int = 10
) -> dict[str, float]:
    """Medians over batches that are all the same chunk.

    Args:
        device: where to; on a GPU the feed has a thread and a stream of its own, and here on a CPU a thread.
        chunk: a whole batch, as a loader hands it over.
        augment: what is done on the device.
        step_s: that a step takes, in which the next batch is brought.
        batches: that are brought.
    """
    size = len(chunk["frame_mask"])
    parts: dict[str, list[float]] = {"step_thread": [], "copying_thread": []}
    if device.type == "cuda":
        parts["device"] = []

    def chunks() -> Iterator[Arrays]:
        for _ in range(batches):
            yield chunk

    def finish(place: int, tensors: Tensors) -> Tensors:
        seeds = range(place * size, (place + 1) * size)
        return tensors | {"frames": augment_batch(tensors["frames"], augment, seeds)}

    with Feed(chunks(), [size] * batches, device, finish=finish, ahead=True) as feed:
        for number in range(batches):
            time.sleep(step_s)
            started = time.perf_counter()
            arrived = next(feed)
            taken = time.perf_counter() - started
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            on_host, seconds = arrived.seconds["transfer"], feed.seconds(arrived)
            if number >= LEFT_OUT:
                parts["step_thread"].append(taken)
                parts["copying_thread"].append(on_host)
                if device.type == "cuda":
                    parts["device"].append(seconds["transfer"] - on_host + seconds["augment"])
    return {name: 1e3 * statistics.median(values) / size for name, values in parts.items()}
