"""Monitoring of a training worker: its status line, and on request its profile."""

from __future__ import annotations

import logging
import resource
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from cluster.status.train_status import RunShape, TrainStatus, advice
from cluster.tracking import RunHandle
from gare.config import Config
from gare.train.input.plan import Plan

logger = logging.getLogger(__name__)

#: Folder of the profile in a run's artifacts.
FOLDER = "profile"


class Watch:
    """Monitor of one worker's steps.

    Args:
        config: configuration of the run.
        learner: the learner, at the step where this start begins.
        plan: plan of the worker.
        rank: rank of the worker.
        device: device that it trains on.
    """

    def __init__(self, config: Config, learner: Any, plan: Plan, rank: int, device: Any) -> None:
        self._config, self._rank = config, rank
        self.status = TrainStatus(
            _whole(config, plan, rank, on_gpu=device.type == "cuda"), learner.step, lambda: memory_of(device)
        )
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._profile: Any = None
        if config.train.profile:
            from gare.train.profile import Profile, trace_file

            self._folder = tempfile.TemporaryDirectory()
            trace = "" if rank else trace_file(self._folder.name)
            self._profile = Profile(learner, device, trace)

    def validated_before(self, epochs: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        """Adds the validations of the run's earlier starts."""
        for name, points in epochs.items():
            for epoch, value in points:
                self.status.validated(epoch, {name: value})

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a step's values; call after each optimiser step."""
        if line := self.status.step(step, values):
            logger.info("%s", line)
        if self._profile is not None:
            self._profile.step(values)

    def finish(self, handle: RunHandle) -> None:
        """Sends the profile to the log and to MLflow, after the last step. All workers must call it."""
        if self._profile is None or self._folder is None:
            return
        from gare.train.profile import picture, table

        found = self._profile.finish()
        if self._rank == 0 and found["by_step"]:
            logger.info("%s", table(found))
            handle.log_json(f"{FOLDER}/profile.json", found)
            handle.log_text(f"{FOLDER}/profile.txt", table(found))
            drawn = Path(self._folder.name) / "profile.png"
            drawn.write_bytes(picture(found, f"{self._config.name}/{self._config.train.run}: stages"))
            for file in sorted(Path(self._folder.name).iterdir()):
                handle.log_artifact_file(file, FOLDER)
        self._folder.cleanup()


def _whole(config: Config, plan: Plan, rank: int, *, on_gpu: bool) -> RunShape:
    train = config.train
    steps = [0] * (max((batch.epoch for batch in plan.batches), default=0) + 1)
    for batch in plan.batches:
        steps[batch.epoch] += batch.kind == "train"
    help_ = partial(
        advice,
        from_features=train.input == "features",
        can_be_raw=config.extract.encoding == "jpeg" and config.extract.crop == "center",
        loaders=config.cluster.resolved.loaders_per_worker,
        on_gpu=on_gpu,
    )
    on_device = ("augment", "transfer") if on_gpu else ("transfer",)
    return RunShape(train.run, tuple(accumulate(steps)), train.batch_size, rank, help_, on_device)


def memory_of(device: Any) -> str:
    """Returns this worker's peak memory, of the machine and of its GPU, as text."""
    import torch

    # ru_maxrss is in kilobytes on Linux.
    held = f"memory peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.1f} GB"
    if device.type != "cuda":
        return held
    return f"{held}, GPU {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"
