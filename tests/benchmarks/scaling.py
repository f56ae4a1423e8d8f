"""Scaling: extraction and a training step on one and two workers, and a model of 8 to 512 GPUs.

``python -m tests.benchmarks.scaling`` prints what it measured and a table in Markdown. The machine should do
nothing else meanwhile: two workers on two cores have none to spare.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from gare.config import Config, parse_config
from gare.data.batch import Batch
from gare.model.gare import GARE
from gare.train.stages import start_recording, stop_recording, watch_gradients
from gare.train.step import build_learner, train_step
from tests.benchmarks.clips import write_clips
from tests.benchmarks.cost import ASSUMPTIONS, Parts, Shape, table
from tests.benchmarks.extraction import say, whole
from tests.benchmarks.tasks import step_call

Found = dict[str, Any]


def config_of(pairs: int, frames: int, image_size: int) -> Config:
    """Returns the configuration of ViT-B/32 and GARE's defaults, with these sizes."""
    return parse_config(
        {
            "extract": {"image_size": image_size, "num_frames": frames},
            "model": {"max_frames": frames, "clip": {"image_size": image_size}},
            "train": {"batch_size": pairs, "diagnostics_every": 0},
            "cluster": {"train_workers": 1},
        }
    )


def batch_of(config: Config, rows: slice) -> Batch:
    """Returns rows of a random global batch."""
    size, model = config.train.batch_size, config.model
    rng = np.random.default_rng(0)
    side = model.clip.image_size
    tokens = torch.from_numpy(rng.integers(1, 49000, (size, model.max_words)))
    frames = torch.from_numpy(rng.standard_normal((size, model.max_frames, 3, side, side), dtype=np.float32))
    frame_mask = torch.ones(size, model.max_frames, dtype=torch.bool)
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), frames, frame_mask, torch.arange(size))
    return batch[rows]


def worker(rank: int, world: int, folder: str, pairs: int, frames: int, image_size: int, steps: int) -> None:
    """Runs one of the workers, with one thread; rank 0 prints seconds per step, in total and by stage."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    config = config_of(pairs, frames, image_size)
    torch.manual_seed(0)
    learner = build_learner(GARE(config.model), config, 100, torch.device("cpu"))
    share = pairs // world
    batch = batch_of(config, slice(rank * share, (rank + 1) * share))
    recorder = start_recording(torch.device("cpu"))
    watch_gradients(learner.objective, recorder)
    train_step(learner, batch)  # warm-up: allocates memory
    recorder.take()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        train_step(learner, batch)
        seconds.append(time.perf_counter() - started)
    stages = {name: total / steps for name, total in recorder.take().items()}
    stop_recording()
    if rank == 0:
        sys.stdout.write(json.dumps({"step_s": statistics.median(seconds), "stages": stages}))
    if world > 1:
        dist.destroy_process_group()


def training(world: int, pairs: int, frames: int, image_size: int, steps: int) -> Found:
    """Measures a step of one global batch on a number of worker processes."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(world):
            arguments = (rank, world, folder, pairs, frames, image_size, steps)
            call = f"from tests.benchmarks.scaling import worker; worker{arguments!r}"
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", call], stdout=subprocess.PIPE, text=True, env=environment
                )
            )
        said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a worker failed")
    found: Found = json.loads(said[0])
    return found


def matmul_flops() -> float:
    """Measures the floating-point operations per second of one thread in a matrix product."""
    size = 1024
    left, right = torch.randn(size, size), torch.randn(size, size)
    torch.set_num_threads(1)
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def measured_parts(one: Found, pairs: int, frames: int, head_pairs: int) -> Parts:
    """Measures the parts of a step on one CPU thread; scales the towers to the shape's frames."""
    stages = one["stages"]
    # The backward is counted as the towers'; the head's share of it is small here.
    towers = (stages["towers"] + stages["backward"]) / pairs * Shape().frames / frames
    torch.set_num_threads(1)
    call = step_call(head_pairs, "factorized", "sample")
    call()
    started = time.perf_counter()
    call()
    return Parts(towers, (time.perf_counter() - started) / head_pairs**2, stages["optimizer"])


