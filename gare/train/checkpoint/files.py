"""Checkpoints: a folder with ``model.safetensors``, ``config.yaml``, ``trainer.pt`` and their SHA-256."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from gare.config import Config
from gare.config.run_settings import saved_config
from gare.errors import CheckpointError, ConfigError, DataError
from gare.model.encoders.clip import ClipTowers
from gare.model.gare import GARE
from gare.storage.files import exists, join, write_atomically
from gare.train.checkpoint.sums import SummedFolder, note_without_sums, sha256_of, write_sums
from gare.train.step import Learner

MODEL = "model.safetensors"
CONFIG = "config.yaml"
TRAINER = "trainer.pt"


@dataclass(frozen=True)
class CapturedState:
    """A checkpoint in memory, which training no longer changes.

    Attributes:
        tensors: of the model, on the CPU.
        config: of the run, as YAML.
        trainer: state that training needs to continue.
    """

    tensors: Mapping[str, Tensor]
    config: str
    trainer: Mapping[str, Any]


def capture(learner: Learner, epoch: int) -> CapturedState:
    """Copies the content of a checkpoint to the CPU's memory.

    Args:
        learner: to copy.
        epoch: epochs done. The batch that comes next follows from it and from the step (``Plan.position``).
    """
    trainer = {
        "optimizer": _copied(learner.optimizer.state_dict()),
        "schedule": {"num_steps": learner.num_steps},
        "random_state": torch.get_rng_state(),
        "step": learner.step,
        "epoch": epoch,
    }
    return CapturedState(_copied(learner.model.state_dict()), learner.config.to_yaml(), trainer)


def _copied(tree: Any) -> Any:
    """Copies a tree of mappings, lists and tensors, including every tensor."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(tree, Mapping):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list) else tree


def save_checkpoint(uri: str, learner: Learner, epoch: int) -> None:
    """Writes the model, the configuration and the state that training needs to continue.

    Args:
        uri: folder; ``model.safetensors`` is written last, so that a folder with it is complete.
        learner: to save.
        epoch: epochs done.
    """
    write_checkpoint(uri, capture(learner, epoch))


def write_checkpoint(uri: str, captured: CapturedState) -> dict[str, str]:
    """Writes a captured checkpoint, in the order of ``save_checkpoint``.

    Returns:
        SHA-256 by file name.

    Raises:
        DataError: where a file cannot be written.
    """
    sums = {
        TRAINER: _write(uri, TRAINER, _packed(captured.trainer)),
        CONFIG: _write(uri, CONFIG, captured.config.encode()),
    }
    return _write_model(uri, captured.tensors, sums)


def _write(uri: str, name: str, content: bytes) -> str:
    # In parallel to the writing, which waits for the disk.
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(sha256_of, content)
        write_atomically(join(uri, name), content)
        return digest.result()


def _write_model(uri: str, tensors: Mapping[str, Tensor], sums: Mapping[str, str]) -> dict[str, str]:
    """Writes the model after the SHA-256 of all files, and returns them."""
    content = save_tensors(dict(tensors))
    sums = {**sums, MODEL: sha256_of(content)}
    write_sums(uri, sums)
    write_atomically(join(uri, MODEL), content)
    return sums


def _packed(trainer: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(trainer), buffer)
    return buffer.getvalue()


def load_checkpoint(uri: str | Path, *, sums: Mapping[str, str] | None = None, quiet: bool = False) -> GARE:
    """Loads the model of a checkpoint, in evaluation mode, on the CPU.

    The files that it reads, ``model.safetensors`` and ``config.yaml``, are compared with their SHA-256.

    Args:
        uri: the folder.
        sums: SHA-256 that the checkpoint must have, from the index of its run.
        quiet: True if another process logs that a checkpoint of an earlier version has no sums.

    Raises:
        CheckpointError: for a folder that is not a complete checkpoint, or tensors of another model.
        DamagedError: for one with a file that is not as it was written.
    """
    folder = SummedFolder(str(uri), expected=sums)
    config = _config_of(folder)
    model = new_model(config)
    if not quiet:
        note_without_sums(folder)
    _load_model(folder, model, features=config.train.input == "features")
    return model.eval()


def new_model(config: Config) -> GARE:
    """Builds a new model, without towers if it learns from imported features."""
    model = GARE(config.model, towers=config.has_towers)
    if not config.has_towers:
        model.drop_towers(imported=True)
    return model


def read_config(uri: str) -> Config:
    """Reads the configuration of the run that wrote a checkpoint.

    Raises:
        CheckpointError: if it is missing or cannot be used.
    """
    return _config_of(SummedFolder(uri))


