"""Device of a training worker: checks that it can be used, and advice if its memory does not suffice."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gare.config import ResolvedCluster
from gare.errors import ConfigError, GareError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


#: Time limit for a GPU to answer, seconds: a process starts, imports torch and opens the GPU.
ANSWER_S = 180.0


@dataclass(frozen=True)
class Answer:
    """One GPU as seen by the actor to which Ray assigned it.

    Attributes:
        uuid: id of the GPU; empty if it cannot be used.
        error: reason why it cannot be used.
        has_bf16: True if it computes bf16 in hardware.
    """

    uuid: str
    error: str = ""
    has_bf16: bool = False


class _Probe:
    def look(self) -> Answer:
        """Opens the GPU of this process and runs a small computation."""
        import torch

        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        try:
            if not torch.cuda.is_available():
                raise RuntimeError("torch finds none")
            torch.ones(1, device="cuda").sum().item()  # fails if this torch has no code for the GPU
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            return Answer(str(torch.cuda.get_device_properties(0).uuid), has_bf16=has_bf16)
        except (RuntimeError, AssertionError) as error:
            line = str(error).splitlines()[0]
            return Answer("", f"{line}; torch {torch.__version__} {build}, CUDA_VISIBLE_DEVICES {visible!r}")


def require_usable_gpus(config: ResolvedCluster) -> bool | None:
    """Checks, before training begins, that torch can use the free GPUs and that all are different.

    Ray assigns as many GPUs as it was told to have, even if they do not exist.

    Args:
        config: with resources resolved.

    Returns:
        True if there are GPUs and all compute bf16 in hardware; None if this could not be checked.

    Raises:
        ConfigError: if torch cannot use a GPU, or two workers would share one.
    """
    if not config.use_gpu:
        return False
    import ray

    count = min(config.train_workers, int(ray.available_resources().get("GPU", 0)))
    probes: list[Any] = [ray.remote(num_cpus=0, num_gpus=1)(_Probe).remote() for _ in range(count)]
    try:
        # All at once, so that no two probes get the same GPU.
        answers = ray.get([probe.look.remote() for probe in probes], timeout=ANSWER_S)
    except ray.exceptions.RayError as error:
        logger.warning("cannot check the GPUs before training: %s", str(error).splitlines()[-1])
        return None
    finally:
        for probe in probes:
            ray.kill(probe)
    refuse_unusable(answers)
    return all(answer.has_bf16 for answer in answers) if answers else None


def refuse_unusable(answers: Sequence[Answer]) -> None:
    """Raises the error of GPUs that cannot be used.

    Raises:
        ConfigError: if a GPU cannot be used, or two processes have got the same one.
    """
    failed = [answer.error for answer in answers if answer.error]
    if failed:
        raise ConfigError(
            f"{len(failed)} of {len(answers)} GPUs cannot be used: {failed[0]}",
            where="cluster.use_gpu",
            accepted="a torch and a driver for these GPUs, as many as there are (ray start --num-gpus), or "
            "cluster.use_gpu=false",
        )
    shared = [uuid for uuid, times in Counter(answer.uuid for answer in answers).items() if times > 1]
    if shared:
        raise ConfigError(
            f"two training workers would share one GPU, {shared[0]}: Ray counts more GPUs than exist",
            where="cluster.train_workers",
            accepted=f"{len({answer.uuid for answer in answers})}, or ray start --num-gpus with their number",
        )


def device_of_worker(config: ResolvedCluster) -> torch.device:
    """Returns the device that Ray gave this worker; sets torch's threads to the worker's own CPUs.

    Raises:
        ConfigError: if there is no GPU and one is asked for.
    """
    import torch
    from ray.train.torch import get_device

    # Ray sets the threads to all reserved CPUs, which include those of the loaders.
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    device: torch.device = get_device()
    if config.use_gpu and device.type != "cuda":
        raise ConfigError(
            "a training worker has got no GPU that torch can use",
            where="cluster.use_gpu",
            accepted="a torch and a driver for the GPUs of all nodes, or cluster.use_gpu=false",
        )
    return device


@contextmanager
def explain_out_of_memory(pairs: int, share: int) -> Iterator[None]:
    """Explains an out-of-memory error of a GPU: how much is needed and which setting to change.

    Args:
        pairs: number of a worker's pairs that its towers encode in one pass.
        share: number of a worker's pairs.

    Raises:
        GareError: in place of torch's OutOfMemoryError.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        less = f"train.micro_batch={pairs // 2} (a worker has {share} pairs), or " if pairs > 1 else ""
        raise GareError(
            f"the GPU's memory does not suffice for {pairs} pairs in one pass of the towers: "
            f"{memory_needed(str(error))}",
            where="train.micro_batch" if less else "train.batch_size",
            accepted=f"{less}a smaller train.batch_size, or more training workers to share it; the same "
            "command goes on from the last checkpoint",
        ) from error


def memory_needed(message: str) -> str:
    """Summarises the memory figures in torch's message of a failed allocation."""
    asked = re.search(r"Tried to allocate ([\d.]+ [KMG]iB)", message)
    total = re.search(r"total capacity of ([\d.]+ [KMG]iB)", message)
    held = re.search(r"this process has ([\d.]+ [KMG]iB) memory in use", message)
    parts = [
        f"{asked[1]} more are needed" if asked else "",
        f"{held[1]} are held" if held else "",
        f"the GPU has {total[1]}" if total else "",
    ]
    return ", ".join(part for part in parts if part) or message.splitlines()[0]
