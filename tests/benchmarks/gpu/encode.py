"""The image tower in inference, by precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gare.model.clip import ClipTowers
from tests.benchmarks.gpu.bench import Bench, Row, Timing, if_memory_suffices, say, seconds_of
from tests.benchmarks.gpu.step import build_model
from tests.benchmarks.size import multiply_adds

PRECISIONS = ("float32", "tf32", "bf16")


@contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Matrix products in a precision: float32, tf32 or bf16 (autocast)."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision("highest")


def measure(bench: Bench) -> Row:
    """Frames a second and TFLOP/s by precision."""
    model = build_model(bench, bench.config).eval()
    towers, side = model.towers, bench.config.model.clip.image_size
    assert isinstance(towers, ClipTowers)
    num_frames = 8 if bench.tiny else bench.config.train.batch_size * bench.config.model.max_frames
    shape = (num_frames, 3, side, side)
    frames = torch.randn(shape, device=bench.device, generator=bench.generator())
    operations = 2 * multiply_adds(lambda: towers.encode_images(frames[:1]))
    rows: list[Row] = []
    for precision in PRECISIONS:
        bench.reset_peak()
        count, timing = num_frames, None
        while timing is None and count:
            part = frames[:count]

            def encode(part: torch.Tensor = part) -> Timing:
                budget_s = bench.left_s() / (len(PRECISIONS) - len(rows))
                return seconds_of(bench, lambda: towers.encode_images(part), budget_s=budget_s, most=30)

            with torch.inference_mode(), computing_in(precision, bench.device):
                timing = if_memory_suffices(bench, encode)
            count = count if timing is not None else count // 2
        row: Row = {"precision": precision}
        if timing is None:
            row["left_out"] = "not even one frame fits into the device's memory"
        else:
            rate = count / timing.seconds
            row |= {"batch_frames": count, "frames_per_s": rate, "tflops": operations * rate / 1e12}
            row |= {"peak_gb": bench.peak_gb(), "runs": timing.runs}
        rows.append(row)
        say("  " + _line(row))
    return {"image_px": side, "rows": rows}


def _line(row: Row) -> str:
    if "left_out" in row:
        return f"{row['precision']:<8} left out: {row['left_out']}"
    return (
        f"{row['precision']:<8} {row['batch_frames']} frames at once: {row['frames_per_s']:,.0f} frames/s, "
        f"{row['tflops']:.4g} TFLOP/s, {row['peak_gb']:.2f} GB"
    )
