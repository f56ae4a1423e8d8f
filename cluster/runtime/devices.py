"""The device of a training worker: that it can be used, and what to do where its memory does not suffice."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gare.config import ClusterConfig
from gare.errors import ConfigError, GareError

if TYPE_CHECKING:
    import torch


def device_of_worker(config: ClusterConfig) -> torch.device:
    """The device that Ray gave this worker.

    Raises:
        ConfigError: for a GPU that torch cannot use.
    """
    import torch
    from ray.train.torch import get_device

    try:
        device: torch.device = get_device()
        if config.use_gpu and device.type != "cuda":
            raise RuntimeError("torch sees none")
        torch.ones(1, device=device).sum().item()  # fails for a GPU that this torch has no code for
    except (RuntimeError, AssertionError) as error:
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        raise ConfigError(
            f"the GPU of a training worker cannot be used: {str(error).splitlines()[0]}; torch is "
            f"{torch.__version__} {build}, CUDA_VISIBLE_DEVICES "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', '')!r}",
            where="cluster.use_gpu",
            accepted="a torch and a driver for this GPU, as many GPUs as Ray was told of (ray start "
            "--num-gpus), or cluster.use_gpu=false",
        ) from error
    # Ray sets the threads to the CPUs that it reserved, those of the loaders among them.
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    return device


@contextmanager
def explained_memory(pairs: int, share: int) -> Iterator[None]:
    """Says where a GPU's memory does not suffice how much is needed and which setting to change.

    Args:
        pairs: that go through the towers at once.
        share: pairs of this worker in a batch.

    Raises:
        GareError: in place of torch's OutOfMemoryError.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise GareError(
            f"the GPU's memory does not suffice for {pairs} pairs at once: {memory_needed(str(error))}",
            where="train.micro_batch",
            accepted=f"train.micro_batch={max(1, pairs // 2)} (a worker has {share} pairs), or a smaller "
            "train.batch_size; the same command goes on from the last checkpoint",
        ) from error


def memory_needed(message: str) -> str:
    """Says in a few words what torch's message of an allocation that failed says of memory."""
    asked = re.search(r"Tried to allocate ([\d.]+ [KMG]iB)", message)
    total = re.search(r"total capacity of ([\d.]+ [KMG]iB)", message)
    held = re.search(r"this process has ([\d.]+ [KMG]iB) memory in use", message)
    parts = [
        f"{asked[1]} more are needed" if asked else "",
        f"{held[1]} are held" if held else "",
        f"the GPU has {total[1]}" if total else "",
    ]
    return ", ".join(part for part in parts if part) or message.splitlines()[0]
