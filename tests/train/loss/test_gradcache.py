"""Micro-batches through the towers give the gradient of the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gare.model.gare import GARE
from gare.train.checkpoint.initial_model import initial_model
from gare.train.step import Learner, build_learner, compute_gradients
from tests.helpers.tiny import tiny_batch, tiny_config


def learner_of(*overrides: str) -> Learner:
    config = tiny_config(*overrides)
    return build_learner(initial_model(config), config, 10, torch.device("cpu"))


def gradient_of(learner: Learner) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_gradients_are_those_of_the_whole_batch(size: int, rng: np.random.Generator) -> None:
    """Else a batch that fits only in parts would train something else."""
    plain, parts = learner_of(), learner_of(f"train.micro_batch={size}")
    batch = tiny_batch(plain.config, rng)
    calls = []
    parts.model.towers.clip.vision_model.register_forward_hook(lambda *call: calls.append(call[0].training))
    expected, found = (compute_gradients(learner, batch) for learner in (plain, parts))
    assert len(calls) == 2 * -(-len(batch.frames) // size)  # encoded, and again in the backward
    torch.testing.assert_close(found.total, expected.total, rtol=1e-5, atol=0)
    ours, theirs = gradient_of(parts), gradient_of(plain)
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_bf16_gradients_are_as_near_to_float32(size: int, rng: np.random.Generator) -> None:
    """bf16 rounds a smaller product otherwise: parts may differ from the whole, not be worse than it."""
    exact = learner_of()
    plain, parts = (learner_of("train.precision=bf16", f"train.micro_batch={n}") for n in (0, size))
    batch = tiny_batch(exact.config, rng)
    for learner in (exact, plain, parts):
        compute_gradients(learner, batch)
    whole, ours, theirs = map(gradient_of, (exact, parts, plain))
    off, off_plain = ((gradient - whole).norm() / whole.norm() for gradient in (ours, theirs))
    assert off < 1.5 * off_plain + 0.01


def test_random_state_is_replayed(rng: np.random.Generator) -> None:
    """Towers with dropout must drop the same when they encode again."""
    found = []
    for size in (0, 2):
        learner = learner_of(f"train.micro_batch={size}")
        assert isinstance(learner.model, GARE)
        seen: list[torch.Tensor] = []

        def drop(*call: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            dropped = torch.nn.functional.dropout(call[2].last_hidden_state, 0.5)  # type: ignore[attr-defined]
            seen.append(dropped.detach())
            call[2].last_hidden_state = dropped  # type: ignore[attr-defined]
            return call[2]

        learner.model.towers.clip.text_model.encoder.register_forward_hook(drop)
        batch = tiny_batch(tiny_config(), np.random.default_rng(0))
        compute_gradients(learner, batch)
        found.append(seen)
    assert len(found[1]) == 6
    # The backward goes through the last micro-batch first.
    for once, again in zip(found[1][:3], reversed(found[1][3:]), strict=True):
        assert torch.equal(once, again)


def test_activations_do_not_grow_with_the_batch(repository: Path) -> None:
    """The towers' memory is that of a micro-batch: a batch three times as large adds its frames, not more."""
    code = """
import os, sys, numpy as np, torch
from tests.helpers.memory import peak_mb, reset_peak
from tests.helpers.tiny import tiny_batch, tiny_config
from gare.train.checkpoint.initial_model import initial_model
from gare.train.step import build_learner, compute_gradients
torch.set_num_threads(1)
def grown(pairs, micro):
    config = tiny_config(f"train.batch_size={pairs}", f"train.micro_batch={micro}",
        "model.clip.image_size=32", "extract.image_size=32", "model.clip.vision_width=256",
        "model.clip.vision_layers=4")
    learner = build_learner(initial_model(config), config, 10, torch.device("cpu"))
    batch = tiny_batch(config, np.random.default_rng(0))
    compute_gradients(learner, batch[:2] if not micro else batch[: micro + 1])
    before = reset_peak()
    compute_gradients(learner, batch)
    return peak_mb() - before
for pairs, micro in ((96, 0), (32, 8), (96, 8)):
    if not os.fork():  # each as in a process of its own, whose imports are paid for once
        print(grown(pairs, micro), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
    # Tensors are given back as they are freed; what the heap keeps of them differs from run to run.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
    )
    whole, small, large = map(float, done.stdout.split())
    assert large < 1.5 * small
    assert large < whole / 2
