"""Scores and steps of the head by kernel: which take the device's time, and which operations the host's."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.gpu import head
from tests.benchmarks.gpu.bench import Bench, Row, say

#: Numbers of kernels and of operations that are shown.
KERNELS, OPERATIONS = 12, 6


def measure(bench: Bench) -> Row:
    """Measures one call of each, after one that loads the kernels; the profiler slows the host down."""
    scores = head.TINY_SCORES[-1] if bench.tiny else head.MANY_SCORES
    steps = head.TINY_STEPS if bench.tiny else head.FEW_STEPS
    calls: dict[str, Callable[[], object]] = {
        f"scores of {scores:,}": head.scores_of(bench, scores, head.PREPARED),
        f"scores of {scores:,}, tf32": head.scores_of(bench, scores, head.TF32),
    }
    calls |= {f"step of {size:,}": head.make_step(bench, size, head.FUSED) for size in steps}
    return {name: _profiled(bench, name, call) for name, call in calls.items()}


def _profiled(bench: Bench, name: str, call: Callable[[], object]) -> Row:
    call()
    _wait(bench)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.is_gpu else [])]
    with profile(activities=kinds) as found:
        began = time.perf_counter()
        call()
        _wait(bench)
        wall_ms = 1e3 * (time.perf_counter() - began)
    events = found.key_averages()
    kernels = {one.key: (one.self_device_time_total / 1e3, one.count) for one in events}
    operations = {one.key: (one.self_cpu_time_total / 1e3, one.count) for one in events}
    row: Row = {"wall_ms": wall_ms, "device_ms": sum(ms for ms, _ in kernels.values())}
    say(f"  {name}: {wall_ms:.1f} ms, on the device {row['device_ms']:.1f} ms")
    for kind, timed, most in (("kernels", kernels, KERNELS), ("operations", operations, OPERATIONS)):
        longest = sorted(timed.items(), key=lambda one: -one[1][0])[:most]
        row[kind] = [{"name": key, "ms": ms, "calls": calls} for key, (ms, calls) in longest if ms > 0]
        for one in row[kind]:
            say(f"    {kind[:-1]} {one['ms']:9.3f} ms {one['calls']:5d} times {one['name'][:90]}")
    return row


def _wait(bench: Bench) -> None:
    if bench.is_gpu:
        torch.cuda.synchronize(bench.device)
