"""``make bench-loader``: what loading a batch of training costs, in the loaders and in the training process.

Clips of 12 frames as JPEG, extracted from generated videos of 320 × 240 pixels: squares of 224 pixels, which
the bars are for, and whole frames of 298 × 224, as conf/msrvtt.yaml keeps them; with its augmentation. One
process and one thread, medians of rounds; no Ray. Prints a table on stderr and one JSON line on stdout. With
a GPU it also prints what batches cost the thread that copies and the one that steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

from gare.config import Config, load_config, parse_config
from gare.data.images import normalise
from gare.data.store.contents import IDENTITY
from gare.train.input.feed import Feed
from gare.train.input.loader import Arrays, FrameLoader, WorkerBatches
from gare.train.input.tokens import CaptionTokens
from tests.benchmarks.gpu.feed import finish_of, ms_of_a_clip
from tests.benchmarks.reads import frame_store, generate, say
from tests.helpers.plans import listed

#: Limits of the issue: minimum clips per second of one core, maximum milliseconds per clip.
BARS = {
    "squares, with augmentation, clips/s": 40,
    "squares, without, clips/s": 200,
    "training process without GPU, ms a clip": 6.0,
    "step's thread with GPU, ms a clip": 0.05,
    "copying thread with GPU, ms a clip": 0.3,
}
BATCH, ROUNDS = 32, 5
CONF = Path(__file__).resolve().parents[2] / "conf" / "msrvtt.yaml"


def median_s(work: Callable[[], object]) -> float:
    """Returns the median seconds of a few rounds, after a warm-up."""
    work()
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def loaders(
    config: Config, kind: str, store: str, plan: WorkerBatches, tokens: dict[str, CaptionTokens]
) -> dict[str, float]:
    """Measures clips/s of one loader, with and without augmentation, and its seconds by part."""
    numbers = range(len(plan.plan.batches))
    count = sum(len(batch.videos) for batch in plan.plan.batches)
    found = {}
    for name, augment in (("with augmentation", config.augment), ("without", None)):
        load = FrameLoader(store, plan, tokens, augment=augment)
        seconds: list[np.ndarray] = []

        def one_pass(load: FrameLoader = load, seconds: list[np.ndarray] = seconds) -> None:
            for number in numbers:
                size = len(plan.plan.batches[number].videos)
                seconds.append(load(number, 0, size)["seconds"][0])

        rate = found[f"{kind}, {name}, clips/s"] = count / median_s(one_pass)
        timed = seconds[len(numbers) :]  # without the pass that opened the files
        fetch, jpeg, augmented = 1000 * np.sum(timed, axis=0) / count / ROUNDS
        say(
            f"  {kind}, {name:<18} {rate:>8.1f} clips/s a core: fetch {fetch:.2f}, "
            f"JPEG {jpeg:.2f}, augmentation {augmented:.2f} ms a clip"
        )
    return found


def process_without_gpu(chunk: Arrays) -> float:
    """Measures ms per clip that the training process spends on a loaded batch."""
    size = len(chunk["frame_mask"])
    feed = Feed(itertools.repeat(chunk), [size] * (ROUNDS + 1), torch.device("cpu"))

    def one_batch() -> None:
        normalise(next(feed).tensors["frames"])

    return 1000 * median_s(one_batch) / size


def main() -> None:
    """Runs all benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=64, help="clips to generate")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    config = load_config(CONF)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "videos").mkdir()
        rows: list[dict[str, object]] = [
            {"video_id": path.name, "uri": str(path), **dict.fromkeys(IDENTITY), "attempts": 0}
            for path in generate(folder / "videos", options.clips)
        ]
        store, whole = str(folder / "squares"), str(folder / "whole")
        squares = parse_config(config.model_dump(mode="json"), ["extract.crop=center"])
        ids = sorted(frame_store(Path(store), squares, rows))
        frame_store(Path(whole), config, rows)
        plan = listed([ids[first : first + BATCH] for first in range(0, len(ids), BATCH)])
        tokens = {"train": CaptionTokens.of([["a man plays the guitar on a stage"]] * len(ids), 32)}
        say(f"{len(ids)} clips of {config.extract.num_frames} × {config.extract.image_size}² px, one core")
        found = loaders(config, "squares", store, plan, tokens) | loaders(
            config, "whole", whole, plan, tokens
        )
        chunk = FrameLoader(store, plan, tokens)(0, 0, min(BATCH, len(ids)))
        found["training process without GPU, ms a clip"] = process_without_gpu(chunk)
        if torch.cuda.is_available():
            load = FrameLoader(whole, plan, tokens, whole=True)
            chunk = load(0, 0, min(BATCH, len(ids)))
            ms = ms_of_a_clip(torch.device("cuda"), chunk, finish_of(config), step_s=0.2)
            found["step's thread with GPU, ms a clip"] = ms["step_thread"]
            found["copying thread with GPU, ms a clip"] = ms["copying_thread"]
    texts = [[f"a man plays the guitar on stage {number}"] for number in range(5000)]
    started = time.perf_counter()
    CaptionTokens.of(texts, 32)
    found["captions tokenised, 1/s"] = len(texts) / (time.perf_counter() - started)
    for key, value in found.items():
        bar = f"   bar {BARS[key]:g}" if key in BARS else ""
        say(f"  {key:<42} {value:>10,.3f}{bar}")
    missing = [key for key in BARS if key not in found]
    if missing:
        say(f"  not measured, for want of a GPU: {'; '.join(missing)}")
    sys.stdout.write(json.dumps({"measured": found, "bars": BARS, "cores": 1}) + "\n")


if __name__ == "__main__":
    main()
