"""Training through faults: whatever is killed, and whenever, the run is that of an undisturbed one."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import psutil
import pytest

from cluster.storage import Layout
from cluster.tracking import resolve_tracking_uri
from gare.config import Config
from gare.errors import CheckpointError
from gare.train.checkpoints import Checkpoints, Entry
from pipelines import train, training
from tests.pipelines.support import losses, tiny
from tests.pipelines.test_faults import wait_for

EPOCHS, STEPS = 16, 48


def recovering(run: str, *overrides: str) -> Config:
    """A run of 48 steps, 3 an epoch, with a checkpoint whenever there is time for one."""
    return tiny(
        *(f"train.run={run}", f"train.epochs={EPOCHS}", "train.checkpoint_every_steps=1"),
        *("train.max_failures=3", *overrides),
    )


@pytest.fixture(scope="module")
def calm(benchmark: dict[str, Any]) -> dict[str, Any]:
    """The result of the same run, never disturbed, with checkpoints at the ends of epochs alone."""
    return train.run(recovering("calm", "train.checkpoint_every_steps=0"))


def last_entry(folder: str | Path) -> Entry | None:
    try:
        return (Checkpoints(f"{folder}/checkpoints").entries() or [None])[-1]
    except CheckpointError:
        return None


def workers() -> list[psutil.Process]:
    """Training workers of this process's own Ray; others may be at work on this machine."""

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


class Killer(threading.Thread):
    """Kills all training workers at once, as a node that is lost does, after given steps and within an epoch.

    They are held while it looks where they are, so that it strikes where it means to.
    """

    def __init__(self, folder: str, after: list[int]) -> None:
        super().__init__()
        self.folder, self.after = folder, after
        self.killed: list[int] = []
        self.over = threading.Event()

    def run(self) -> None:
        for step in self.after:
            if not wait_for(lambda step=step: self._strike(step), lambda: not self.over.is_set()):
                return

    def _strike(self, step: int) -> bool:
        beyond = max([step, *(last + 1 for last in self.killed)])

        def there() -> bool:
            entry = last_entry(self.folder)
            return entry is not None and entry.step >= beyond and entry.step % 3 != 0

        if not there():
            return False
        found = workers()
        send(found, "suspend")
        entry = last_entry(self.folder)
        if there() and len(found) == 2 and entry:
            self.killed.append(entry.step)
            send(found, "kill")
            psutil.wait_procs(found, timeout=30)
            return True
        send(found, "resume")
        return False


def assert_as_undisturbed(
    result: dict[str, Any], calm: dict[str, Any], places: Layout, root: Path, folder: str
) -> None:
    """Every loss of every step in the record, and every step that MLflow gets, once and with its value."""
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
    steps: list[int] = json.loads((Path(folder) / "history.json").read_text())["resumed"]
    return steps


@pytest.fixture
def killer(places: Layout, rng: np.random.Generator) -> Iterator[Killer]:
    after = sorted(int(step) for step in rng.choice(np.arange(1, 40), 3, replace=False))
    thread = Killer(places.run("thrice"), after)
    yield thread
    thread.over.set()
    if thread.is_alive():
        thread.join()


def test_killed_three_times_within_epochs(
    calm: dict[str, Any], places: Layout, root: Path, killer: Killer
) -> None:
    """Preempted three times in a night, a run must neither lose its steps nor come out otherwise."""
    killer.start()
    result = train.run(recovering("thrice"))
    killer.over.set()
    killer.join()
    folder = places.run("thrice")
    assert len(killer.killed) == 3, f"it was done before it could be killed after steps {killer.after}"
    assert resumed(folder) == killer.killed
    assert_as_undisturbed(result, calm, places, root, folder)
    kept = Checkpoints(f"{folder}/checkpoints").entries()
    assert [entry.step for entry in kept][-1] == STEPS
    assert len(kept) <= 3
