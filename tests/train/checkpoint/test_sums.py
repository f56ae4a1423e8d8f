"""A flipped bit, a lost file, a killed writer: all that a checkpoint's SHA-256 are there to find."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gare.errors import CheckpointError, DamagedError
from gare.model.gare import GARE
from gare.train.checkpoint import files as state
from gare.train.checkpoint import sums
from gare.train.checkpoint.files import (
    CONFIG,
    MODEL,
    TRAINER,
    capture,
    check_checkpoint,
    copy_checkpoint,
    load_checkpoint,
    restore_learner,
    save_checkpoint,
    write_model,
)
from gare.train.checkpoint.history import History
from gare.train.checkpoint.index import INDEX, Checkpoints, CheckpointWriter, Entry
from gare.train.checkpoint.initial_model import initial_model, read_initial_model
from gare.train.checkpoint.sums import SUMS
from gare.train.curve import CheckpointScorer
from gare.train.step import Learner, build_learner
from tests.helpers.tiny import tiny_config

FLIPS = 24
SCORE = "val/t2v/R1"


def new_learner() -> Learner:
    config = tiny_config()
    return build_learner(GARE(config.model), config, 10, torch.device("cpu"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "check point 100%#1"
    save_checkpoint(str(folder), new_learner(), epoch=1)
    return folder


def flipped(content: bytes, rng: np.random.Generator) -> bytes:
    """The content with one bit of another value."""
    changed = bytearray(content)
    changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def restore(folder: Path) -> None:
    restore_learner(str(folder), new_learner())


def start_from(folder: Path) -> None:
    initial_model(tiny_config(f"train.clip_weights={folder}"))


def score(folder: Path) -> None:
    fault = CheckpointScorer("", [], from_features=False).score(str(folder)).fault
    if fault:
        raise DamagedError(fault)


def copy(folder: Path) -> None:
    copy_checkpoint(str(folder), str(folder.parent / "copy"))


READ_BY_MODEL = (CONFIG, MODEL, SUMS)
READ_BY_ALL = (*READ_BY_MODEL, TRAINER)


@pytest.mark.parametrize(
    ("read", "names"),
    [
        (restore, READ_BY_ALL),
        (copy, READ_BY_ALL),
        (lambda folder: check_checkpoint(str(folder)), READ_BY_ALL),
        (load_checkpoint, READ_BY_MODEL),
        (start_from, READ_BY_MODEL),
        (score, READ_BY_MODEL),
    ],
    ids=["train", "copy", "check", "evaluate", "weights", "curve"],
)
def test_any_flipped_bit_is_found(
    saved: Path, rng: np.random.Generator, read: Callable[[Path], object], names: tuple[str, ...]
) -> None:
    """Weights with a changed bit score as if they were the trained ones, and nobody ever knows."""
    for _ in range(FLIPS):
        file = saved / str(rng.choice(names))
        whole = file.read_bytes()
        file.write_bytes(flipped(whole, rng))
        with pytest.raises(DamagedError, match="is not as it was written") as caught:
            read(saved)
        assert str(file) in str(caught.value)
        file.write_bytes(whole)
    if read is not score:  # which would go on to the clips, of which there are none here
        read(saved)


def test_the_initial_model_of_a_run_on_features_is_compared(tmp_path: Path, rng: np.random.Generator) -> None:
    """All workers start from it: a changed bit would be in everything that they learn."""
    model, uri = GARE(tiny_config().model, towers=False), tmp_path / "start"
    for _ in range(2):
        write_model(str(uri), model)
    assert sorted(path.name for path in uri.iterdir()) == [MODEL, SUMS]
    read_initial_model(str(uri), tiny_config().model)
    (uri / MODEL).write_bytes(flipped((uri / MODEL).read_bytes(), rng))
    with pytest.raises(DamagedError, match=MODEL):
        read_initial_model(str(uri), tiny_config().model)


def test_flipped_bits_on_s3(s3: Any, rng: np.random.Generator) -> None:
    """An object store hands out what it holds, as a disk does."""
    uri = "s3://videos/runs/a run/checkpoint"
    save_checkpoint(uri, new_learner(), epoch=1)
    check_checkpoint(uri)
    for name in READ_BY_ALL:
        key = f"runs/a run/checkpoint/{name}"
        whole = s3.get_object(Bucket="videos", Key=key)["Body"].read()
        s3.put_object(Bucket="videos", Key=key, Body=flipped(whole, rng))
        with pytest.raises(DamagedError, match="is not as it was written") as caught:
            restore_learner(uri, new_learner())
        assert name in str(caught.value)
        s3.put_object(Bucket="videos", Key=key, Body=whole)
    copy_checkpoint(uri, "s3://videos/best")
    assert restore_learner("s3://videos/best", new_learner()) == 1
    s3.delete_object(Bucket="videos", Key=f"best/{TRAINER}")
    with pytest.raises(DamagedError, match="lists it, and it is missing"):
        load_checkpoint("s3://videos/best")


@pytest.mark.parametrize("name", [CONFIG, MODEL, TRAINER])
def test_a_file_that_is_lost_is_named(saved: Path, name: str) -> None:
    """A repaired file system may lose one, under its name or under another."""
    (saved / name).rename(saved / f"{name}x")
    with pytest.raises(DamagedError, match="lists it, and it is missing") as caught:
        load_checkpoint(saved)
    assert str(saved / name) in str(caught.value)


def test_a_file_of_another_is_named(saved: Path) -> None:
    """What nobody wrote there may be what is missing elsewhere; a file system's own files are not meant."""
    (saved / ".nfs0001").write_bytes(b"")
    load_checkpoint(saved)
    (saved / "model-2.safetensors").write_bytes(b"")
    with pytest.raises(DamagedError, match=f"is not listed in {SUMS}") as caught:
        load_checkpoint(saved)
    assert "model-2.safetensors" in str(caught.value)


