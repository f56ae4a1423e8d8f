"""When a worker writes a checkpoint, when it stops and where it continues, without a cluster around it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from cluster.layout import layout
from gare.errors import DamagedError, LockLostError, StoppedError
from gare.model.gare import GARE
from gare.storage import generations
from gare.storage.generations import OwnedFolder
from gare.storage.run_folder import RunFolder
from gare.train.checkpoint import files as state
from gare.train.checkpoint.files import MODEL
from gare.train.checkpoint.history import History
from gare.train.checkpoint.index import Entry
from gare.train.input.plan import plan_run
from gare.train.step import build_learner
from pipelines.training import checkpointing as saving
from pipelines.training.checkpointing import Checkpointing, StopRequest
from pipelines.training.worker import callbacks_of, within_memory
from tests.helpers.tiny import tiny_config
from tests.helpers.waiting import wait_until

STEPS = 6


@pytest.fixture
def savers() -> Iterator[list[Checkpointing]]:
    made: list[Checkpointing] = []
    yield made
    for saver in made:
        saver.writer.wait()
        saver.over.set()


def new_saver(
    savers: list[Checkpointing], folder: Path, *overrides: str, owned: OwnedFolder | None = None
) -> Checkpointing:
    config = tiny_config(f"storage.root={folder}", "train.keep_checkpoints=20", *overrides)
    cpu = torch.device("cpu")
    learner = build_learner(GARE(config.model), config, STEPS, cpu)
    run_folder = RunFolder(layout(config).run(config.train.run))
    saver = Checkpointing(learner, run_folder, 0, cpu, validated=True, watch=False, owned=owned)
    savers.append(saver)
    return savers[-1]


def run(saver: Checkpointing, *, upto: int = STEPS) -> list[tuple[int, int]]:
    """Steps without training, three an epoch, each written at once; (step, epochs done) of those kept."""
    for step in range(saver.learner.step + 1, upto + 1):
        saver.learner.step = step
        saver.on_step(step, {})
        saver.writer.wait()
        if step % 3 == 0:
            saver.on_epoch(step // 3, {"val/t2v/R1": 1.0 * step})
            saver.writer.wait()
    return [(entry.step, entry.epoch) for entry in saver.checkpoints.entries()]


class Logged:
    """Handle of a run that keeps what is sent to MLflow."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.tags: dict[str, str] = {}

    def log_metrics(self, metrics: dict[str, float], step: int, *, once: bool) -> None:
        assert once
        self.metrics.append((step, dict(metrics)))

    def set_tags(self, tags: dict[str, str]) -> None:
        self.tags |= tags


def test_a_checkpoint_and_mlflow_have_all_metrics_of_their_step(
    tmp_path: Path, savers: list[Checkpointing]
) -> None:
    """Else a continued run has holes in its curves, just where it was interrupted."""
    overrides = ("train.checkpoint_every_steps=1", "train.checkpoint_every_s=0", "cluster.min_workers=1")
    plan, logged = plan_run([1] * 6, 1, tiny_config("train.epochs=2").train, rank=0, world_size=1), Logged()
    saver = new_saver(savers, tmp_path, *overrides)
    assert saver.restore() == 0
    for begin, last in ((1, 4), (5, STEPS)):
        callbacks = callbacks_of(saver, plan, cast("Any", logged), world_size=1)
        for step in range(begin, last + 1):
            saver.learner.step = step
            values = {"loss/total": 1.0 * step, "time/step_s": 1.0, "time/data_wait_s": 0.0}
            for callback in callbacks:
                callback.on_step(step, values)
            if step == 3:
                metrics = {"val/t2v/R1": 50.0, "val/v2t/R1": 40.0}
                for callback in callbacks:
                    callback.on_epoch(1, metrics)
            saver.writer.wait()
        saved = History.read(saver.history.uri)
        assert saved.steps["loss/total"] == [(step, float(step)) for step in range(1, last + 1)]
        assert saved.steps["train/workers"] == [(step, 1.0) for step in range(1, last + 1)]
        assert saved.epochs.keys() == {"val/t2v/R1", "val/v2t/R1", "memory/worker_peak_bytes"}
        saver = new_saver(savers, tmp_path, *overrides)
        assert (saver.restore(), saver.learner.step) == (1, last)
    (epoch,) = (entry for entry in saver.checkpoints.entries() if entry.metrics)
    assert epoch.metrics == {"val/t2v/R1": 50.0, "val/v2t/R1": 40.0}
    (at_epoch, of_epoch), (at_end, of_end) = logged.metrics
    assert (at_epoch, at_end, logged.tags) == (3, STEPS, {"resumed.after_steps": "4"})
    assert of_epoch.keys() == {"epoch", *saved.epochs}
    assert of_end.keys() == saved.steps.keys()


