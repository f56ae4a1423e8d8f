"""``train.compile`` and ``train.activation_checkpointing`` in a learner, on one worker and on two."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from gare.config import TrainConfig
from gare.config.section import Mark
from gare.model.encoders.compiled import CompiledBlocks
from gare.train.loss.gather import gather
from gare.train.step import build_learner
from tests.helpers import parity
from tests.helpers.tiny import tiny_config

SETTINGS = ("train.compile=towers", "train.activation_checkpointing=true")
WORKER = """
import sys, torch, torch.distributed as dist
from gare.train.loss.gather import gather
from tests.helpers import parity
rank, seed, folder, *settings = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(rank), world_size=2)
found = parity.run(int(seed), torch.float32, gather, *settings)
torch.save({"gradients": found.gradients, "losses": found.losses}, f"{folder}/found-{rank}.pt")
dist.destroy_process_group()
"""


def test_two_compiled_workers_are_one_that_is_not(
    repository: Path, tmp_path: Path, session_seed: int
) -> None:
    """DDP and the compiler both look into the towers: a gradient that one of them lost would train less."""
    commands = [
        [sys.executable, "-c", WORKER, str(rank), str(session_seed), str(tmp_path), *SETTINGS]
        for rank in range(2)
    ]
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    parity.run_together(commands, tmp_path, 500, cwd=repository, env=environment)
    alone = parity.run(session_seed, torch.float32, gather)
    whole = torch.cat([value.flatten() for value in alone.gradients.values()]).norm()
    for rank in range(2):
        found = torch.load(tmp_path / f"found-{rank}.pt", weights_only=True)
        assert found["losses"] == pytest.approx(alone.losses, rel=1e-4)
        assert found["gradients"].keys() == alone.gradients.keys()
        for name, value in alone.gradients.items():
            difference = (found["gradients"][name] - value).norm()
            assert difference < 1e-4 * max(value.norm(), 1e-3 * whole), f"{name}, seed {session_seed}"


def test_on_a_cpu_nothing_is_compiled_unless_asked_for(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test and every laptop would else wait for a compiler."""
    torch.manual_seed(seed)
    monkeypatch.setattr(CompiledBlocks, "compile", lambda blocks: pytest.fail("the compiler was started"))
    config = tiny_config()
    assert config.train.compile == "auto"
    model = parity.GARE(config.model)
    learner = build_learner(model, config, num_steps=1, device=torch.device("cpu"))
    assert not learner.model.towers.full_width
    # Without towers there is nothing to compile, whatever is asked for.
    config = tiny_config("train.compile=towers", "train.input=features")
    model.drop_towers()
    build_learner(model, config, num_steps=1, device=torch.device("cpu"))


def test_a_run_goes_on_with_other_settings_of_speed() -> None:
    """A run that moves to another card may need less memory there, or another compiler."""
    assert {"compile", "activation_checkpointing", "micro_batch"} <= TrainConfig.marked(Mark.FREE)
