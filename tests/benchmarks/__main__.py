"""``make bench``: what the increment costs in its direct form, as ratios to the baseline within one run.

Prints a table on stderr and one JSON line on stdout. Runs are interleaved and medians are quoted; every
peak of memory is that of a fresh process, above its inputs.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from gare.config import ClipConfig, LossConfig, ModelConfig
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.train.objective import loss_terms

D, F, ROUNDS = 512, 12, 5
SIZES = (32, 64, 128)


def head(num_pairs: int, *, increment: bool) -> tuple[GARE, TextFeatures, VideoFeatures]:
    """A model with tiny towers and a full-width head, and features of a batch."""
    torch.manual_seed(0)
    clip = ClipConfig(
        image_size=32,
        patch_size=32,
        vision_width=64,
        vision_layers=1,
        vision_heads=1,
        text_width=64,
        text_layers=1,
        text_heads=1,
        vocab_size=64,
        embed_dim=D,
    )
    model = GARE(ModelConfig(clip=clip, temporal_layers=0, increment=increment)).train()
    text = torch.randn(num_pairs, D, requires_grad=True)
    frames = torch.randn(num_pairs, F, D, requires_grad=True)
    words, mask = torch.ones(num_pairs, 8, dtype=torch.bool), torch.ones(num_pairs, F, dtype=torch.bool)
    return model, TextFeatures(text, None, words), VideoFeatures(frames, mask)


def step(model: GARE, text: TextFeatures, video: VideoFeatures) -> None:
    """Scores, all losses and all gradients of a batch."""
    loss_terms(model, text, video, LossConfig()).total.backward()


def measure_time(num_pairs: int) -> dict[str, float]:
    """Median seconds of a head step, both models in turn."""
    both = {name: head(num_pairs, increment=name == "gare") for name in ("baseline", "gare")}
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(ROUNDS + 1):
        for name, inputs in both.items():
            started = time.perf_counter()
            step(*inputs)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def measure_memory(num_pairs: int, name: str) -> float:
    """Peak MiB of one head step above its inputs, in a fresh process."""
    code = f"from tests.benchmarks.__main__ import peak; peak({num_pairs}, {name!r})"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return float(out)


def peak(num_pairs: int, name: str) -> None:
    """Writes the growth of this process's peak memory over one step."""
    small, inputs = head(2, increment=name == "gare"), head(num_pairs, increment=name == "gare")
    step(*small)  # libraries load their kernels
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(*inputs)
    sys.stdout.write(str((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def main() -> None:
    """Runs all sizes."""
    rows = []
    line = "{:>6} {:>12} {:>12} {:>7} {:>14} {:>14} {:>7}\n"
    sys.stderr.write(
        f"Head step (scores, losses, gradients), D = {D}, F = {F}, {torch.get_num_threads()} threads\n"
    )
    sys.stderr.write(
        line.format("pairs", "baseline s", "GARE s", "ratio", "baseline MiB", "GARE MiB", "ratio")
    )
    for num_pairs in SIZES:
        seconds = measure_time(num_pairs)
        memory = {name: measure_memory(num_pairs, name) for name in seconds}
        row = {"pairs": num_pairs, "seconds": seconds, "peak_mib": memory}
        rows.append(row)
        sys.stderr.write(
            line.format(
                num_pairs,
                f"{seconds['baseline']:.4f}",
                f"{seconds['gare']:.4f}",
                f"{seconds['gare'] / seconds['baseline']:.1f}",
                f"{memory['baseline']:.0f}",
                f"{memory['gare']:.0f}",
                f"{memory['gare'] / max(memory['baseline'], 1):.1f}",
            )
        )
    sys.stdout.write(json.dumps({"head_step": rows}) + "\n")


if __name__ == "__main__":
    main()