@pytest.mark.parametrize(
    ("overrides", "seconds"),
    [
        (["train.checkpoint_every_s=600"], 600),
        (["train.checkpoint_every_s=600", "cluster.min_workers=1", "cluster.resize_every_s=100"], 50),
        (["train.checkpoint_every_s=0", "cluster.min_workers=1", "cluster.resize_every_s=100"], 50),
        (["train.checkpoint_every_s=20", "cluster.min_workers=1", "cluster.resize_every_s=100"], 20),
    ],
)
def test_elastic_runs_save_before_they_are_resized(
    savers: list[Checkpointing], tmp_path: Path, overrides: list[str], seconds: float
) -> None:
    """Ray ends workers to make them more: without a newer checkpoint each time the run would never end."""
    assert new_saver(savers, tmp_path, *overrides).every_s == seconds


@pytest.mark.parametrize(
    ("asked", "world_size", "found"), [(0, 4, 0), (0, 1, 2), (1, 2, 1), (6, 2, 2), (6, 4, 6)]
)
def test_fewer_workers_hold_no_more(asked: int, world_size: int, found: int) -> None:
    """Half of the workers with twice the pairs each must not run out of the memory of their GPUs."""
    elastic = ("cluster.train_workers=4", "cluster.min_workers=1", "train.batch_size=8")
    config = tiny_config(*elastic, f"train.micro_batch={asked}")
    assert within_memory(config, world_size).train.micro_batch == found


@pytest.mark.parametrize(
    ("overrides", "within"),
    [
        (["train.checkpoint_every_s=0"], []),
        (["train.checkpoint_every_s=3600"], []),
        (["train.checkpoint_every_s=1e-9"], [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)]),
        (["train.checkpoint_every_steps=2"], [(2, 0), (4, 1), (6, 1)]),
        (["train.checkpoint_every_steps=5", "train.checkpoint_every_s=0"], [(5, 1)]),
    ],
)
def test_when_a_checkpoint_is_written(
    tmp_path: Path, savers: list[Checkpointing], overrides: list[str], within: list[tuple[int, int]]
) -> None:
    """An epoch of a large data set takes hours, which a preemption must not cost."""
    kept = run(new_saver(savers, tmp_path, *overrides))
    assert kept == sorted([*within, (3, 1), (6, 2)], key=lambda entry: (entry[1], entry[0]))


@pytest.mark.parametrize(("kept", "steps"), [("all", [2, 4, 6]), ("20", [2])])
def test_who_keeps_all_misses_no_step(
    tmp_path: Path, savers: list[Checkpointing], monkeypatch: pytest.MonkeyPatch, kept: str, steps: list[int]
) -> None:
    """A curve with holes wherever the storage was slow is not the one that was asked for."""
    saver = new_saver(savers, tmp_path, "train.checkpoint_every_steps=2", f"train.keep_checkpoints={kept}")
    awaited, wait, write = threading.Event(), saver.writer.wait, state.write_checkpoint

    def wait_for_it() -> None:
        if saver.writer.busy:
            awaited.set()
        wait()

    def write_slowly(uri: str, captured: state.CapturedState) -> None:
        assert awaited.wait(60)  # a storage so slow that nothing is written before somebody waits for it
        awaited.clear()
        write(uri, captured)

    monkeypatch.setattr(saver.writer, "wait", wait_for_it)
    monkeypatch.setattr(state, "write_checkpoint", write_slowly)
    for step in range(1, STEPS + 1):
        saver.learner.step = step
        saver.on_step(step, {})
    saver.writer.wait()
    assert [entry.step for entry in saver.checkpoints.entries()] == steps


