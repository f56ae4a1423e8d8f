"""Helpers for training runs that are disturbed: their folders, their workers, and their expected result."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import mlflow
import psutil

from cluster.layout import Layout
from cluster.tracking import resolve_tracking_uri
from gare.config import Config
from gare.errors import CheckpointError
from gare.train.checkpoint.history import History
from gare.train.checkpoint.index import Checkpoints, Entry
from pipelines.training import callbacks as training
from tests.helpers.pipelines import losses, tiny

EPOCHS, STEPS = 16, 48
#: Seconds from a fault until the run passed the step reached before it, by fault; printed at the end.
SECONDS: dict[str, list[float]] = {}
PATIENCE_S = 600


def recovering(run: str, *overrides: str) -> Config:
    """Returns a run of 48 steps, 3 an epoch, that writes checkpoints as often as time allows."""
    return tiny(
        *(f"train.run={run}", f"train.epochs={EPOCHS}", "train.checkpoint_every_steps=1"),
        *("train.max_failures=3", *overrides),
    )


def last_entry(folder: str | Path) -> Entry | None:
    try:
        return (Checkpoints(f"{folder}/checkpoints").entries() or [None])[-1]
    except CheckpointError:
        return None


def last_step(folder: str | Path) -> int:
    """Returns the step of the last checkpoint; -1 if there is none yet."""
    entry = last_entry(folder)
    return entry.step if entry else -1


def remember(measured: dict[str, list[float]]) -> None:
    """Adds measurements of another process of a test."""
    for fault, seconds in measured.items():
        SECONDS.setdefault(fault, []).extend(seconds)


class Recovery(threading.Thread):
    """Thread that measures the time from now until a run passes a step.

    Args:
        fault: name of the fault in the report.
        folder: folder of the run.
        step: step of its last checkpoint.
    """

    def __init__(self, fault: str, folder: str | Path, step: int) -> None:
        super().__init__(daemon=True)
        self.fault, self.folder, self.step, self.began = fault, folder, step, time.monotonic()
        self.start()

    def run(self) -> None:
        while time.monotonic() < self.began + PATIENCE_S:
            if last_step(self.folder) > self.step:
                remember({self.fault: [time.monotonic() - self.began]})
                return
            threading.Event().wait(0.05)


def training_actors() -> list[dict[str, Any]]:
    """Returns the living training workers of the cluster that this process has joined."""
    import ray

    alive = [one for one in ray._private.state.actors().values() if one["State"] == "ALIVE"]
    return [one for one in alive if "RayTrainWorker" in one["ActorClassName"]]


def workers() -> list[psutil.Process]:
    """Returns the training workers of this process's own Ray, not those of others on this machine."""

    def is_worker(process: psutil.Process) -> bool:
        try:
            return "RayTrainWorker" in " ".join(process.cmdline())
        except psutil.Error:
            return False

    return [process for process in psutil.Process().children(recursive=True) if is_worker(process)]


def send(processes: list[psutil.Process], what: str) -> None:
    for process in processes:
        try:
            getattr(process, what)()
        except psutil.NoSuchProcess:
            continue


def assert_as_undisturbed(
    result: dict[str, Any], calm: dict[str, Any], places: Layout, root: Path, folder: str
) -> None:
    """Asserts that every loss of every step is in the record and in MLflow, once and with its value."""
    assert losses(folder) == losses(places.run("calm"))
    for key in ("steps", "loss", "best_epoch", "val/t2v/R1"):
        assert result[key] == calm[key]
    client = mlflow.MlflowClient(resolve_tracking_uri("sqlite:///mlflow.db", str(root)))
    run = client.get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    logged = {*range(training.LOG_EVERY, STEPS, training.LOG_EVERY), STEPS}
    for name, points in losses(folder).items():
        expected = {step: value for step, value in points if step in logged}
        received = client.get_metric_history(run.info.run_id, name)
        assert Counter(point.step for point in received) == Counter(expected.keys()), name
        assert {point.step: point.value for point in received} == expected, name
    recalls = client.get_metric_history(run.info.run_id, "val/t2v/R1")
    assert Counter(point.step for point in recalls) == Counter(3 * epoch for epoch in range(1, EPOCHS + 1))


def resumed(folder: str | Path) -> list[int]:
    return History.read(f"{folder}/history.json").resumed
