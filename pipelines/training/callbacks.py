"""Callbacks of a training worker, one duty each; checkpoints have a file of their own.

The list of a run, and why it has that order, is in ``worker.py``.
"""

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
from gare.train.callback import Callback
from gare.train.checkpoint.history import History
from gare.train.input.plan import Plan

logger = logging.getLogger(__name__)

#: Number of steps whose metrics are sent to MLflow together.
LOG_EVERY = 10
#: Folder of the profile in a run's artifacts.
PROFILE_FOLDER = "profile"


class ElasticWorkers(Callback):
    """Adds the number of workers of this start to each step of an elastic run.

    Args:
        num_workers: workers of this start.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers

    def on_step(self, step: int, values: dict[str, float]) -> None:
        """Adds ``train/workers``."""
        values["train/workers"] = float(self._num_workers)


class PeakMemory(Callback):
    """Adds the peak memory of this worker to each epoch."""

    def on_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        """Adds ``memory/worker_peak_bytes``."""
        metrics["memory/worker_peak_bytes"] = peak_bytes()


class StatusLine(Callback):
    """Logs a line now and then with progress, losses, speed, and advice if the run waits for data.

    Args:
        learner: the learner, at the step where this start begins.
        plan: plan of the worker.
        rank: rank of the worker; others than 0 log only if they wait for data.
        device: device that it trains on.
        epochs: validations of the run's earlier starts, as in ``History``.
    """

    def __init__(
        self,
        learner: Any,
        plan: Plan,
        rank: int,
        device: Any,
        epochs: Mapping[str, Sequence[tuple[int, float]]],
    ) -> None:
        self._rank, self._train = rank, learner.config.train
        shape = _shape_of(learner.config, plan, rank, on_gpu=device.type == "cuda")
        self._status = TrainStatus(shape, learner.step, lambda: memory_of(device))
        for name, points in epochs.items():
            for epoch, value in points:
                self._status.validated(epoch, {name: value})

    def on_step(self, step: int, values: dict[str, float]) -> None:
        """Logs the line, if it is time for one."""
        if line := self._status.step(step, values):
            logger.info("%s", line)

    def on_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        """Logs the recall on val; later lines repeat it."""
        self._status.validated(epoch, metrics)
        if not self._rank and "val/t2v/R1" in metrics:
            logger.info(
                "%s: epoch %d of %d, val R@1 %.1f t2v, %.1f v2t",
                self._train.run,
                epoch,
                self._train.epochs,
                metrics["val/t2v/R1"],
                metrics["val/v2t/R1"],
            )


class Profiling(Callback):
    """Measures the stages of each step, and at the end logs a table and sends it with pictures to MLflow.

    All workers must have it: they join their measurements.

    Args:
        learner: the learner, at the step where this start begins.
        rank: rank of the worker.
        device: device that it trains on.
        handle: the MLflow run.
    """

    def __init__(self, learner: Any, rank: int, device: Any, handle: RunHandle) -> None:
        from gare.train.profile import Profile, trace_file

        self._rank, self._handle = rank, handle
        self._title = f"{learner.config.name}/{learner.config.train.run}: stages"
        self._folder = tempfile.TemporaryDirectory()
        self._profile = Profile(learner, device, "" if rank else trace_file(self._folder.name))

    def on_step(self, step: int, values: dict[str, float]) -> None:
        """Records the seconds of the step's stages."""
        self._profile.step(values)

    def on_finish(self) -> None:
        """Logs and sends the profile."""
        from gare.train.profile import picture, table

        found = self._profile.finish()
        if self._rank == 0 and found["by_step"]:
            logger.info("%s", table(found))
            self._handle.log_json(f"{PROFILE_FOLDER}/profile.json", found)
            self._handle.log_text(f"{PROFILE_FOLDER}/profile.txt", table(found))
            drawn = Path(self._folder.name) / "profile.png"
            drawn.write_bytes(picture(found, self._title))
            for file in sorted(Path(self._folder.name).iterdir()):
                self._handle.log_artifact_file(file, PROFILE_FOLDER)
        self._folder.cleanup()


class MetricHistory(Callback):
    """Adds the metrics of steps and epochs to the run's record, which checkpoints save.

    Args:
        history: the record, up to the step where this start begins.
    """

    def __init__(self, history: History) -> None:
        self._history = history

    def on_step(self, step: int, values: dict[str, float]) -> None:
        """Adds the values of a step."""
        self._history.add_step(step, values)

    def on_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        """Adds the metrics of an epoch."""
        self._history.add_epoch(epoch, metrics)


class MetricLog(Callback):
    """Sends metrics to MLflow: those of epochs, and those of every ``LOG_EVERY``-th step.

    Args:
        handle: the MLflow run.
        learner: knows the steps done and those of the whole run.
        resumed: steps after which the run was continued, for a tag.
    """

    def __init__(self, handle: RunHandle, learner: Any, resumed: Sequence[int]) -> None:
        self._handle, self._learner = handle, learner
        if resumed:
            handle.set_tags({"resumed.after_steps": ", ".join(map(str, resumed))})

    def on_step(self, step: int, values: dict[str, float]) -> None:
        """Sends the values of some steps and of the last one."""
        if step % LOG_EVERY == 0 or step == self._learner.num_steps:
            self._handle.log_metrics(values, step, once=True)

    def on_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        """Sends the metrics of an epoch."""
        self._handle.log_metrics(metrics | {"epoch": epoch}, self._learner.step, once=True)


def _shape_of(config: Config, plan: Plan, rank: int, *, on_gpu: bool) -> RunShape:
    train = config.train
    steps = plan.epoch_steps() or [0]
    help_ = partial(
        advice,
        from_features=train.input == "features",
        can_be_raw=config.extract.encoding == "jpeg" and config.extract.crop == "center",
        loaders=config.cluster.resolved.loaders_per_worker,
        on_gpu=on_gpu,
    )
    on_device = ("augment", "transfer") if on_gpu else ("transfer",)
    return RunShape(train.run, tuple(accumulate(steps)), train.batch_size, rank, help_, on_device)


def peak_bytes() -> int:
    """Returns the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


def memory_of(device: Any) -> str:
    """Returns this worker's peak memory, of the machine and of its GPU, as text."""
    import torch

    held = f"memory peak {peak_bytes() / 1e9:.1f} GB"
    if device.type != "cuda":
        return held
    return f"{held}, GPU {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"