def test_a_run_that_is_asked_to_stop_writes_first(tmp_path: Path, savers: list[Checkpointing]) -> None:
    """What was learned until a scheduler takes the machines away is all there when they come back."""
    saver = new_saver(savers, tmp_path)
    run(saver, upto=4)
    config = tiny_config(f"storage.root={tmp_path}")
    StopRequest(RunFolder(layout(config).run(config.train.run))).make("SIGTERM")
    wait_until(lambda: saver.reason, within_s=60)
    with pytest.raises(StoppedError, match="stopped by SIGTERM after step 5 of 6, and a checkpoint written"):
        run(saver, upto=6)
    assert saver.checkpoints.entries()[-1] == Entry(5, 1)
    again = new_saver(savers, tmp_path)
    assert (again.restore(), again.learner.step) == (1, 5)


def test_a_run_that_was_taken_over_writes_no_more(
    tmp_path: Path, savers: list[Checkpointing], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that were suspended for too long would write their old steps over those of their successor."""
    monkeypatch.setattr(saving, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(saving, "LOCK_EVERY_S", 0.01)
    lock_uri = str(tmp_path / "run-locks")
    owned = OwnedFolder(lock_uri, generations.begin_generation(lock_uri, "first").number)
    saver = new_saver(savers, tmp_path, "train.checkpoint_every_steps=1", owned=owned)
    kept = run(saver, upto=3)
    generations.begin_generation(lock_uri, "second")
    with pytest.raises(LockLostError, match="another job has taken it over"):
        run(saver, upto=6)
    assert [(entry.step, entry.epoch) for entry in saver.checkpoints.entries()] == kept
    # Neither do workers that Ray starts again, nor the end of the last epoch.
    with pytest.raises(LockLostError):
        new_saver(savers, tmp_path, owned=owned).restore()
    last = new_saver(savers, tmp_path, owned=owned)
    last.on_epoch(2, {"val/t2v/R1": 100.0})
    with pytest.raises(LockLostError):
        last.on_finish()
    assert [(entry.step, entry.epoch) for entry in saver.checkpoints.entries()] == kept


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, savers: list[Checkpointing]) -> None:
    """That is what the last K are kept for; and where none is left, a person has to decide."""
    kept = run(new_saver(savers, tmp_path, "train.checkpoint_every_steps=1"), upto=5)
    assert kept[-2:] == [(4, 1), (5, 1)]
    saver = new_saver(savers, tmp_path)
    newest = Path(saver.checkpoints.location(Entry(5, 1)))
    (newest / MODEL).write_bytes(b"damaged")
    assert (saver.restore(), saver.learner.step) == (1, 4)
    assert saver.checkpoints.entries()[-1] == Entry(4, 1)
    assert not newest.exists()
    for entry in saver.checkpoints.entries():
        (Path(saver.checkpoints.location(entry)) / MODEL).write_bytes(b"damaged")
    before = saver.checkpoints.entries()
    with pytest.raises(DamagedError, match="is not as it was written"):
        new_saver(savers, tmp_path).restore()
    assert saver.checkpoints.entries() == before


def test_a_storage_that_fails_while_a_run_continues_costs_no_checkpoint(
    savers: list[Checkpointing], tmp_path: Path
) -> None:
    """Else the newest checkpoint, perhaps the best, is taken for damaged, and deleted."""
    run(new_saver(savers, tmp_path, "train.checkpoint_every_s=0"))
    saver = new_saver(savers, tmp_path)
    newest = Path(saver.checkpoints.location(saver.checkpoints.entries()[-1]), MODEL)
    kept = tmp_path / "kept"
    newest.rename(kept)
    newest.mkdir()  # can be neither read nor called missing

    def mend() -> None:
        threading.Event().wait(0.5)
        newest.rmdir()
        kept.rename(newest)

    mending = threading.Thread(target=mend)
    mending.start()
    before = saver.checkpoints.entries()
    assert saver.restore() == 2
    mending.join()
    assert saver.learner.step == STEPS
    assert saver.checkpoints.entries() == before