def _config_of(folder: SummedFolder) -> Config:
    uri, location = folder.uri, join(folder.uri, CONFIG)
    if not exists(location):
        raise CheckpointError(
            "is not a checkpoint", where=uri, accepted=f"a folder with {MODEL}, {CONFIG} and {TRAINER}"
        )
    try:
        return saved_config(yaml.safe_load(folder.read(CONFIG)), where=location)
    except (ConfigError, DataError, yaml.YAMLError, ValueError) as error:
        raise CheckpointError(f"cannot be used: {error}", where=location) from error


def write_model(uri: str, model: GARE) -> None:
    """Writes a model's tensors alone, with their SHA-256."""
    _write_model(uri, {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, {})


def copy_checkpoint(
    source: str,
    target: str,
    *,
    sums: Mapping[str, str] | None = None,
    start: GARE | None = None,
    leave_out: Sequence[str] = (),
) -> None:
    """Copies a checkpoint; each file is compared with its SHA-256 when it is read.

    Args:
        source: the checkpoint.
        target: folder; its content is deleted first, and ``model.safetensors`` is written last.
        sums: SHA-256 that the checkpoint must have, from the index of its run.
        start: initial model of a run that learned from features; the copy gets its towers, so that any reader
            can use it without the store or the original weights.
        leave_out: names of files not to copy.

    Raises:
        CheckpointError: for a folder that is not a complete checkpoint, or one of another model than
            ``start``.
        DamagedError: for one with a file that is not as it was written; the copy is then not complete.
        DataError: where a file cannot be read or written.
    """
    folder = SummedFolder(source, expected=sums)
    note_without_sums(folder)
    location = join(source, MODEL)

    def with_towers(content: bytes) -> bytes:
        assert start is not None
        tensors, own = _tensors_in(content, location), start.state_dict()
        tensors = {name: one for name, one in own.items() if name.startswith("towers.")} | tensors
        _require_fit(location, tensors, own)
        return bytes(save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}))

    folder.copy(target, last=MODEL, change=with_towers if start else None, leave_out=leave_out)


def check_checkpoint(uri: str) -> None:
    """Compares all files of a checkpoint with their SHA-256; one without sums passes.

    Raises:
        CheckpointError: for a file that is missing.
        DamagedError: for a file that is not as it was written.
    """
    SummedFolder(uri).check()


def load_model(uri: str, model: GARE, *, sums: Mapping[str, str] | None = None) -> None:
    """Fills a model with a checkpoint's tensors.

    Args:
        uri: the checkpoint.
        model: to fill.
        sums: SHA-256 that the checkpoint must have, from the index of its run.

    Raises:
        CheckpointError: naming tensors that are missing, left over or of another shape.
        DamagedError: for one with a file that is not as it was written.
    """
    _load_model(SummedFolder(uri, expected=sums), model)


def _load_model(folder: SummedFolder, model: GARE, *, features: bool = False) -> None:
    """Loads as ``load_model`` does; a run that learned from ``features`` may lack towers."""
    tensors = _read_model(folder)
    if features and isinstance(model.towers, ClipTowers) and not _has_towers(tensors):
        raise CheckpointError(
            "has no towers: its run learned from features",
            where=folder.uri,
            accepted="the run's folder best, whose checkpoint has them",
        )
    _require_fit(join(folder.uri, MODEL), tensors, model.state_dict())
    model.load_state_dict(tensors)


def _has_towers(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("towers.") and not name.endswith("logit_scale") for name in tensors)


def _read_model(folder: SummedFolder) -> dict[str, Tensor]:
    return _tensors_in(folder.read(MODEL), join(folder.uri, MODEL))


def _tensors_in(content: bytes, location: str) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_tensors(content)
    except Exception as error:  # safetensors has its own exception, not derived from ValueError
        raise CheckpointError(f"cannot be read: {error}", where=location) from error
    return tensors


def _require_fit(location: str, tensors: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
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


def restore_learner(
    uri: str, learner: Learner, *, sums: Mapping[str, str] | None = None, quiet: bool = False
) -> int:
    """Continues from a checkpoint: model, optimiser, random state and step.

    Args:
        uri: the folder.
        learner: what to restore.
        sums: SHA-256 that the checkpoint must have, from the index of its run.
        quiet: True if another worker logs that a checkpoint of an earlier version has no sums.

    Returns:
        Epochs done.

    Raises:
        CheckpointError: for a checkpoint of another model or another length of the run.
        DamagedError: for one with a file that is not as it was written.
        DataError: where the storage does not answer.
    """
    folder = SummedFolder(uri, expected=sums)
    if not quiet:
        note_without_sums(folder)
    if folder.sums is not None:
        folder.read(CONFIG)  # restoring does not need it, but copies of this checkpoint do
    _load_model(folder, learner.model)
    location = join(uri, TRAINER)
    content = folder.read(TRAINER)
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
