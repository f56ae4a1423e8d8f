"""State and tools shared by all parts: device, remaining time, timing, peak memory."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gare.config import Config

Row = dict[str, Any]


@dataclass
class Bench:
    """A run of the benchmark.

    Attributes:
        device: device to measure.
        tiny: True for the sizes of a test.
        seed: seed of random data and weights.
        loaded: the configuration; None if no part reads it.
        found: results of earlier parts, by name.
        ends_at: deadline of the running part, on ``time.perf_counter``.
    """

    device: torch.device
    tiny: bool
    seed: int = 0
    loaded: Config | None = None
    found: dict[str, Row] = field(default_factory=dict)
    ends_at: float = float("inf")

    @property
    def config(self) -> Config:
        """conf/msrvtt.yaml, or the tiny one."""
        assert self.loaded is not None, "the part does not say that it needs the configuration"
        return self.loaded

    @property
    def is_gpu(self) -> bool:
        """True if the device is a GPU."""
        return self.device.type == "cuda"

    def left_s(self) -> float:
        """Returns the seconds that the part has left."""
        return max(self.ends_at - time.perf_counter(), 0.0)

    def generator(self) -> torch.Generator:
        """Returns a random generator on the device, the same in every run with this seed."""
        return torch.Generator(self.device).manual_seed(self.seed)

    def memory_bytes(self) -> int:
        """Returns the memory that is available for tensors, bytes."""
        if not self.is_gpu:
            return 2**62  # only tiny sizes run on a CPU
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def reset_peak(self) -> None:
        """Releases unused memory and resets the peak."""
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gb(self) -> float:
        """Returns the peak memory of tensors since the reset, GB; on a CPU the peak of the process."""
        if self.is_gpu:
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@dataclass(frozen=True)
class Timing:
    """Median time of a call.

    Attributes:
        seconds: the median.
        runs: number of timed calls.
    """

    seconds: float
    runs: int


class OutOfTimeError(Exception):
    """The part's time ran out before anything was measured."""


def once(bench: Bench, call: Callable[[], object]) -> float:
    """Returns the seconds of one call, by the device's own clock on a GPU."""
    if not bench.is_gpu:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(bench.device)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(bench.device)
    return start.elapsed_time(end) / 1e3


def seconds_of(
    bench: Bench, call: Callable[[], object], *, budget_s: float = 1.0, most: int = 50, warm_up: int = 2
) -> Timing:
    """Returns the median seconds of a call, after a warm-up.

    Args:
        bench: the run.
        call: the call to measure.
        budget_s: time limit for all calls, seconds. A call that takes longer is made once, and counts.
        most: maximum number of timed calls.
        warm_up: number of calls before them.
    """
    began = time.perf_counter()
    budget_s = min(budget_s, bench.left_s())
    most = 2 if bench.tiny else most
    first = once(bench, call)
    if first >= budget_s:
        return Timing(first, 1)
    for _ in range(warm_up - 1):
        once(bench, call)
    seconds = [once(bench, call)]
    while len(seconds) < most and time.perf_counter() - began < budget_s:
        seconds.append(once(bench, call))
    return Timing(statistics.median(seconds), len(seconds))


def if_memory_suffices(bench: Bench, call: Callable[[], Any]) -> Any:
    """Returns the call's result, or None if the device has too little memory for it."""
    try:
        return call()
    except torch.OutOfMemoryError:
        pass
    # Outside the handler, because the exception keeps alive all that its frames hold.
    bench.reset_peak()
    return None


def say(text: str) -> None:
    """Prints a line on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
