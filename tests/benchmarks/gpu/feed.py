"""Transfer of loaded batches to the device: cost for the copying thread and for the training thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from gare.config import AugmentConfig, Config
from gare.train.input.feed import Feed, Finish, Tensors
from gare.train.input.inputs import FrameInput
from gare.train.input.loader import Arrays
from gare.train.input.plan import PlannedBatch
from tests.benchmarks.gpu.bench import Bench, Row, say

#: Number of first batches that are not counted: they load kernels and allocate memory.
LEFT_OUT = 3


def measure(bench: Bench) -> Row:
    """Measures ms per clip of both threads and of the device, for squares and for whole frames."""
    clips, frames, side = (4, 2, 16) if bench.tiny else (128, 12, 224)
    step_s = 0.01 if bench.tiny else 0.3
    found: Row = {"clips": clips, "frames": frames, "image_px": side, "ms_per_clip": {}}
    squares, whole = [(side, side)], [(side, side * 4 // 3), (side, side * 16 // 9), (side * 16 // 9, side)]
    for name, sizes, augment in (
        ("plain", squares, AugmentConfig()),
        ("augmented", squares, bench.config.augment),
        ("whole frames of one size, augmented", whole[:1], bench.config.augment),
        ("whole frames of three sizes, augmented", whole, bench.config.augment),
    ):
        crop = "center" if sizes is squares else "none"
        extract = bench.config.extract.model_copy(
            update={"crop": crop, "image_size": side, "num_frames": frames}
        )
        config = bench.config.model_copy(update={"extract": extract, "augment": augment})
        chunk = random_chunk(np.random.default_rng(bench.seed), clips, frames, sizes, whole=crop == "none")
        finish = finish_of(config)
        found["ms_per_clip"][name] = ms_of_a_clip(bench.device, chunk, finish, step_s)
        parts = ", ".join(f"{part} {ms:.4f}" for part, ms in found["ms_per_clip"][name].items())
        say(f"  {name:<40} ms a clip: {parts}")
    return found


def random_chunk(
    rng: np.random.Generator, clips: int, frames: int, sizes: Sequence[tuple[int, int]], *, whole: bool
) -> Arrays:
    """Draws a batch as a loader returns it, with clips that take these sizes in turn."""
    chunk: Arrays = {
        "frame_mask": np.ones((clips, frames), np.bool_),
        "token_ids": rng.integers(0, 49408, (clips, 32)).astype(np.int32),
        "token_mask": np.ones((clips, 32), np.bool_),
        "video_ids": np.arange(clips),
        "seconds": np.zeros((1, 3)),
    }
    if not whole:
        ((height, width),) = sizes
        return chunk | {"frames": rng.integers(0, 256, (clips, frames, height, width, 3), dtype=np.uint8)}
    of_clips = np.array([sizes[clip % len(sizes)] for clip in range(clips)], np.int32)
    num = int(of_clips.astype(np.int64).prod(axis=1).sum()) * frames * 3
    return chunk | {"pixels": rng.integers(0, 256, num, dtype=np.uint8), "sizes": of_clips}


def finish_of(config: Config) -> Finish:
    """Returns the function that does on the device what training does there, also on a CPU."""
    source = FrameInput(config, "")

    def finish(place: int, tensors: Tensors) -> Tensors:
        num = len(tensors["frame_mask"])
        planned = PlannedBatch("train", 0, np.arange(num) + place * num, np.zeros(num, np.int64))
        return source.augment_clips(planned, tensors)

    return finish


def ms_of_a_clip(
    device: torch.device, chunk: Arrays, finish: Finish, step_s: float, batches: int = 10
) -> dict[str, float]:
    """Returns medians over a number of batches, all of which are the same chunk.

    Args:
        device: destination; on a GPU the feed has its own thread and stream, on a CPU its own thread.
        chunk: a whole batch, as a loader returns it.
        finish: function for the work on the device.
        step_s: seconds of a step, during which the next batch is transferred.
        batches: number of batches.
    """
    size = len(chunk["frame_mask"])
    parts: dict[str, list[float]] = {"step_thread": [], "copying_thread": []}
    if device.type == "cuda":
        parts["device"] = []

    def chunks() -> Iterator[Arrays]:
        for _ in range(batches):
            yield chunk

    with Feed(chunks(), [size] * batches, device, finish=finish, ahead=True) as feed:
        for number in range(batches):
            time.sleep(step_s)
            started = time.perf_counter()
            arrived = next(feed)
            taken = time.perf_counter() - started
            if number < LEFT_OUT:
                continue
            parts["step_thread"].append(taken)
            parts["copying_thread"].append(arrived.seconds["transfer"] + arrived.seconds["finish"])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                before, _, after = arrived.copied
                parts["device"].append(before.elapsed_time(after) / 1e3)
    return {name: 1e3 * statistics.median(values) / size for name, values in parts.items()}
