"""The towers' blocks compiled, checkpointed and cast: the same results in less time or less memory.

A block is one layer of a transformer. All blocks of a tower have the same code and shapes, so that it is
compiled for the first of them and serves the others.
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
Wanted = Literal["off", "towers", "auto"]
#: Code compiled of one place in the source at most. Needed are two towers, in training and in validation, for
#: one row and for several; torch allows 8, and computes without the compiler beyond that.
CODES = 32
#: Layers that autocast computes in its dtype, and whose weights it casts at each call.
CAST_LAYERS = (nn.Linear, nn.Conv2d)


def settle_compile(wanted: Wanted, device: torch.device) -> Literal["off", "towers"]:
    """Says what ``auto`` means on a device: ``towers`` on a GPU that Triton can be had for, else ``off``."""
    if wanted != "auto":
        return wanted
    has_compiler = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return "towers" if has_compiler else "off"


def compile_towers(
    towers: ClipTowers,
    wanted: Wanted,
    device: torch.device,
    rehearse: Callable[[], object],
    *,
    key: str,
    say: Callable[[str], None] = logger.info,
) -> None:
    """Compiles the towers' blocks where that is wanted, and makes a first call, which compiles them.

    Args:
        towers: on their device.
        wanted: off, towers, or auto, which goes on without a compiler that fails, with a warning.
        device: of the towers.
        rehearse: calls the towers as they will be called.
        key: the setting that ``wanted`` comes from, for messages.
        say: takes the one line about what was compiled.

    Raises:
        ConfigError: where ``wanted`` is towers and the compiler fails.
    """
    if settle_compile(wanted, device) == "off":
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
        # Other sizes and modes, those of validation for one, are compiled when they come up. Where that fails
        # they go on without.
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

    The number of pictures or captions is left open, so that batches of any size use the same code, and
    captions are encoded at their full number of words. One row is compiled apart: torch makes a constant of a
    size of 1.

    Args:
        towers: whose blocks are meant.
    """

    def __init__(self, towers: ClipTowers) -> None:
        self.towers = towers
        self.hooks: list[RemovableHandle] = []

    def compile(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Has the blocks compiled by their first calls.

        Args:
            backend: torch.compile's.
        """
        import torch._dynamo

        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, CODES)
        # DDP's hooks run between blocks anyway. Dynamo would cut blocks in two where a bucket ends, and it
        # refuses those with activation checkpointing.
        config.optimize_ddp = False
        self.hooks = [
            encoder.register_forward_pre_hook(_leave_batch_open, with_kwargs=True)
            for encoder in _encoders(self.towers)
        ]
        for block in _blocks(self.towers):
            block.compile(backend=backend, dynamic=False)
        self.towers.full_width = True

    def undo(self) -> None:
        """Makes of the blocks again what they were."""
        for hook in self.hooks:
            hook.remove()
        for block in _blocks(self.towers):
            block._compiled_call_impl = None
        self.towers.full_width = False


def _leave_batch_open(encoder: nn.Module, arguments: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Lets the compiler take the number of rows for a variable: a hook before an encoder.

    The first block's input is marked; the others have its code. Only the batch varies: with all sizes open,
    the one code that both towers share in the source would be compiled for sizes that none of them has.
    """
    torch._dynamo.maybe_mark_dynamic(named["inputs_embeds"], 0)


def checkpoint_activations(towers: ClipTowers) -> None:
    """Keeps of each block its input alone; the backward computes the rest again, with the same gradient."""
    for block in _blocks(towers):
        # The random state is only worth its price where something is dropped, which CLIP does not do.
        drops = bool(block.self_attn.dropout)
        block._gradient_checkpointing_func = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=drops
        )
        block.gradient_checkpointing = True


def cast_once(towers: ClipTowers, dtype: torch.dtype) -> ClipTowers:
    """Copies towers for inference, with Linear and Conv weights in the dtype that autocast casts them to.

    LayerNorms, embeddings and the rest stay as they are, so that all values are those of before, bit for bit.

    Args:
        towers: are left as they are.
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
