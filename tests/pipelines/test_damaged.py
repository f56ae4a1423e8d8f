"""Damaged checkpoints as the steps meet them, without a cluster: what is taken, said and made again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.layout import Layout, layout
from gare import load_checkpoint
from gare.data.manifest import ManifestRow
from gare.errors import DamagedError
from gare.model.gare import GARE
from gare.retrieval.gallery import FILE
from gare.storage.run_folder import RunFolder
from gare.train.checkpoint.files import CONFIG, MODEL, TRAINER, check_checkpoint
from gare.train.checkpoint.index import Entry
from gare.train.checkpoint.sums import SUMS
from gare.train.input.inputs import TrainInput, input_of
from gare.train.step import build_learner
from pipelines.evaluating import registration
from pipelines.evaluating.subject import checkpoint_subject
from pipelines.sizes import sizes_for_evaluation
from pipelines.training.best import copy_best, mend_best
from pipelines.training.checkpointing import SELECTION, Checkpointing
from tests.helpers.tiny import tiny_config

EPOCHS = 4


def flip(file: Path, rng: np.random.Generator) -> None:
    """Changes one bit."""
    content = bytearray(file.read_bytes())
    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    file.write_bytes(content)


class Run:
    """A run of ``EPOCHS`` epochs of one step each, the second of which is the best on val, the third next."""

    def __init__(self, folder: Path) -> None:
        self.config = tiny_config(f"storage.root={folder}", "train.keep_checkpoints=20")
        self.places: Layout = layout(self.config)
        self.best = Path(self.places.checkpoint(self.config.train.run))
        self.source: TrainInput = input_of(self.config, self.places.frames, self.places.features)
        saver = self.saver()
        for epoch in range(1, EPOCHS + 1):
            saver.learner.step = epoch
            with torch.no_grad():
                saver.learner.model.temporal.positions.weight.fill_(epoch)
            saver.on_epoch(epoch, {SELECTION: 10.0 - abs(epoch - 2.2)})
            saver.writer.wait()
        self.checkpoints = saver.checkpoints

    def saver(self) -> Checkpointing:
        cpu, folder = torch.device("cpu"), RunFolder(self.places.run(self.config.train.run))
        learner = build_learner(GARE(self.config.model), self.config, EPOCHS, cpu)
        saver = Checkpointing(learner, folder, 0, cpu, validated=True, watch=False)
        saver.over.set()
        return saver

    def file(self, epoch: int, name: str) -> Path:
        return Path(self.checkpoints.location(Entry(epoch, epoch)), name)

    def epoch_of(self, folder: Path) -> int:
        """The epoch whose weights a folder has."""
        return int(load_checkpoint(folder).temporal.positions.weight[0, 0])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.mark.parametrize("name", [CONFIG, MODEL, TRAINER, SUMS])
def test_training_goes_on_from_the_one_before(
    run: Run, name: str, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    """Training on from weights with a changed bit spoils days of work, and says nothing."""
    flip(run.file(4, name), rng)
    saver = run.saver()
    with caplog.at_level(logging.WARNING):
        assert (saver.restore(), saver.learner.step) == (3, 3)
    assert f"skipping a damaged checkpoint: {run.file(4, name)}: is not as it was written" in caplog.text
    assert [entry.step for entry in saver.checkpoints.entries()] == [1, 2, 3]


@pytest.mark.parametrize("name", [CONFIG, MODEL, TRAINER, SUMS])
def test_the_best_that_is_damaged_is_left_out(
    run: Run, name: str, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    """The result would be that of another model than the one in ``best``."""
    flip(run.file(2, name), rng)
    with caplog.at_level(logging.WARNING):
        chosen = copy_best(run.checkpoints, str(run.best), run.source)
    assert (chosen.epoch, run.epoch_of(run.best)) == (3, 3)
    assert f"skipping a damaged checkpoint: {run.file(2, name)}" in caplog.text
    assert run.checkpoints.best() == chosen
    for epoch in (1, 3, 4):
        flip(run.file(epoch, MODEL), rng)
    with pytest.raises(DamagedError, match="is not as it was written"):
        copy_best(run.checkpoints, str(run.best), run.source)
    assert len(run.checkpoints.entries()) == 3


def test_best_is_made_again(run: Run, rng: np.random.Generator, caplog: pytest.LogCaptureFixture) -> None:
    """A person whose ``best`` is damaged has a run that is whole all the same."""
    result = {"best_epoch": copy_best(run.checkpoints, str(run.best), run.source).epoch}
    assert result["best_epoch"] == 2
    mend_best(run.checkpoints, str(run.best), run.source, result)
    assert not caplog.records
    for name in (CONFIG, MODEL, TRAINER, SUMS):
        flip(run.best / name, rng)
        mend_best(run.checkpoints, str(run.best), run.source, result)
        check_checkpoint(str(run.best))
        assert run.epoch_of(run.best) == 2
        assert str(run.best / name) in caplog.records[-1].getMessage()
    (run.best / MODEL).unlink()
    mend_best(run.checkpoints, str(run.best), run.source, result)
    assert run.epoch_of(run.best) == 2

    flip(run.best / TRAINER, rng)
    flip(run.file(2, MODEL), rng)
    with pytest.raises(DamagedError, match=r"train\.overwrite=true") as caught:
        mend_best(run.checkpoints, str(run.best), run.source, result)
    assert str(run.best / TRAINER) in str(caught.value)
    assert str(run.file(2, MODEL)) in str(caught.value)
    assert run.epoch_of(run.best) == 2, "what can still be evaluated was taken away"
    run.checkpoints.remove_from_index(Entry(2, 2))
    with pytest.raises(DamagedError, match="the checkpoint that it was copied from is not kept"):
        mend_best(run.checkpoints, str(run.best), run.source, result)


@pytest.mark.parametrize("name", [CONFIG, MODEL, SUMS])
def test_evaluation_of_a_damaged_checkpoint_says_what_to_do(
    run: Run, name: str, rng: np.random.Generator
) -> None:
    """A score of a model with a changed bit would be reported as that of the run."""
    copy_best(run.checkpoints, str(run.best), run.source)
    assert checkpoint_subject(run.config, run.places).model.config == run.config.model
    flip(run.best / name, rng)
    with pytest.raises(DamagedError, match="train command makes best/ again") as caught:
        checkpoint_subject(run.config, run.places)
    assert caught.value.where == str(run.best / name)
    if name != MODEL:
        with pytest.raises(DamagedError, match="train command makes best/ again"):
            sizes_for_evaluation(run.config)
    flip(run.file(1, name), rng)
    evaluate = run.config.evaluate.model_copy(update={"checkpoint": str(run.file(1, name).parent)})
    with pytest.raises(DamagedError, match=SUMS) as caught:
        checkpoint_subject(run.config.model_copy(update={"evaluate": evaluate}), run.places)
    assert "best/" not in str(caught.value)


class Registry:
    """Keeps what would be uploaded, in place of MLflow."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def versions(self, name: str) -> list[str]:
        return []

    def log_model(self, folder: str, code: Path, **about: Any) -> str:
        self.folder.mkdir()
        for file in Path(folder).iterdir():
            (self.folder / file.name).write_bytes(file.read_bytes())
        return ""