def test_sums_that_are_lost_are_missed_by_the_index(saved: Path) -> None:
    """Else the loss of one small file would turn off the comparison."""
    listed = json.loads((saved / SUMS).read_bytes())["sha256"]
    restore_learner(str(saved), new_learner(), sums=listed)
    with pytest.raises(DamagedError, match="other SHA-256 than the index"):
        restore_learner(str(saved), new_learner(), sums={**listed, CONFIG: listed[MODEL]})
    (saved / SUMS).unlink()
    with pytest.raises(DamagedError, match="is missing"):
        restore_learner(str(saved), new_learner(), sums=listed)


def test_a_checkpoint_of_an_earlier_version_is_read_with_one_note(
    saved: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It must go on, and a person must know that nothing was compared."""
    monkeypatch.setattr(sums, "noted_folders", set())
    (saved / SUMS).unlink()
    with caplog.at_level(logging.WARNING):
        load_checkpoint(saved)
        restore(saved)
        copy(saved)
    assert [record.message for record in caplog.records if SUMS in record.message] == [
        f"{saved} has no {SUMS}, as an earlier version wrote it: a changed bit in its files would not be seen"
    ]
    check_checkpoint(str(tmp_path / "copy"))
    assert (tmp_path / "copy" / SUMS).exists()


def test_a_bit_lost_on_the_way_costs_no_checkpoint(
    saved: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is good, and is read again before it is given up with the steps since the one before."""
    read, lost = sums.read_bytes, [MODEL, TRAINER]

    def unreliable(uri: str) -> bytes:
        content, name = read(uri), uri.rsplit("/", 1)[-1]
        if name not in lost:
            return content
        lost.remove(name)
        return flipped(content, rng)

    monkeypatch.setattr(sums, "read_bytes", unreliable)
    restore(saved)
    assert not lost


class _KilledError(Exception):
    """Ends a writer where a kill would."""


def killed_after(num_changes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has files be written and deleted so many times, and no more."""
    left = [num_changes]

    def limited(change: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            if not left[0]:
                raise _KilledError
            left[0] -= 1
            change(*arguments)

        return call

    for module, name in ((state, "write_atomically"), (sums, "write_atomically"), (sums, "delete_file")):
        monkeypatch.setattr(module, name, limited(getattr(module, name)))


@pytest.mark.parametrize("damaged", [False, True])
def test_a_copy_that_is_killed_is_no_checkpoint_until_it_is_whole(
    saved: Path, tmp_path: Path, rng: np.random.Generator, damaged: bool
) -> None:
    """``best`` must be the one checkpoint or be refused, and the same copy must mend it."""
    target, other = tmp_path / "best", tmp_path / "other"
    save_checkpoint(str(other), new_learner(), epoch=2)
    for num_changes in range(100):
        shutil.rmtree(target, ignore_errors=True)
        copy_checkpoint(str(other), str(target))
        if damaged:
            (target / MODEL).write_bytes(flipped((target / MODEL).read_bytes(), rng))
        with pytest.MonkeyPatch.context() as patch:
            killed_after(num_changes, patch)
            try:
                copy_checkpoint(str(saved), str(target))
            except _KilledError:
                done = False
            else:
                done = True
        if done:
            break
        if num_changes:
            with pytest.raises(DamagedError):
                check_checkpoint(str(target))
            with pytest.raises(CheckpointError):
                load_checkpoint(target)
        copy_checkpoint(str(saved), str(target))
        assert restore_learner(str(target), new_learner()) == 1
    assert 6 <= num_changes < 20
    check_checkpoint(str(target))


def test_a_writer_that_is_killed_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that has its model is whole: readers of folders know of no index."""
    learner = new_learner()
    for num_changes in range(4):
        folder = tmp_path / str(num_changes)
        with pytest.MonkeyPatch.context() as patch:
            killed_after(num_changes, patch)
            with pytest.raises(_KilledError):
                save_checkpoint(str(folder), learner, 1)
        assert not (folder / MODEL).exists()
        with pytest.raises(CheckpointError):
            load_checkpoint(folder)
        save_checkpoint(str(folder), learner, 1)
        restore(folder)


@pytest.fixture
def indexed(tmp_path: Path) -> Checkpoints:
    """The checkpoints of a run, each with its score."""
    checkpoints, learner = Checkpoints(str(tmp_path / "c"), keep=None, score=SCORE), new_learner()
    history = History(str(tmp_path / "history.json"))
    for step in range(1, 5):
        learner.step = step
        writer = CheckpointWriter(checkpoints)
        writer.write(capture(learner, step), Entry(step, step, {SCORE: 12.5 * (step % 3)}), history)
        writer.wait()
        assert writer.fault is None
    return checkpoints


def test_the_index_has_the_sha256_of_each_file(indexed: Checkpoints, rng: np.random.Generator) -> None:
    """It says what belongs together, also where files of two checkpoints were exchanged."""
    for entry in indexed.entries():
        folder = Path(indexed.location(entry))
        assert entry.sha256 == {
            name: sums.sha256_of((folder / name).read_bytes()) for name in (CONFIG, MODEL, TRAINER)
        }
        learner = new_learner()
        assert restore_learner(str(folder), learner, sums=entry.sha256) == entry.epoch == learner.step


def test_a_flipped_bit_of_the_index_changes_no_checkpoint(
    indexed: Checkpoints, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    """A changed score would choose another model, and a changed step would continue from another."""
    file, entries = Path(indexed.uri, INDEX), indexed.entries()
    whole = file.read_bytes()
    told = {(entry.step, entry.epoch, entry.metrics[SCORE]) for entry in entries}
    for _ in range(10 * FLIPS):
        file.write_bytes(flipped(whole, rng))
        caplog.clear()
        try:
            found = indexed.entries()
        except CheckpointError as error:
            fault = str(error)
            found = []
        else:
            fault = ""
        assert found or INDEX in fault
        assert {(entry.step, entry.epoch, entry.metrics[SCORE]) for entry in found} <= told
        if 0 < len(found) < len(entries):
            assert "is not as it was written, skipping its checkpoint" in caplog.text


def test_a_damaged_row_is_forgotten_where_the_run_goes_on(indexed: Checkpoints) -> None:
    """Else each later look at the index would tell of it again."""
    file = Path(indexed.uri, INDEX)
    rows = json.loads(file.read_bytes())
    rows[2]["step"] = 7
    file.write_text(json.dumps(rows))
    kept = indexed.entries()
    assert [entry.step for entry in kept] == [1, 2, 4]
    indexed.remove_after(kept[-1])
    assert [row["step"] for row in json.loads(file.read_bytes())] == [1, 2, 4]
    assert not Path(indexed.uri, Entry(3, 3).name).exists()
    for row in rows:
        row["epoch"] = 9
    file.write_text(json.dumps(rows))
    with pytest.raises(CheckpointError, match="is not as it was written"):
        indexed.entries()


def test_an_index_of_an_earlier_version_is_continued(indexed: Checkpoints) -> None:
    """A run must not begin anew for having been begun by an earlier version."""
    file = Path(indexed.uri, INDEX)
    rows = [
        {key: row[key] for key in ("step", "epoch", "metrics")} for row in json.loads(file.read_bytes())[:3]
    ]
    file.write_text(json.dumps(rows))
    entries = indexed.entries()
    assert [(entry.step, dict(entry.sha256)) for entry in entries] == [(1, {}), (2, {}), (3, {})]
    Path(indexed.location(entries[1]), SUMS).unlink()
    learner = new_learner()
    assert restore_learner(indexed.location(entries[1]), learner, sums=entries[1].sha256) == 2
    writer = CheckpointWriter(indexed)
    writer.write(capture(learner, 4), Entry(4, 4, {SCORE: 1.0}), History(indexed.uri + "/../history.json"))
    writer.wait()
    assert [bool(entry.sha256) for entry in indexed.entries()] == [False, False, False, True]
