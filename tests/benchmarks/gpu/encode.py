"""The image tower in inference, by precision, and as it encodes for feature stores."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gare.errors import ConfigError
from gare.model.encoders.clip import ClipTowers
from gare.model.encoders.compiled import cast_weights_once, compile_towers
from tests.benchmarks.gpu.bench import Bench, Row, Timing, if_memory_suffices, say, seconds_of
from tests.benchmarks.gpu.step import build_model
from tests.benchmarks.size import multiply_adds

PRECISIONS = ("float32", "tf32", "bf16")
#: Variants compared with autocast, which casts the weights at each call and was used for stores before.
CAST, COMPILED = "weights cast once", "weights cast once, compiled"
VARIANTS = (CAST, COMPILED)


@contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Sets the precision of matrix products: float32, tf32 or bf16 (autocast)."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision("highest")


def measure(bench: Bench) -> Row:
    """Measures frames/s and TFLOP/s by precision, then in bf16 with weights cast once, and compiled too."""
    model = build_model(bench, bench.config).eval()
    towers, side = model.towers, bench.config.model.clip.image_size
    assert isinstance(towers, ClipTowers)
    num_frames = 8 if bench.tiny else bench.config.train.batch_size * bench.config.model.max_frames
    shape = (num_frames, 3, side, side)
    frames = torch.randn(shape, device=bench.device, generator=bench.generator())
    operations = 2 * multiply_adds(lambda: towers.encode_images(frames[:1]))
    kinds = [(precision, "") for precision in PRECISIONS] + [("bf16", variant) for variant in VARIANTS]
    rows: list[Row] = []
    for precision, variant in kinds:
        row: Row = {"precision": precision} | ({"variant": variant} if variant else {})
        try:
            ready, cold_start = _prepared(bench, towers, variant, frames)
        except ConfigError as error:  # there is no compiler
            row["left_out"] = str(error)
        else:
            row |= cold_start | _row(bench, ready, precision, frames, operations, len(kinds) - len(rows))
        rows.append(row)
        say("  " + _line(row))
    found = {"image_px": side, "rows": rows}
    speeds = {row.get("variant", row["precision"]): row.get("frames_per_s") for row in rows}
    if speeds["bf16"] and speeds[COMPILED]:
        found["new_over_old"] = speeds[COMPILED] / speeds["bf16"]
        say(f"  encoding for feature stores, new over old: {found['new_over_old']:.3f} times the frames/s")
    return found


def _prepared(
    bench: Bench, towers: ClipTowers, variant: str, frames: torch.Tensor
) -> tuple[ClipTowers, dict[str, float]]:
    """Prepares the towers for a variant; returns them and the seconds of compiling."""
    if not variant:
        return towers, {}
    ready = cast_weights_once(towers, torch.bfloat16)
    if variant != COMPILED:
        return ready, {}

    def rehearse() -> None:
        with torch.inference_mode(), computing_in("bf16", bench.device):
            ready.encode_images(frames)

    began = time.perf_counter()
    compile_towers(ready, "towers", bench.device, rehearse, key="features.compile", say=lambda line: None)
    return ready, {"cold_start_s": time.perf_counter() - began}


def _row(
    bench: Bench, towers: ClipTowers, precision: str, frames: torch.Tensor, operations: float, left: int
) -> Row:
    """Measures one row, with fewer frames if memory does not suffice; ``left`` rows share the time."""
    bench.reset_peak()
    count, timing = len(frames), None
    while timing is None and count:
        part = frames[:count]

        def encode(part: torch.Tensor = part) -> Timing:
            budget_s = bench.left_s() / left
            return seconds_of(bench, lambda: towers.encode_images(part), budget_s=budget_s, most=30)

        with torch.inference_mode(), computing_in(precision, bench.device):
            timing = if_memory_suffices(bench, encode)
        count = count if timing is not None else count // 2
    if timing is None:
        return {"left_out": "not even one frame fits into the device's memory"}
    rate = count / timing.seconds
    row = {"batch_frames": count, "frames_per_s": rate, "tflops": operations * rate / 1e12}
    return row | {"peak_gb": bench.peak_gb(), "runs": timing.runs}


def _line(row: Row) -> str:
    head = f"{row['precision']:<8}" + (f" {row['variant']}:" if "variant" in row else "")
    if "left_out" in row:
        return f"{head} left out: {row['left_out']}"
    return (
        f"{head} {row['batch_frames']} frames at once: {row['frames_per_s']:,.0f} frames/s, "
        f"{row['tflops']:.4g} TFLOP/s, {row['peak_gb']:.2f} GB"
        f"{', cold start {:.1f} s'.format(row['cold_start_s']) if 'cold_start_s' in row else ''}"
    )
