"""The folder of checkpoints: what is kept, what is taken for whole, and a storage that does not take more."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gare.errors import CheckpointError
from gare.model.gare import GARE
from gare.storage.patience import is_lasting
from gare.train.checkpoint.files import MODEL, capture, load_checkpoint, restore_learner
from gare.train.checkpoint.history import History
from gare.train.checkpoint.index import INDEX, Checkpoints, CheckpointWriter, Entry
from gare.train.step import Learner, build_learner
from tests.helpers.tiny import tiny_config
from tests.helpers.waiting import wait_until

SCORE = "val/t2v/R1"


@pytest.fixture
def learner() -> Learner:
    config = tiny_config()
    return build_learner(GARE(config.model), config, 10, torch.device("cpu"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write(checkpoints: Checkpoints, learner: Learner, entry: Entry, folder: Path) -> CheckpointWriter:
    learner.step = entry.step
    writer = CheckpointWriter(checkpoints, patience_s=60)
    writer.write(capture(learner, entry.epoch), entry, History(str(folder / "history.json")))
    writer.wait()
    return writer


def test_the_last_and_the_best_are_kept(tmp_path: Path, learner: Learner, rng: np.random.Generator) -> None:
    """Checkpoints within epochs must never push out the model that the whole run was for."""
    folder = tmp_path / "checkpoints"
    keep = int(rng.integers(1, 4))
    checkpoints = Checkpoints(str(folder), keep=keep, score=SCORE)
    entries: list[Entry] = []
    for step in range(1, 13):
        scored = {SCORE: float(rng.integers(0, 4))} if step % 3 == 0 else {}
        entries.append(Entry(step, step // 3, scored))
        write(checkpoints, learner, entries[-1], tmp_path)
        scores = [entry.metrics[SCORE] for entry in entries if entry.metrics]
        best = next(
            (entry for entry in entries if entry.metrics and entry.metrics[SCORE] == max(scores)), None
        )
        expected = {*entries[-keep:]} if best is None else {*entries[-keep:], best}
        assert checkpoints.best() == best
        assert set(checkpoints.entries()) == expected
        assert names(folder) == {entry.name for entry in expected} | {INDEX}
    kept = checkpoints.entries()[-1]
    assert restore_learner(checkpoints.location(kept), learner) == kept.epoch


def test_without_val_the_last_is_the_best(tmp_path: Path, learner: Learner) -> None:
    """A run on all of the data has nothing to choose by."""
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    assert checkpoints.best() is None
    for step in range(1, 5):
        write(checkpoints, learner, Entry(step, 0), tmp_path)
    assert [entry.step for entry in checkpoints.entries()] == [3, 4]
    assert checkpoints.best() == Entry(4, 0)


def test_every_checkpoint_is_kept_where_all_are_asked_for(
    tmp_path: Path, learner: Learner, rng: np.random.Generator
) -> None:
    """A curve over the training with gaps in it shows less than was paid for."""
    checkpoints = Checkpoints(str(tmp_path / "c"), keep=None, score=SCORE)
    entries = [Entry(step, step, {SCORE: float(rng.integers(0, 4))}) for step in range(1, 8)]
    for entry in entries:
        write(checkpoints, learner, entry, tmp_path)
    assert checkpoints.entries() == entries
    assert checkpoints.best() == max(entries, key=lambda entry: entry.metrics[SCORE])
    assert names(tmp_path / "c") == {entry.name for entry in entries} | {INDEX}


def test_what_was_not_finished_does_not_count(tmp_path: Path, learner: Learner) -> None:
    """A worker killed while it writes leaves half a checkpoint, which nobody may continue from."""
    checkpoints = Checkpoints(str(tmp_path / "c"), keep=5)
    for step in (2, 4, 6):
        write(checkpoints, learner, Entry(step, 0), tmp_path)
    half = tmp_path / "c" / Entry(8, 0).name
    half.mkdir()
    (half / MODEL).write_bytes(b"half")
    assert [entry.step for entry in checkpoints.entries()] == [2, 4, 6]
    checkpoints.remove_after(Entry(4, 0))
    assert [entry.step for entry in checkpoints.entries()] == [2, 4]
    assert names(tmp_path / "c") == {Entry(2, 0).name, Entry(4, 0).name, INDEX}
    (tmp_path / "c" / INDEX).write_bytes(b"[{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.entries()


def test_a_checkpoint_is_of_the_moment_when_it_was_taken(tmp_path: Path, learner: Learner) -> None:
    """Training goes on while it is written; half old and half new weights would be no model at all."""
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    captured = capture(learner, 0)
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.add_(1)
    history = History(str(tmp_path / "history.json"))
    history.add_step(1, {"loss/total": 1.0})
    held = history.copy()
    history.add_step(2, {"loss/total": 2.0})
    writer = CheckpointWriter(Checkpoints(str(tmp_path / "c")))
    writer.write(captured, Entry(1, 0), held)
    writer.wait()
    assert writer.fault is None
    model = load_checkpoint(tmp_path / "c" / Entry(1, 0).name)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert History.read(held.uri).steps == {"loss/total": [(1, 1.0)]}


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """Sets the size that files of this process may have; a larger one fails as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_storage_without_room_is_said_and_harms_nothing(
    tmp_path: Path, learner: Learner, limit: Callable[[int], None]
) -> None:
    """A full disk must cost the steps since the last checkpoint, not the run."""
    checkpoints = Checkpoints(str(tmp_path / "c"), keep=1)
    first = Entry(3, 1)
    assert write(checkpoints, learner, first, tmp_path).fault is None
    model_bytes = (tmp_path / "c" / first.name / MODEL).stat().st_size
    limit(model_bytes // 2)
    fault = write(checkpoints, learner, Entry(5, 1), tmp_path).fault
    limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert fault is not None
    assert fault.exit_code == 4
    assert os.strerror(errno.EFBIG) in str(fault)
    assert "step 5" in str(fault)
    assert "continues from step 3" in str(fault)
    assert str(tmp_path / "c" / Entry(5, 1).name) in str(fault)
    assert checkpoints.entries() == [first]
    assert names(tmp_path / "c") == {first.name, INDEX}
    assert restore_learner(checkpoints.location(first), learner) == 1
    assert write(checkpoints, learner, Entry(5, 1), tmp_path).fault is None
    assert checkpoints.entries() == [Entry(5, 1)]


def test_a_storage_that_fails_for_a_while_is_tried_again(tmp_path: Path, learner: Learner) -> None:
    """An object store that answers 503 for a minute must not end a run of days."""
    # A link to nowhere fails as no disk that is full, and no folder without permission, does.
    folder = tmp_path / "c"
    folder.symlink_to(tmp_path / "not yet" / "there")
    writer = CheckpointWriter(Checkpoints(str(folder)), patience_s=60)
    writer.write(capture(learner, 0), Entry(1, 0), History(str(tmp_path / "history.json")))
    wait_until((tmp_path / "history.json").exists, within_s=60, every_s=0.01)
    assert writer.busy
    (tmp_path / "not yet" / "there").mkdir(parents=True)
    writer.wait()
    assert writer.fault is None
    assert Checkpoints(str(folder)).entries() == [Entry(1, 0)]


def test_which_faults_last() -> None:
    """Waiting ten minutes for a full disk wastes them; giving up at a lost connection wastes the night."""
    outer = CheckpointError("cannot be written")
    outer.__cause__ = OSError(errno.ENOSPC, "full")
    assert is_lasting(outer)
    assert not is_lasting(OSError("AWS Error SLOW_DOWN"))
    assert not is_lasting(ConnectionResetError(errno.ECONNRESET, "lost"))


def test_an_index_that_cannot_be_read_for_a_while_is_tried_again(tmp_path: Path, learner: Learner) -> None:
    """The storage fails at any of the writer's requests, the reading of what there is among them."""
    folder = tmp_path / "c"
    (folder / INDEX).mkdir(parents=True)
    writer = CheckpointWriter(Checkpoints(str(folder)), patience_s=60)
    writer.write(capture(learner, 0), Entry(1, 0), History(str(tmp_path / "history.json")))
    wait_until((folder / Entry(1, 0).name / MODEL).exists, within_s=60, every_s=0.01)
    assert writer.busy
    (folder / INDEX).rmdir()
    writer.wait()
    assert writer.fault is None
    assert Checkpoints(str(folder)).entries() == [Entry(1, 0)]


def test_half_a_file_of_a_killed_writer_does_not_stay(tmp_path: Path, learner: Learner) -> None:
    """Each is as large as a model, and its folder's name need not come again."""
    checkpoints = Checkpoints(str(tmp_path / "c"))
    write(checkpoints, learner, Entry(1, 0), tmp_path)
    half = tmp_path / "c" / Entry(2, 0).name / ".gare-0123456789abcdef.tmp"
    half.parent.mkdir()
    half.write_bytes(b"half")
    checkpoints.remove_after(Entry(1, 0))
    assert not half.exists()
    assert checkpoints.entries() == [Entry(1, 0)]


def test_a_measure_without_a_value_has_no_point(tmp_path: Path) -> None:
    """A mean over no pairs must not end a run that is otherwise well: JSON knows no NaN."""
    history = History(str(tmp_path / "history.json"))
    history.add_step(1, {"loss/total": 1.0, "tension/negative": float("nan")})
    history.save()
    assert History.read(history.uri).steps == {"loss/total": [(1, 1.0)]}
