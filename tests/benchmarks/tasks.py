"""The measured tasks: scores, training steps of the head, workers."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from gare.config import LossConfig
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.train.loss.diagnostics import diagnose
from gare.train.loss.gather import exchange_row_counts
from gare.train.loss.objective import StepRandomness, loss_terms, sharded_terms
from tests.benchmarks.inputs import features, head
from tests.helpers.memory import peak_mb, reset_peak


def step_call(num_pairs: int, form: str, over: str = "all", *, watched: bool = False) -> Callable[[], None]:
    """Returns a training step of the head: scores, all losses, all gradients, with ψ's default dropout.

    The direct form has its own dropout for each pair, as in the paper; its diversity is over all texts.
    """
    model = head(increment_dropout_per="pair" if form == "direct" else "context").train()
    text, video = features(num_pairs, num_pairs)
    text = TextFeatures(text.embedding.requires_grad_(), None, text.mask)
    video = VideoFeatures(video.frames.requires_grad_(), video.mask)
    config = LossConfig(direction_over=over)  # type: ignore[arg-type]

    def step() -> None:
        draws = StepRandomness.of_step(model.scorer, config, num_pairs, 0)
        if form == "direct":
            loss_terms(model, text, video, config, draws).objective.backward()
            return
        terms = sharded_terms(model, text, video, config, draws, watched=watched)
        terms.objective.backward()
        if terms.seen is not None:
            diagnose(model.scorer, terms.seen, 16)

    return step


def step_peak(num_pairs: int, form: str, over: str = "all") -> dict[str, float]:
    """Measures peak MB of a step above its inputs, and its seconds, in this process."""
    step_call(4, form, over)()  # warm-up: libraries load their kernels
    call = step_call(num_pairs, form, over)
    before = reset_peak()
    started = time.perf_counter()
    call()
    return {"mb": peak_mb() - before, "seconds": time.perf_counter() - started}


def scores_peak(num_texts: int, num_videos: int) -> dict[str, float]:
    """Measures peak MB of scoring prepared videos, above inputs and result, in this process."""
    model = head().eval()
    with torch.no_grad():
        model.score(*features(40, 40))
        text, video = features(num_texts, num_videos)
        prepared = model.prepare_video(video)
        before = reset_peak()
        model.score(text, prepared)
    return {"mb": peak_mb() - before - 4 * num_texts * num_videos / 1e6}


def worker(rank: int, world: int, folder: str, num_pairs: int) -> None:
    """Runs one of several workers with one thread each; rank 0 prints its seconds per step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    model: GARE = head().train()
    text, video = features(num_pairs, num_pairs)
    share = num_pairs // world
    mine = slice(rank * share, (rank + 1) * share)
    own = TextFeatures(text.embedding[mine].requires_grad_(), None, text.mask[mine])
    config = LossConfig(direction_over="sample")
    frames = video.frames.requires_grad_()
    rounds = 4
    started = 0.0
    for number in range(rounds):
        if number == 1:
            started = time.perf_counter()
        draws = StepRandomness.of_step(model.scorer, config, num_pairs, 0)
        rows = exchange_row_counts(share, torch.device("cpu"))
        terms = sharded_terms(model, own, VideoFeatures(frames, video.mask), config, draws, rows=rows)
        terms.objective.backward()
    if rank == 0:
        sys.stdout.write(str((time.perf_counter() - started) / (rounds - 1)))
    dist.destroy_process_group()


def workers_seconds(world: int, num_pairs: int) -> float:
    """Measures seconds per step of a number of worker processes with one thread each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(world):
            call = (
                f"from tests.benchmarks.tasks import worker; worker({rank}, {world}, {folder!r}, {num_pairs})"
            )
            command = [sys.executable, "-c", call]
            processes.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path.cwd())
            )
        said = [process.communicate()[0] for process in processes]
    return float(said[0])
