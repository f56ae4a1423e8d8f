"""Evaluation on the device: ranks in both directions, best candidates and 95 % intervals.

Features are given on the device, as an encoder there leaves them.
"""

from __future__ import annotations

import time

import torch

from gare.retrieval.ranking.ranks import rank_blocks
from gare.retrieval.ranking.scoring import ModelBlocks
from gare.retrieval.results.files import intervals_of
from tests.benchmarks.gpu.bench import Bench, Row, say
from tests.benchmarks.gpu.head import build_head, features

#: Numbers of texts and videos of the gallery, and of a smaller one that is ranked first as a warm-up.
SIZE, WARM = 10_000, 256
TINY_SIZE, TINY_WARM = 70, 16


def measure(bench: Bench) -> Row:
    """Measures seconds of ranking and of the intervals, and peak GB."""
    sizes = (TINY_WARM, TINY_SIZE) if bench.tiny else (WARM, SIZE)
    for size in sizes:
        row = _ranked(bench, size)
    say(
        f"  {row['texts']:,} texts × {row['videos']:,} videos: ranked in {row['ranks_s']:.3f} s, "
        f"intervals {row['intervals_s']:.3f} s, {row['peak_gb']:.3g} GB"
    )
    return row


def _ranked(bench: Bench, size: int) -> Row:
    model = build_head(bench, bench.config.model).eval()
    text, video = features(bench, size)
    owners = torch.arange(size)
    bench.reset_peak()
    started = time.perf_counter()
    blocks = ModelBlocks(model, text, video, bench.device)
    ranks = rank_blocks(blocks, blocks.grid(owners))
    ranked = time.perf_counter()
    for variant, found in ranks.items():
        intervals_of(found, owners, variant, resamples=1000, seed=0)
    return {
        "texts": size,
        "videos": size,
        "ranks_s": ranked - started,
        "intervals_s": time.perf_counter() - ranked,
        "peak_gb": bench.peak_gb(),
    }
