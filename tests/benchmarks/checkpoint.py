"""``python -m tests.benchmarks.checkpoint``: seconds for a checkpoint, with its SHA-256 and without.

GARE at ViT-B/32 with its optimiser, written into a folder on this machine and read again. Without: the same
code with hashing left out. Medians of turns; a table goes to stderr, one JSON line to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch

from gare.config import Config
from gare.model.gare import GARE
from gare.train.checkpoint.files import capture, restore_learner, write_checkpoint
from gare.train.checkpoint.sums import SUMS, sha256_of
from gare.train.step import Learner, build_learner
from tests.benchmarks.measure import interleaved


def trained_learner() -> Learner:
    """Returns a learner with optimiser moments, as after a step."""
    config = Config()
    learner = build_learner(GARE(config.model), config, 10, torch.device("cpu"))
    for group in learner.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 1e-6)
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    return learner


def measure(folder: Path, rounds: int) -> dict[str, float]:
    """Returns the median seconds of each part."""
    learner = trained_learner()
    captured = capture(learner, 1)
    summed, plain = folder / "summed", folder / "plain"

    def without(call: Callable[[], object]) -> Callable[[], object]:
        def patched() -> None:
            with (
                patch("gare.train.checkpoint.files.sha256_of", lambda content: "0" * 64),
                patch("gare.train.checkpoint.sums.sha256_of", lambda content: "0" * 64),
            ):
                call()
            (plain / SUMS).unlink(missing_ok=True)

        return patched

    write_checkpoint(str(summed), captured)
    files = [file.read_bytes() for file in summed.iterdir()]
    return interleaved(
        {
            "copy, between two steps": lambda: capture(learner, 1),
            "write, without": without(lambda: write_checkpoint(str(plain), captured)),
            "write": lambda: write_checkpoint(str(summed), captured),
            "read, without": without(lambda: restore_learner(str(plain), learner, quiet=True)),
            "read": lambda: restore_learner(str(summed), learner),
            "SHA-256 alone": lambda: [sha256_of(content) for content in files],
        },
        rounds,
    ) | {"bytes": sum(map(len, files))}


def main() -> None:
    """Measures and prints the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="times of each, in turns")
    parser.add_argument("--folder", help="where to write; default: the folder of temporary files")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        found = measure(Path(folder), chosen.rounds)
    print(f"{found['bytes'] / 1e9:.2f} GB", file=sys.stderr)
    for name, seconds in found.items():
        if name != "bytes":
            print(f"{name:24} {seconds:6.2f} s", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
