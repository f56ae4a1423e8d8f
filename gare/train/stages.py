"""Seconds of a training step by stage: stages are marked in the code and measured on request.

A stage's seconds exclude those of stages inside it. On a GPU the start and end of every stage wait for the
device, so a measured step is a little slower than others. When nothing is measured, a mark costs less than a
microsecond.
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

#: Stages in the order of a step, with their descriptions in the table.
STAGES = {
    "data_wait": "waiting for the batch, on the host or on the device",
    "normalise": "8-bit frames to what the towers take",
    "towers": "forward of the towers and the temporal transformer",
    "communication": "gathered features, sums over workers; waiting for the slowest is in it",
    "head": "forward of scores and losses",
    "backward": "backward; gradients are exchanged beside it",
    "towers_again": "forward of the towers again, in the backward (train.micro_batch)",
    "gradients": "exchange of gradients that the backward did not hide",
    "optimizer": "clipping and the optimiser",
    "diagnostics": "measures of the increments",
    "other": "what no stage has",
}

_NOTHING: AbstractContextManager[None] = nullcontext()
_recorder: Recorder | None = None


def stage(name: str) -> AbstractContextManager[Any]:
    """Marks the code inside the context as this stage of the step."""
    return _NOTHING if _recorder is None else _Stage(_recorder, name)


def start_recording(device: torch.device) -> Recorder:
    """Starts measuring in this process."""
    global _recorder
    _recorder = Recorder(device)
    return _recorder


def stop_recording() -> None:
    """Stops measuring."""
    global _recorder
    _recorder = None


class Recorder:
    """Recorder that adds up the seconds of stages.

    Args:
        device: to wait for at the start and end of every stage.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._open: list[_Stage] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._ready: float | None = None

    def now(self) -> float:
        """Waits for the device and returns the time in seconds."""
        if self._is_gpu:
            torch.cuda.current_stream().synchronize()  # not the one that copies the next batch
        return time.perf_counter()

    def take(self) -> dict[str, float]:
        """Returns seconds by stage since the last call."""
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken

    def enter(self, one: _Stage) -> None:
        """Opens a stage inside the open ones."""
        if one.name == "towers" and any(outer.name == "backward" for outer in self._open):
            one.name = "towers_again"
        self._open.append(one)

    def leave(self, one: _Stage, seconds: float, now: float) -> None:
        """Closes the innermost stage."""
        self._open.pop()
        own = seconds - one.inner
        if one.name == "backward" and self._ready is not None:
            exposed = min(now - self._ready, own)
            self._add("gradients", exposed)
            own -= exposed
            self._ready = None
        self._add(one.name, own)
        if self._open:
            self._open[-1].inner += seconds

    def gradients_ready(self) -> None:
        """Marks that the rest of the backward is the exchange of the last gradients."""
        self._ready = self.now()

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] += seconds


class _Stage:
    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name, self.inner = recorder, name, 0.0

    def __enter__(self) -> None:
        self.recorder.enter(self)
        self.range = torch.profiler.record_function(self.name)
        self.started = self.recorder.now()
        self.range.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        now = self.recorder.now()
        self.range.__exit__(kind, error, trace)
        self.recorder.leave(self, now - self.started, now)


def watch_gradients(objective: nn.Module, recorder: Recorder) -> None:
    """Lets DDP mark when the last gradients are ready, to measure the exchange that remains separately."""
    if not isinstance(objective, DistributedDataParallel):
        return
    # Without annotations: DDP compares them with types, and here they are strings.
    objective.register_comm_hook(recorder, lambda recorder, bucket: _exchange(recorder, bucket))


def _exchange(recorder: Recorder, bucket: Any) -> torch.futures.Future[torch.Tensor]:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    if bucket.is_last():
        recorder.gradients_ready()
    return allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]
