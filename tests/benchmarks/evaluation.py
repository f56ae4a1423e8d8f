"""``python -m tests.benchmarks.evaluation``: ranks of 10,000 texts × 10,000 videos, features given.

GARE's scores (ViT-B/32 width, 12 frames), both directions, best candidates and 95 % intervals of all metrics
included. Memory is the peak of this process above the features; the bar is 2 GB. One JSON line on stdout;
ends with status 1 above the bar.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch

from gare.retrieval.ranking.postprocess import PostProcessing
from gare.retrieval.ranking.ranks import rank_blocks
from gare.retrieval.ranking.scoring import ModelBlocks
from gare.retrieval.results.files import intervals_of
from tests.benchmarks.inputs import D, F, features, head
from tests.helpers.memory import peak_mb, reset_peak

BAR_MB = 2000


def main() -> int:
    """Measures, prints the results and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--videos", type=int, default=10_000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--dsl", action="store_true", help="dual softmax too")
    options = parser.parse_args()
    model = head().eval()
    warm = ModelBlocks(model, *features(64, 64))
    rank_blocks(warm, warm.grid(torch.arange(64)))  # warm-up, in which libraries load their kernels
    text, video = features(options.texts, options.videos)
    owners = torch.arange(options.texts) % options.videos
    before = reset_peak()
    started = time.perf_counter()
    blocks = ModelBlocks(model, text, video)
    processing = PostProcessing(dsl_scale=100.0 if options.dsl else None)
    ranks = rank_blocks(blocks, blocks.grid(owners), processing)
    ranked = time.perf_counter() - started
    for variant, found in ranks.items():
        intervals_of(found, owners, variant, resamples=options.resamples, seed=0)
    seconds = time.perf_counter() - started
    pairs = options.texts * options.videos
    row = {
        "texts": options.texts,
        "videos": options.videos,
        "dsl": options.dsl,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "intervals_s": round(seconds - ranked, 1),
        "pairs_per_s": round(pairs / seconds),
        "beyond_features_mb": round(peak_mb() - before),
        "features_mb": round(4 * D * (options.texts + options.videos * F) / 1e6),
        "bar_mb": BAR_MB,
    }
    sys.stdout.write(json.dumps(row) + "\n")
    return int(row["beyond_features_mb"] > BAR_MB)


if __name__ == "__main__":
    sys.exit(main())
