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

#: Folder of the profile among a run's artifacts.
FOLDER = "profile"


class Watch:
    """Watches the steps of one worker.

    Args:
        config: of the run.
        learner: that trains, where its run begins or goes on.
        plan: of the worker.
        rank: of the worker.
        device: where it trains.
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
        """Takes the validations of the run's earlier starts."""
        for name, points in epochs.items():
            for epoch, value in points:
                self.status.validated(epoch, {name: value})

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """After an optimiser step."""
        if line := self.status.step(step, values):
            logger.info("%s", line)
        if self._profile is not None:
            self._profile.step(values)

    def finish(self, handle: RunHandle) -> None:
        """After the last step: the profile goes to the log and to MLflow. All workers must call it."""
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
        loaders=config.cluster.loaders_per_worker,
        on_gpu=on_gpu,
    )
    on_device = ("augment", "transfer") if on_gpu else ("transfer",)
    return RunShape(train.run, tuple(accumulate(steps)), train.batch_size, rank, help_, on_device)


def memory_of(device: Any) -> str:
    """The most that this worker has held of the machine's memory and of its GPU's."""
    import torch

    # Kilobytes on Linux.
    held = f"memory peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.1f} GB"
    if device.type != "cuda":
        return held
    return f"{held}, GPU {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"
