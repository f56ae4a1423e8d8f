"""``python -m tests.benchmarks.size``: parameters and multiply-adds at ViT-B/32, and one full step.

Multiply-adds are counted by PyTorch's FlopCounterMode (two operations each) while the part runs, for one
caption of 32 words, one clip of 12 frames and one pair of them. The step is forward, backward and optimiser
of batch 8 with 12 frames from random weights; its peak is that of this process.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gare.config import Config, parse_config
from gare.data.batch import Batch
from gare.model.gare import GARE
from gare.model.pooling import pool, unit_mean
from gare.train.step import build_learner, train_step

WORDS, FRAMES, BATCH = 32, 12, 8


def multiply_adds(call: Callable[[], object]) -> int:
    """Counts the multiply-adds of a call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2


def parts(model: GARE) -> dict[str, dict[str, int]]:
    """Counts parameters and multiply-adds by part."""
    clip, temporal, psi = model.towers.clip, model.temporal, model.increment
    tokens, mask = torch.zeros(1, WORDS, dtype=torch.int64), torch.ones(1, WORDS)
    images, frame_mask = torch.zeros(FRAMES, 3, 224, 224), torch.ones(1, FRAMES, dtype=torch.bool)
    features = torch.randn(1, FRAMES, 512)
    text, video = model.encode_text(tokens, mask), model.encode_video(images[None], frame_mask)
    gap = (video.mean - text.embedding).unsqueeze(0)
    modules: dict[str, tuple[list[nn.Module], Callable[[], object]]] = {
        "text tower": (
            [clip.text_model, clip.text_projection],
            lambda: model.towers.project_text(model.towers.encode_tokens(tokens)),
        ),
        "image tower": (
            [clip.vision_model, clip.visual_projection],
            lambda: model.towers.encode_images(images),
        ),
    }
    if temporal is not None:
        modules["temporal transformer"] = ([temporal], lambda: temporal(features, frame_mask))
    if psi is not None:
        modules["psi"] = ([psi], lambda: psi(gap, video.frames, video.mask))
    by_text = model.config.pooling == "text_conditioned"
    modules["pooling"] = ([], lambda: pool(text.embedding, video, 3.0) if by_text else unit_mean(video))
    return {
        name: {
            "parameters": sum(p.numel() for module in held for p in module.parameters()),
            "multiply_adds": multiply_adds(call),
        }
        for name, (held, call) in modules.items()
    }


def full_step(config: Config) -> dict[str, float]:
    """Measures seconds and the process's peak GiB of one training step."""
    learner = build_learner(GARE(config.model), config, 10, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        torch.randint(1, 49000, (BATCH, WORDS), generator=generator),
        torch.ones(BATCH, WORDS, dtype=torch.bool),
        torch.randn(BATCH, FRAMES, 3, 224, 224, generator=generator),
        torch.ones(BATCH, FRAMES, dtype=torch.bool),
    )
    started = time.perf_counter()
    values = train_step(learner, batch)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": round(seconds, 2), "peak_gib": round(peak, 2), "loss": round(values["loss/total"], 3)}


def main() -> None:
    """Prints the table on stderr and one JSON line on stdout."""
    torch.manual_seed(0)
    config = parse_config({"train": {"batch_size": BATCH}, "cluster": {"train_workers": 1}})
    table = parts(GARE(config.model).eval())
    sys.stderr.write(f"{'part':<22}{'parameters':>14}{'multiply-adds':>18}\n")
    for name, row in table.items():
        sys.stderr.write(
            f"{name:<22}{row['parameters'] / 1e6:>12.2f} M{row['multiply_adds'] / 1e6:>16.3f} M\n"
        )
    step = full_step(config)
    sys.stderr.write(
        f"one step of {BATCH} clips of {FRAMES} frames: {step['seconds']} s, {step['peak_gib']} GiB at most\n"
    )
    sys.stdout.write(json.dumps({"parts": table, "step": step}) + "\n")


if __name__ == "__main__":
    main()
