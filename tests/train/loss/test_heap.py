"""What a large batch leaves in the C library's heap is given back while the batch is at work."""

from __future__ import annotations

import platform

import numpy as np
import pytest
import torch

from gare.model.gare import GARE
from gare.train.loss import blocks
from gare.train.loss.blocks import give_back_free_memory
from gare.train.step import build_learner, compute_gradients
from tests.helpers.memory import held_mb
from tests.helpers.tiny import tiny_batch, tiny_config


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of this C library alone")
def test_holes_are_given_back() -> None:
    """Freed tensors between others that stay are memory that the system does not see again by itself."""
    kept = [torch.ones(16_000) for _ in range(4_000)]  # 64 kB each: from the heap, not mapped one by one
    full = held_mb()
    del kept[::2]
    before = held_mb()
    give_back_free_memory()
    assert before - held_mb() > 100, (full, before, held_mb())
    assert all(bool(tensor.eq(1).all()) for tensor in kept)


def test_blocks_that_are_computed_again_give_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 4,096 pairs grew beyond the machine's memory now and then, by such holes."""
    times: list[None] = []
    monkeypatch.setattr(blocks, "give_back_free_memory", lambda: times.append(None))
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1)
    monkeypatch.setattr(blocks, "TRIM_EVERY", 2)
    config = tiny_config()

    def step() -> None:
        torch.manual_seed(0)
        learner = build_learner(GARE(config.model), config, 1, torch.device("cpu"))
        compute_gradients(learner, tiny_batch(config, np.random.default_rng(0)))

    step()
    assert times == []  # all at once within the budget
    monkeypatch.setattr(blocks, "count_pair_numbers", lambda *_, **__: 10**8)
    step()
    # Six blocks of one video each; every other one, forward and backward.
    assert len(times) == 6
