"""OpenAI's names and shapes of CLIP, mapped to those of transformers, which builds our towers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor

from gare.errors import CheckpointError

#: Width of an attention head in every CLIP that OpenAI published, and in the released temporal transformer.
HEAD_WIDTH = 64

_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
#: OpenAI's names of tensors outside the blocks → transformers' names.
_CLIP = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
#: Stored as matrices to multiply from the right; a Linear holds their transpose.
_CLIP_TRANSPOSED = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}
#: Numbers that OpenAI's archives carry beside the weights.
CLIP_FACTS = frozenset({"input_resolution", "context_length", "vocab_size"})


def openai_clip(clip: Mapping[str, Tensor], where: str, prefix: str) -> dict[str, Tensor]:
    """Converts tensors under OpenAI's names to transformers' names."""
    tensors: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in clip.items():
        if match := re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name):
            tower = "vision_model" if match[1] else "text_model"
            tensors.update(
                block(f"{tower}.encoder.layers.{match[2]}.", match[3], tensor, where, prefix + name)
            )
        elif name in _CLIP:
            tensors[_CLIP[name]] = tensor
        elif name in _CLIP_TRANSPOSED:
            tensors[_CLIP_TRANSPOSED[name]] = tensor.T
        elif name not in CLIP_FACTS:
            unknown.append(prefix + name)
    if unknown:
        raise CheckpointError(
            f"has tensors that no CLIP with a vision transformer has: {summarise_names(unknown)}", where=where
        )
    return tensors


def block(prefix: str, rest: str, tensor: Tensor, where: str, name: str) -> dict[str, Tensor]:
    """Converts one tensor of a residual attention block; splits the stacked q, k, v."""
    module, _, kind = rest.rpartition(".")
    if not tensor.ndim:
        raise CheckpointError(f"{name} is a single number", where=where)
    if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = rest.removeprefix("attn.in_proj_")
        parts = zip("qkv", tensor.chunk(3), strict=False)
        return {f"{prefix}self_attn.{letter}_proj.{kind}": part for letter, part in parts}
    if module not in _BLOCK:
        raise CheckpointError(f"has tensors of another model: {name}", where=where)
    return {f"{prefix}{_BLOCK[module]}.{kind}": tensor}


def clip_sizes(
    clip: Mapping[str, Tensor], where: str = "CLIP state dict", prefix: str = ""
) -> dict[str, int]:
    """Derives ``config.model.clip`` from the shapes of an OpenAI CLIP; heads are ``HEAD_WIDTH`` wide.

    Raises:
        CheckpointError: if a tensor that a size follows from is missing.
    """
    needed = (
        "visual.conv1.weight",
        "visual.positional_embedding",
        "token_embedding.weight",
        "positional_embedding",
        "text_projection",
    )
    missing = [prefix + name for name in needed if name not in clip]
    if missing:
        raise CheckpointError(
            f"{summarise_names(missing)} missing: not a CLIP with a vision transformer", where=where
        )
    conv, positions = clip["visual.conv1.weight"], clip["visual.positional_embedding"]
    text = clip["token_embedding.weight"]
    matrices = all(clip[name].ndim == 2 for name in needed[1:])
    side = math.isqrt(max(len(positions) - 1, 0)) if matrices else 0
    if (
        conv.ndim != 4
        or not side
        or side**2 != len(positions) - 1
        or not all(clip[n].numel() for n in needed)
    ):
        raise CheckpointError("sizes cannot be read from the shapes", where=where)
    return {
        "image_size": side * conv.shape[-1],
        "patch_size": conv.shape[-1],
        "vision_width": conv.shape[0],
        "vision_layers": _count(clip, r"visual\.transformer\.resblocks\.(\d+)\."),
        "vision_heads": max(conv.shape[0] // HEAD_WIDTH, 1),
        "text_width": text.shape[1],
        "text_layers": _count(clip, r"transformer\.resblocks\.(\d+)\."),
        "text_heads": max(text.shape[1] // HEAD_WIDTH, 1),
        "vocab_size": text.shape[0],
        "max_positions": len(clip["positional_embedding"]),
        "embed_dim": clip["text_projection"].shape[1],
    }


def _count(names: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def summarise_names(names: list[str]) -> str:
    """Returns the first five names and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
