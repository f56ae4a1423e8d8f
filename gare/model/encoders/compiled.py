"""Compiling, checkpointing and casting of the towers' blocks: the same results in less time or memory.

A block is one layer of a transformer. All blocks of a tower have the same code and shapes, so the code
compiled for the first one serves the others.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from gare.errors import ConfigError
from gare.model.encoders.clip import ClipTowers

logger = logging.getLogger(__name__)

#: Values of ``train.compile`` and ``features.compile``.
CompileSetting = Literal["off", "towers", "auto"]
#: Largest number of compiled variants of one place in the source. Variants are needed for two towers, in
#: training and in validation, for one row and for several; torch allows 8, and runs uncompiled beyond that.
MAX_VARIANTS = 32
#: Layers that autocast computes in its dtype, and whose weights it casts at each call.
CAST_LAYERS = (nn.Linear, nn.Conv2d)


def resolve_compile(wanted: CompileSetting, device: torch.device) -> Literal["off", "towers"]:
    """Resolves ``auto`` for a device: ``towers`` on a GPU on which Triton works, else ``off``."""
    if wanted != "auto":
        return wanted
    has_compiler = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return "towers" if has_compiler else "off"


def compile_towers(
    towers: ClipTowers,
    wanted: CompileSetting,
    device: torch.device,
    rehearse: Callable[[], object],
    *,
    key: str,
    say: Callable[[str], None] = logger.info,
) -> None:
    """Sets the towers' blocks to be compiled if wanted, and makes a first call, which compiles them.

    Args:
        towers: on their device.
        wanted: off, towers, or auto, which warns and goes on uncompiled if the compiler fails.
        device: of the towers.
        rehearse: calls the towers as they will be called.
        key: the setting that ``wanted`` comes from, for messages.
        say: receives the one line about what was compiled.

    Raises:
        ConfigError: if ``wanted`` is towers and the compiler fails.
    """
    if resolve_compile(wanted, device) == "off":
        return
    blocks = CompiledBlocks(towers)
    started = time.perf_counter()
    try:
        blocks.compile()
        rehearse()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        blocks.undo()
        rehearse()  # a fault that has nothing to do with the compiler is raised again here
        reason = f"the blocks of the towers cannot be compiled on {device.type}: {_in_short(error)}"
        if wanted != "auto":
            raise ConfigError(
                reason, where=key, accepted="off, or a working C++ compiler (CPU) or Triton (GPU)"
            ) from error
        logger.warning("%s; they are computed without a compiler, as with %s=off", reason, key)
        return
    if wanted == "auto":
        # Other sizes and modes, such as validation's, are compiled when they first occur. If that fails, they
        # run uncompiled.
        torch._dynamo.config.suppress_errors = True
    say(
        f"{key} {wanted}: the blocks of the towers are compiled for {device.type}; "
        f"cold start {time.perf_counter() - started:.1f} s"
    )


def _in_short(error: Exception) -> str:
    # The compiler's first line says that something was raised, and the second what.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join([f"{type(error).__name__}:", *lines[:2]])


class CompiledBlocks:
    """The blocks of both towers, compiled in place; names in the state dict stay as they are.

    The number of pictures or captions is dynamic, so that batches of any size use the same code, and captions
    are encoded at their full number of words. A batch of one row is compiled separately: torch specialises on
    a size of 1.

    Args:
        towers: that the blocks belong to.
    """

    def __init__(self, towers: ClipTowers) -> None:
        self.towers = towers
        self.hooks: list[RemovableHandle] = []

    def compile(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Sets the blocks up to be compiled by their first calls.

        Args:
            backend: torch.compile's.
        """
        import torch._dynamo

        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, MAX_VARIANTS)
        # DDP's hooks run between blocks anyway. Dynamo would split a block where a bucket ends, and it
        # refuses to split blocks with activation checkpointing.
        config.optimize_ddp = False
        self.hooks = [
            encoder.register_forward_pre_hook(_leave_batch_open, with_kwargs=True)
            for encoder in _encoders(self.towers)
        ]
        for block in _blocks(self.towers):
            block.compile(backend=backend, dynamic=False)
        self.towers.full_width = True

    def undo(self) -> None:
        """Restores the blocks as they were before."""
        for hook in self.hooks:
            hook.remove()
        for block in _blocks(self.towers):
            block._compiled_call_impl = None
        self.towers.full_width = False


def _leave_batch_open(encoder: nn.Module, arguments: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Marks the number of rows as dynamic for the compiler: a hook before an encoder.

    The first block's input is marked; the other blocks reuse its code. Only the batch size is dynamic: if all
    sizes were, the source that both towers share would be compiled for sizes that neither has.
    """
    torch._dynamo.maybe_mark_dynamic(named["inputs_embeds"], 0)


def checkpoint_activations(towers: ClipTowers) -> None:
    """Keeps only each block's input; the backward computes the rest again, with the same gradient."""
    for block in _blocks(towers):
        # Keeping the random state is only worth its cost with dropout, which CLIP does not have.
        drops = bool(block.self_attn.dropout)
        block._gradient_checkpointing_func = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=drops
        )
        block.gradient_checkpointing = True


def cast_weights_once(towers: ClipTowers, dtype: torch.dtype) -> ClipTowers:
    """Copies towers for inference, with Linear and Conv weights in the dtype that autocast casts them to.

    LayerNorms, embeddings and the rest stay as they are, so that all values stay the same, bit for bit.

    Args:
        towers: to copy; they are left as they are.
        dtype: of the autocast that the copy will run under; float32 casts nothing.
    """
    towers = copy.deepcopy(towers).eval().requires_grad_(False)
    if dtype is not torch.float32:
        for module in towers.modules():
            if isinstance(module, CAST_LAYERS):
                module.to(dtype)
    return towers


def _encoders(towers: ClipTowers) -> tuple[Any, Any]:
    return towers.clip.vision_model.encoder, towers.clip.text_model.encoder


def _blocks(towers: ClipTowers) -> Iterator[Any]:
    for encoder in _encoders(towers):
        yield from encoder.layers