def parts_of_profile(path: Path, pairs_per_gpu: int) -> Parts:
    """Reads the parts of a run on GPUs from its artifact ``profile/profile.json``."""
    found = json.loads(path.read_text())
    mean = {
        name: statistics.fmean(one.get(name, 0.0) for one in found["mean_s"]) for name in found["mean_s"][0]
    }
    head = mean["head"]
    # The head's backward takes twice its forward, as for all dense work.
    towers = mean["towers"] + mean.get("towers_again", 0.0) + mean["backward"] - 2 * head
    num_pairs = pairs_per_gpu * found["workers"]
    return Parts(towers / pairs_per_gpu, 3 * head / (pairs_per_gpu * num_pairs), mean["optimizer"])


def main() -> None:
    """Measures, models and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=200, help="generated clips to extract; 0: none")
    parser.add_argument("--pairs", type=int, default=8, help="global batch of the training step")
    parser.add_argument("--frames", type=int, default=4, help="frames of its clips")
    parser.add_argument("--image-size", type=int, default=224, help="pixels a side")
    parser.add_argument("--steps", type=int, default=3, help="steps that are measured")
    parser.add_argument(
        "--head-pairs", type=int, default=512, help="batch of which the head's part is measured"
    )
    parser.add_argument(
        "--profile", type=Path, help="profile.json of a run on GPUs, in place of this machine's"
    )
    parser.add_argument("--pairs-per-gpu", type=int, default=32, help="of that run, and of the model")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found: Found = {}
    if options.clips:
        with tempfile.TemporaryDirectory() as folder:
            paths = [
                str(path.absolute()) for path in write_clips(Path(folder) / "videos", options.clips, 0, 2)
            ]
            found["extraction"] = [whole(paths, workers, f"{folder}/root") for workers in (1, 2)]
        one, two = (run["pool_s"] - run["actors_start_s"] for run in found["extraction"])
        _say_scaling(f"extraction of {options.clips} clips, start of the actors apart", one, two)
    shape_of_step = (options.pairs, options.frames, options.image_size, options.steps)
    found["training"] = [training(world, *shape_of_step) for world in (1, 2)]
    one, two = (run["step_s"] for run in found["training"])
    _say_scaling(f"training step, {options.pairs} pairs of {options.frames} frames", one, two)
    for world, run in zip((1, 2), found["training"], strict=True):
        say(f"  {world}: " + ", ".join(f"{name} {value:.3f}" for name, value in run["stages"].items()))
    if options.profile:
        parts = parts_of_profile(options.profile, options.pairs_per_gpu)
    else:
        flops = matmul_flops()
        here = measured_parts(found["training"][0], options.pairs, options.frames, options.head_pairs)
        parts = here.on_gpu(flops)
        found["here"] = vars(here) | {"matmul_gflops": flops / 1e9}
        say(f"one thread: {flops / 1e9:.0f} GFLOP/s, towers {here.towers_s:.3f} s a pair of 12 frames, ")
        say(f"  scores and losses {here.head_s * 1e6:.2f} µs a pair, optimiser {here.optimizer_s:.3f} s")
    found["gpu"] = vars(parts)
    say(f"a GPU: towers {parts.towers_s * 1e3:.3f} ms, head {parts.head_s * 1e9:.2f} ns a pair")
    say("\n" + table(parts, Shape(pairs_per_gpu=options.pairs_per_gpu)) + "\n\n" + ASSUMPTIONS)
    sys.stdout.write(json.dumps(found) + "\n")


def _say_scaling(what: str, one: float, two: float) -> None:
    say(f"{what}: 1 worker {one:.2f} s, 2 workers {two:.2f} s, efficiency {one / (2 * two):.0%}")


if __name__ == "__main__":
    main()
