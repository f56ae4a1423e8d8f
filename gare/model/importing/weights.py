"""Import of weights: the released GARE code's state dict, and CLIP of OpenAI or Hugging Face.

Sizes come from the tensors' shapes. Every tensor of a file is accounted for: used, or named as unused.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from gare.config import ClipConfig, ModelConfig
from gare.errors import CheckpointError, ConfigError
from gare.model.gare import GARE
from gare.model.importing.openai_clip import CLIP_FACTS, block, clip_sizes, openai_clip, summarise_names
from gare.model.importing.weight_files import read_tensors

logger = logging.getLogger(__name__)

_PSI = {
    "layers.0.cross_attn.q_proj": "layers.0.query",
    "layers.0.cross_attn.k_proj": "layers.0.key",
    "layers.0.cross_attn.v_proj": "layers.0.value",
    "layers.0.cross_attn.out_proj": "layers.0.out",
    "layers.0.linear1": "layers.0.residual",
    "layers.0.layer_norm1": "layers.0.norm1",
    "layers.0.layer_norm2": "layers.0.norm2",
    "layers.0.layer_norm3": "layers.0.norm3",
    "mean_proj": "mean",
}
#: Modules that the released code builds and saves but never calls on the way to a score or a loss.
_PSI_UNUSED = ("layers.0.linear2.", "layers.0.mlp.", "log_std_proj.")


def import_released(state_dict: Mapping[str, Tensor], **settings: Any) -> GARE:
    """Builds the model of a released GARE state dict, in evaluation mode.

    Args:
        state_dict: as the released code saves it; a ``module.`` before every name is taken off.
        settings: keys of ``config.model`` that do not follow from shapes (``pool_temperature``,
            ``max_frames`` …); they default to the released MSR-VTT settings.

    Raises:
        CheckpointError: naming what is missing, unknown, contradictory or of a wrong shape.
        ConfigError: for a setting that is unknown or follows from the shapes.
    """
    where = "released state dict"
    given = _named_tensors(state_dict, where)
    clip = {name[5:]: tensor for name, tensor in given.items() if name.startswith("clip.")}
    tensors = {f"towers.clip.{name}": t for name, t in openai_clip(clip, where, "clip.").items()}
    unused = [f"clip.{name}" for name in CLIP_FACTS & clip.keys()]
    unknown: list[str] = []
    for name, tensor in given.items():
        if name.startswith("clip."):
            continue
        if match := re.fullmatch(r"transformerClip\.resblocks\.(\d+)\.(.+)", name):
            tensors.update(block(f"temporal.blocks.layers.{match[1]}.", match[2], tensor, where, name))
        elif name == "frame_position_embeddings.weight":
            tensors["temporal.positions.weight"] = tensor
        elif match := re.fullmatch(r"(?:agent\.)?psi\.(.+)\.(weight|bias)", name):
            ours = f"increment.{_PSI.get(match[1], '')}.{match[2]}"
            if match[1] in _PSI:
                if ours in tensors and not torch.equal(tensors[ours], tensor):
                    raise CheckpointError("psi.* and agent.psi.* differ; they are one module", where=name)
                tensors[ours] = tensor
            else:
                (unused if f"{match[1]}.".startswith(_PSI_UNUSED) else unknown).append(name)
        else:
            (unused if name.startswith("weight_fc.") else unknown).append(name)
    if unknown:
        raise CheckpointError(f"has tensors of another model: {summarise_names(unknown)}", where=where)
    layers = {int(name.split(".")[3]) for name in tensors if name.startswith("temporal.blocks.layers.")}
    passes_through = settings.get("temporal") == "none"
    if not layers and not passes_through:
        raise CheckpointError(
            "missing: transformerClip.resblocks.*, the temporal transformer",
            where=where,
            accepted="a whole file, or temporal none for a model that has none",
        )
    sizes = clip_sizes(clip, where, "clip.")
    found = {} if passes_through else {"temporal_layers": max(layers) + 1}
    config = _settle(sizes, found, settings, where)
    left_out = tuple(
        part
        for part, kept in (("increment.", config.increment), ("temporal.", not passes_through))
        if not kept
    )
    unused += [name for name in tensors if name.startswith(left_out)]
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(left_out)}
    model = GARE(config)
    _fill(model, tensors, where, may_miss=("radius.", "adapters."))
    logger.info("%s: %d tensors used; unused: %s", where, len(given) - len(unused), ", ".join(sorted(unused)))
    return model.eval()


def import_clip(source: Mapping[str, Tensor] | str | Path, **settings: Any) -> GARE:
    """Builds a GARE that starts from CLIP: its towers, a temporal transformer from its text blocks, a new ψ.

    Args:
        source: OpenAI CLIP as a state dict, as a file (TorchScript archive, state dict, safetensors), or a
            folder that Hugging Face's ``save_pretrained`` wrote. ViT-B/32, B/16, L/14 and the like.
        settings: keys of ``config.model`` that do not follow from shapes.

    Raises:
        CheckpointError: naming what is missing, unknown or of a wrong shape.
        ConfigError: for a setting that is unknown or follows from the shapes.
    """
    if isinstance(source, Mapping):
        return _from_openai(source, "CLIP state dict", settings)
    path = Path(os.path.expanduser(source))  # noqa: PTH111 (no error without a home)
    if path.is_dir():
        return _from_hugging_face(path, settings)
    return _from_openai(read_tensors(path), str(path), settings)


def published_sizes(source: str | Path) -> dict[str, int]:
    """Reads ``config.model.clip`` from a path that ``import_clip`` accepts, without building a model.

    Raises:
        CheckpointError: for a path that is not a CLIP, or cannot be read.
    """
    path = Path(os.path.expanduser(source))  # noqa: PTH111 (no error without a home)
    if path.is_dir():
        return _described(path)[1]
    return clip_sizes(_openai_names(read_tensors(path), str(path)), str(path))


def _from_openai(state_dict: Mapping[str, Tensor], where: str, settings: Mapping[str, Any]) -> GARE:
    given = _openai_names(state_dict, where)
    tensors = {f"towers.clip.{name}": t for name, t in openai_clip(given, where, "").items()}
    return _start_from_clip(_settle(clip_sizes(given, where), {}, settings, where), tensors, where)


def _openai_names(state_dict: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    given = _named_tensors(state_dict, where)
    if "text_model.final_layer_norm.weight" in given:
        raise CheckpointError(
            "has Hugging Face's names; heads are in its config.json",
            where=where,
            accepted="the folder with config.json and model.safetensors",
        )
    return given


def _named_tensors(state_dict: Any, where: str) -> dict[str, Tensor]:
    """Returns a state dict's tensors, without the ``module.`` that a parallel wrapper puts before names.

    Raises:
        CheckpointError: for anything that is not a mapping of names to tensors that hold numbers.
    """
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(
            f"is a {type(state_dict).__name__}", where=where, accepted="a mapping of names to tensors"
        )
    wrong = [
        str(name)
        for name, value in state_dict.items()
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.is_meta
    ]
    if wrong:
        raise CheckpointError(f"holds no tensor under {summarise_names(wrong)}", where=where)
    return {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}


def _from_hugging_face(folder: Path, settings: Mapping[str, Any]) -> GARE:
    weights, sizes = _described(folder)
    tensors = {
        f"towers.clip.{name}": tensor
        for name, tensor in read_tensors(weights).items()
        if not name.endswith(".position_ids")  # older files carry 0, 1, 2 … as a buffer
    }
    return _start_from_clip(_settle(sizes, {}, settings, str(folder)), tensors, str(weights))


def _described(folder: Path) -> tuple[Path, dict[str, int]]:
    """Returns the weights file of a Hugging Face folder, and the sizes in its config.json."""
    from transformers import CLIPConfig

    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    weights = next((file for file in files if file.is_file()), None)
    description = folder / "config.json"
    if weights is None and (folder / "model.safetensors.index.json").is_file():
        raise CheckpointError(
            "its weights are in several files", where=str(folder), accepted="one model.safetensors"
        )
    if weights is None or not description.is_file():
        raise CheckpointError(
            "is no Hugging Face CLIP folder",
            where=str(folder),
            accepted="config.json and model.safetensors in it",
        )
    try:
        hf = CLIPConfig.from_dict(json.loads(description.read_text("utf-8")))
    except Exception as error:  # transformers checks values with exceptions of its own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"cannot be read: {reason[-1].strip()}", where=str(description)) from error
    for tower in (hf.text_config, hf.vision_config):
        if (tower.hidden_act, tower.layer_norm_eps) != ("quick_gelu", 1e-5):
            raise CheckpointError(
                f"{tower.hidden_act} with layer_norm_eps {tower.layer_norm_eps:g} is not OpenAI's CLIP",
                where=str(description),
                accepted="quick_gelu and 1e-5",
            )
    return weights, {
        "image_size": hf.vision_config.image_size,
        "patch_size": hf.vision_config.patch_size,
        "vision_width": hf.vision_config.hidden_size,
        "vision_layers": hf.vision_config.num_hidden_layers,
        "vision_heads": hf.vision_config.num_attention_heads,
        "text_width": hf.text_config.hidden_size,
        "text_layers": hf.text_config.num_hidden_layers,
        "text_heads": hf.text_config.num_attention_heads,
        "vocab_size": hf.text_config.vocab_size,
        "max_positions": hf.text_config.max_position_embeddings,
        "embed_dim": hf.projection_dim,
    }


def _start_from_clip(config: ModelConfig, tensors: dict[str, Tensor], where: str) -> GARE:
    model = GARE(config)
    _fill(model, tensors, where, may_miss=("temporal.", "increment.", "radius.", "adapters."))
    if random := model.start_temporal():
        logger.warning("%s: the temporal transformer does not start from the text blocks: %s", where, random)
    return model.eval()


def _settle(
    sizes: Mapping[str, int], found: dict[str, Any], settings: Mapping[str, Any], where: str
) -> ModelConfig:
    fixed = {"clip", *found}
    wrong = sorted((settings.keys() - ModelConfig.model_fields.keys()) | (settings.keys() & fixed))
    if wrong:
        accepted = ", ".join(sorted(ModelConfig.model_fields.keys() - fixed))
        raise ConfigError(f"{', '.join(wrong)} cannot be set", where=where, accepted=accepted)
    defaults = {
        "max_words": min(32, sizes["max_positions"]),
        "max_frames": min(12, sizes["max_positions"]),
    }
    try:
        return ModelConfig(clip=ClipConfig(**sizes), **{**defaults, **found, **settings})
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}".lstrip(": ") for e in error.errors())
        raise ConfigError(faults, where=where) from error


def _fill(model: GARE, tensors: Mapping[str, Tensor], where: str, *, may_miss: tuple[str, ...]) -> None:
    """Copies tensors, in float32, into the model; all faults are named at once."""
    ours = model.state_dict()
    missing = [name for name in ours if name not in tensors and not name.startswith(may_miss)]
    faults = [f"missing: {summarise_names(missing)}"] if missing else []
    faults += [
        f"left over: {summarise_names(left)}" for left in [sorted(tensors.keys() - ours.keys())] if left
    ]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(ours[name].shape)}"
        for name in sorted(ours.keys() & tensors.keys())
        if tensors[name].shape != ours[name].shape
    ][:5]
    if faults:
        raise CheckpointError(
            "; ".join(faults), where=where, accepted="a whole file of the model that it says it is"
        )
    broken = [name for name, tensor in tensors.items() if not tensor.float().isfinite().all()]
    if broken:
        raise CheckpointError(f"holds numbers that are not finite: {summarise_names(broken)}", where=where)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
