"""Checkpoints: a folder with ``model.safetensors``, ``config.yaml`` and ``trainer.pt``."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from gare.config import Config, parse_config
from gare.data.files import exists, join, read_bytes, write_atomically
from gare.errors import CheckpointError, ConfigError, DataError
from gare.model.clip import ClipTowers
from gare.model.gare import GARE
from gare.train.step import Learner

MODEL = "model.safetensors"
CONFIG = "config.yaml"
TRAINER = "trainer.pt"


@dataclass(frozen=True)
class Captured:
    """A checkpoint in memory, which training does not change any more.

    Attributes:
        tensors: of the model, on the CPU.
        config: of the run, as YAML.
        trainer: what training needs to go on.
    """

    tensors: Mapping[str, Tensor]
    config: str
    trainer: Mapping[str, Any]


def capture(learner: Learner, epoch: int) -> Captured:
    """Copies to the CPU's memory what a checkpoint holds.

    Args:
        learner: what to copy.
        epoch: epochs done. The batch that comes next follows from it and from the step (``Plan.position``).
    """
    trainer = {
        "optimizer": _copied(learner.optimizer.state_dict()),
        "schedule": {"num_steps": learner.num_steps},
        "random_state": torch.get_rng_state(),
        "step": learner.step,
        "epoch": epoch,
    }
    return Captured(_copied(learner.model.state_dict()), learner.config.to_yaml(), trainer)


def _copied(tree: Any) -> Any:
    """A tree of mappings, lists and tensors with every tensor copied."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(tree, Mapping):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list) else tree


def save_checkpoint(uri: str, learner: Learner, epoch: int) -> None:
    """Writes the model, the configuration and what training needs to go on.

    Args:
        uri: folder; ``model.safetensors`` comes last, so that a folder that has it is whole.
        learner: what to save.
        epoch: epochs done.
    """
    write_checkpoint(uri, capture(learner, epoch))


def write_checkpoint(uri: str, captured: Captured) -> None:
    """Writes what was captured, in the order of ``save_checkpoint``.

    Raises:
        DataError: where a file cannot be written.
    """
    write_atomically(join(uri, TRAINER), _packed(captured.trainer))
    write_atomically(join(uri, CONFIG), captured.config.encode())
    write_atomically(join(uri, MODEL), save_tensors(dict(captured.tensors)))


def _packed(trainer: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(trainer), buffer)
    return buffer.getvalue()


def load_checkpoint(uri: str | Path) -> GARE:
    """The model of a checkpoint, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: for a folder that is not a whole checkpoint, or tensors of another model.
    """
    config = read_config(str(uri))
    model = GARE(config.model)
    load_model(str(uri), model, features=config.train.input == "features")
    return model.eval()


def read_config(uri: str) -> Config:
    """The configuration of the run that wrote a checkpoint.

    Raises:
        CheckpointError: where it is missing or cannot be used.
    """
    location = join(uri, CONFIG)
    if not exists(location):
        raise CheckpointError(
            "is not a checkpoint", where=uri, accepted=f"a folder with {MODEL}, {CONFIG} and {TRAINER}"
        )
    try:
        return parse_config(yaml.safe_load(read_bytes(location)), where=location)
    except (ConfigError, DataError, yaml.YAMLError, ValueError) as error:
        raise CheckpointError(f"cannot be used: {error}", where=location) from error


def complete_checkpoint(uri: str, start: GARE) -> None:
    """Adds the towers that made the features to the checkpoint of a run that learned from them.

    Any reader of checkpoints can then use it, without the store or the weights that it came from.

    Args:
        uri: the checkpoint.
        start: the run's initial model, with its towers; it takes the checkpoint's tensors.

    Raises:
        CheckpointError: for a checkpoint of another model.
    """
    tensors = _read_model(uri)
    kept = {name: tensor for name, tensor in start.state_dict().items() if name.startswith("towers.")}
    _fill(join(uri, MODEL), kept | tensors, start)
    write_model(uri, start)


def write_model(uri: str, model: GARE) -> None:
    """Writes a model's tensors alone."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(join(uri, MODEL), save_tensors(tensors))


def load_model(uri: str, model: GARE, *, features: bool = False) -> None:
    """Fills a model with a checkpoint's tensors.

    Args:
        uri: the checkpoint.
        model: to fill.
        features: whether the run that wrote it learned from features, and its checkpoints may lack towers.

    Raises:
        CheckpointError: naming tensors that are missing, left over or of another shape.
    """
    tensors = _read_model(uri)
    if features and isinstance(model.towers, ClipTowers) and not _has_towers(tensors):
        raise CheckpointError(
            "has no towers: its run learned from features",
            where=uri,
            accepted="the run's folder best, whose checkpoint has them",
        )
    _fill(join(uri, MODEL), tensors, model)


def _has_towers(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("towers.") and not name.endswith("logit_scale") for name in tensors)


def _read_model(uri: str) -> dict[str, Tensor]:
    location = join(uri, MODEL)
    content = _content(location)
    try:
        tensors: dict[str, Tensor] = load_tensors(content)
    except Exception as error:  # safetensors has an exception of its own, not derived from ValueError
        raise CheckpointError(f"cannot be read: {error}", where=location) from error
    return tensors


def _content(location: str) -> bytes:
    """What a file of a checkpoint holds; one that is missing is the checkpoint's fault, not the storage's."""
    try:
        return read_bytes(location)
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise CheckpointError(f"cannot be read: {error}", where=location) from error
        raise


def _fill(location: str, tensors: Mapping[str, Tensor], model: GARE) -> None:
    ours = model.state_dict()
    faults = [f"{name} is missing" for name in sorted(ours.keys() - tensors.keys())]
    faults += [f"{name} is not of this model" for name in sorted(tensors.keys() - ours.keys())]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, the model has {tuple(ours[name].shape)}"
        for name in sorted(ours.keys() & tensors.keys())
        if tensors[name].shape != ours[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(
            f"is of another model: {'; '.join(faults[:5])}{more}",
            where=location,
            accepted="the model settings that it was trained with",
        )
    model.load_state_dict(tensors)


def restore_learner(uri: str, learner: Learner) -> int:
    """Continues from a checkpoint: model, optimiser, random state and step.

    Returns:
        Epochs done.

    Raises:
        CheckpointError: for a checkpoint of another model or another length of the run.
        DataError: where the storage does not answer.
    """
    load_model(uri, learner.model)
    location = join(uri, TRAINER)
    content = _content(location)
    try:
        trainer: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
        if trainer["schedule"]["num_steps"] != learner.num_steps:
            raise CheckpointError(
                f"belongs to a run of {trainer['schedule']['num_steps']} steps, this one has "
                f"{learner.num_steps}",
                where=location,
                accepted="the same data, batch and epochs, or another train.run",
            )
        learner.optimizer.load_state_dict(trainer["optimizer"])
        torch.set_rng_state(trainer["random_state"])
        learner.step = int(trainer["step"])
        return int(trainer["epoch"])
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"cannot be read: {error}", where=location) from error
