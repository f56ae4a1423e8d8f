"""One worker of test_stages; run as a process: ``python -m tests.helpers.staged RANK FOLDER``."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from gare.train.loss.gather import rank, world_size
from gare.train.profile import Profile
from gare.train.step import build_learner, train_step
from tests.helpers.tiny import share, tiny_batch, tiny_config

STEPS = 4
#: Weights with every loss term on, as in ``tests.helpers.tiny``; diversity of all texts.
FORMS = {
    "sharded": (),
    "everything": ("model.method=direct", "model.increment_dropout_per=pair"),
    "everything and words": (
        "model.method=direct",
        "model.increment_dropout_per=pair",
        "model.context=words",
    ),
}


def train(*overrides: str, profiled: bool = False, trace: str = "") -> tuple[list[float], Any, list[float]]:
    """Trains a few steps; returns their losses, their profile and their seconds."""
    from gare.model.gare import GARE

    config = tiny_config("train.batch_size=8", *overrides)
    torch.manual_seed(3)
    learner = build_learner(GARE(config.model), config, STEPS, torch.device("cpu"))
    rng = np.random.default_rng(5)
    batches = [share(tiny_batch(config, rng), rank(), world_size()) for _ in range(STEPS)]
    profile = Profile(learner, torch.device("cpu"), trace) if profiled else None
    losses, seconds = [], []
    for batch in batches:
        started = time.perf_counter()
        values = train_step(learner, batch)
        seconds.append(time.perf_counter() - started)
        losses.append(values["loss/total"])
        if profile:
            profile.step(values | {"time/step_s": seconds[-1], "time/data_wait_s": 0.25})
    return losses, profile and profile.finish(), seconds


def traffic(*overrides: str) -> dict[str, int]:
    """Counts the bytes that a step gathers and reduces besides its gradients, and the calls."""
    counted: Counter[str] = Counter()
    gather, reduce = dist.all_gather, dist.all_reduce

    def all_gather(blocks: list[torch.Tensor], local: torch.Tensor, **options: Any) -> Any:
        counted.update(gathered=sum(block.nbytes for block in blocks), calls=1)
        return gather(blocks, local, **options)

    def all_reduce(tensor: torch.Tensor, **options: Any) -> Any:
        counted.update(reduced=tensor.nbytes, calls=1)
        return reduce(tensor, **options)

    config = tiny_config("train.batch_size=8", "train.diagnostics_every=0", *overrides)
    from gare.model.gare import GARE

    learner = build_learner(GARE(config.model), config, STEPS, torch.device("cpu"))
    batch = share(tiny_batch(config, np.random.default_rng(5)), rank(), world_size())
    dist.all_gather, dist.all_reduce = all_gather, all_reduce
    try:
        train_step(learner, batch)
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce
    return dict(counted)


def main() -> None:
    own_rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=own_rank, world_size=2)
    plain, _, _ = train()
    losses, profile, _ = train(profiled=True)
    found = {
        "plain": plain,
        "losses": losses,
        "profile": profile,
        "traffic": {form: traffic(*overrides) for form, overrides in FORMS.items()},
    }
    (folder / f"found-{own_rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