def test_a_served_model_is_compared(run: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    """What is served has travelled the furthest, and answers for years."""
    from pipelines.evaluating.served_model import (
        load,  # it says at once that it is a model, which takes MLflow
    )

    copy_best(run.checkpoints, str(run.best), run.source)
    record = Path(run.places.run(run.config.train.run), "result.json")
    record.write_text("{}")
    rows = [ManifestRow(f"v{number}", "/x.mp4", None, None, "test", ("a",)) for number in range(3)]
    features = {
        "video/frames": rng.standard_normal((3, 4, run.config.model.clip.embed_dim), dtype=np.float32),
        "video/mask": np.ones((3, 4), bool),
    }
    packed = tmp_path / "packed"
    arguments: Any = (run.config, run.places, Registry(packed), rows, [], features)
    registration.write_and_register(*arguments)
    assert sorted(file.name for file in packed.iterdir()) == sorted((CONFIG, FILE, MODEL, SUMS))
    model, gallery = load(str(packed))
    assert gallery.video_ids == ("v0", "v1", "v2")
    assert model.config == run.config.model
    for name in (CONFIG, FILE, MODEL, SUMS):
        whole = (packed / name).read_bytes()
        for _ in range(4):
            flip(packed / name, rng)
            with pytest.raises(DamagedError, match=name.replace(".", r"\.")):
                load(str(packed))
            (packed / name).write_bytes(whole)
    flip(run.best / MODEL, rng)
    with pytest.raises(DamagedError, match=MODEL):
        registration.write_and_register(*arguments)
