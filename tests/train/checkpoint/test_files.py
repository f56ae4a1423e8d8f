"""Checkpoints: what was saved comes back, and what is none is named."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gare.errors import CheckpointError
from gare.model.gare import GARE
from gare.train.checkpoint.files import (
    CONFIG,
    MODEL,
    TRAINER,
    load_checkpoint,
    read_config,
    restore_learner,
    save_checkpoint,
)
from gare.train.checkpoint.sums import SUMS
from gare.train.step import Learner, build_learner
from tests.helpers.tiny import tiny_config


def new_learner(*overrides: str, num_steps: int = 10) -> Learner:
    config = tiny_config(*overrides)
    return build_learner(GARE(config.model), config, num_steps, torch.device("cpu"))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Learner]:
    folder = tmp_path / "check point 100%#1"
    learner = new_learner()
    save_checkpoint(str(folder), learner, epoch=1)
    return folder, learner


def test_what_was_saved_comes_back(saved: tuple[Path, Learner]) -> None:
    """A trained model that cannot be loaded again is lost."""
    folder, learner = saved
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, MODEL, SUMS, TRAINER]
    model = load_checkpoint(folder)
    assert not model.training
    assert model.config == learner.config.model
    assert read_config(str(folder)) == learner.config
    for name, value in learner.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def _missing(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def _cut(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return cut


def _without(tensor: str) -> Callable[[Path], None]:
    def drop(folder: Path) -> None:
        tensors = load_file(folder / MODEL)
        del tensors[tensor]
        save_file(tensors, folder / MODEL)

    return drop


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_missing(CONFIG), "is not a checkpoint"),
        (_missing(MODEL), MODEL),
        (_cut(MODEL), MODEL),
        (_written(MODEL, b"garbage"), MODEL),
        (_written(MODEL, b""), MODEL),
        (_written(CONFIG, b"a: [b"), CONFIG),
        (_written(CONFIG, b"\xff\xfe\x00"), CONFIG),
        (_written(CONFIG, b"- a list"), CONFIG),
        (_written(CONFIG, b"name: 2024-99-99"), CONFIG),
        (_written(CONFIG, b"modle: {}"), "modle"),
        (_without("increment.layers.0.query.bias"), "increment.layers.0.query.bias is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named(
    saved: tuple[Path, Learner], damage: Callable[[Path], None], said: str
) -> None:
    """A person learns which file of which checkpoint is broken, not where PyTorch stumbled."""
    folder, _ = saved
    (folder / SUMS).unlink()  # as an earlier version wrote it, or a person who changed it
    damage(folder)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_checkpoint(folder)
    assert str(folder) in str(caught.value)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    """A mistyped folder is the most common fault."""
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.increment=false"], "increment.layers.0.key.bias is not of this model"),
        (["model.temporal_layers=3"], "temporal.blocks.layers.2.* is missing"),
        (["model.clip.vocab_size=65"], r"is \(64, 32\), the model has \(65, 32\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    saved: tuple[Path, Learner], overrides: list[str], said: str
) -> None:
    """Half a model would score, and score badly."""
    other = new_learner(*overrides)
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=said):
        restore_learner(str(saved[0]), other)
    for name, value in other.model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was changed all the same"


def test_another_length_of_the_run_is_refused(saved: tuple[Path, Learner]) -> None:
    """The schedule's rates would jump where the run continues."""
    with pytest.raises(CheckpointError, match="belongs to a run of 10 steps, this one has 20"):
        restore_learner(str(saved[0]), new_learner(num_steps=20))


@pytest.mark.parametrize("damage", [_missing(TRAINER), _cut(TRAINER), _written(TRAINER, b"garbage")])
def test_a_damaged_trainer_state_is_named(
    saved: tuple[Path, Learner], damage: Callable[[Path], None]
) -> None:
    """Continuing without the optimiser's state would be another training."""
    (saved[0] / SUMS).unlink()
    damage(saved[0])
    with pytest.raises(CheckpointError, match=TRAINER):
        restore_learner(str(saved[0]), new_learner())


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("dump", [torch.save, pickle.dump], ids=["torch", "pickle"])
def test_a_checkpoint_from_a_stranger_runs_no_code(
    saved: tuple[Path, Learner], tmp_path: Path, dump: Callable[[object, io.BytesIO], None]
) -> None:
    """Checkpoints are shared; loading one must not hand over the machine."""
    proof = tmp_path / "proof"
    buffer = io.BytesIO()
    dump({"schedule": {"num_steps": 10}, "bomb": _Bomb(str(proof))}, buffer)
    (saved[0] / SUMS).unlink()
    (saved[0] / TRAINER).write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match=TRAINER):
        restore_learner(str(saved[0]), new_learner())
    assert not proof.exists()
    _Bomb(str(proof)).__reduce__()[0](Path(proof))  # type: ignore[operator]
    assert proof.exists(), "the bomb is a dud, so this test showed nothing"
