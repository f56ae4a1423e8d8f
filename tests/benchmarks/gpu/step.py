"""A training step by stage, baseline and GARE, in every precision that training has.

B pairs, F frames, W words.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

import torch

from gare.config import Config, ModelConfig, TrainConfig, parse_config
from gare.data.batch import Batch
from gare.data.images import normalise
from gare.model.gare import GARE
from gare.train.stages import start_recording, stop_recording
from gare.train.step import Learner, build_learner, train_step
from tests.benchmarks.gpu.bench import Bench, Row, if_memory_suffices, once, say, seconds_of
from tests.benchmarks.size import multiply_adds

#: Steps whose stages are measured; every border of a stage waits for the device then.
WATCHED = 5
#: No learning rate of a benchmark is to reach its peak.
STEPS_OF_A_RUN = 10**6


def measure(bench: Bench) -> Row:
    """One row for each model and precision; the batch is on the device."""
    kinds = {"baseline": bench.config.model.baseline(), "gare": bench.config.model}
    precisions = get_args(TrainConfig.model_fields["precision"].annotation)
    batch = random_batch(bench)
    rows: list[Row] = []
    for kind, model_config in kinds.items():
        left = len(kinds) * len(precisions) - len(rows)
        rows += _of_model(bench, kind, model_config, precisions, batch, left)
    return {
        "optimizer": bench.config.train.optimizer,
        "frames": batch.frames.shape[1],
        "image_px": batch.frames.shape[-2],
        "rows": rows,
    }


def _of_model(
    bench: Bench, kind: str, model_config: ModelConfig, precisions: Sequence[str], batch: Batch, left: int
) -> list[Row]:
    """The rows of one model; ``left`` rows, these among them, share the time that the part has left."""
    model = build_model(bench, bench.config.model_copy(update={"model": model_config}))
    operations = tower_operations(model, batch)
    rows = []
    for number, precision in enumerate(precisions):
        budget_s = bench.left_s() / (left - number)
        row: Row = {"model": kind, "precision": precision}
        row |= _measured(bench, model, precision, batch, operations, budget_s)
        rows.append(row)
        say("  " + _line(row))
    return rows


def build_model(bench: Bench, config: Config) -> GARE:
    """A model with random weights, on the device."""
    torch.manual_seed(bench.seed)
    with bench.device:
        return GARE(config.model)


def random_batch(bench: Bench) -> Batch:
    """A batch of the configuration's size on the device: whole clips, captions of 8 words and more."""
    config, generator = bench.config, bench.generator()
    size, model = config.train.batch_size, config.model
    side = model.clip.image_size

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, device=bench.device, generator=generator)

    lengths_B = integers(min(8, model.max_words), model.max_words + 1, size)
    mask_BW = torch.arange(model.max_words, device=bench.device) < lengths_B.unsqueeze(1)
    shape = (size, model.max_frames, side, side, 3)
    return Batch(
        integers(1, model.clip.vocab_size, size, model.max_words) * mask_BW,
        mask_BW,
        integers(0, 256, *shape).to(torch.uint8),
        torch.ones(size, model.max_frames, dtype=torch.bool, device=bench.device),
        torch.arange(size, device=bench.device),
    )


def tower_operations(model: GARE, batch: Batch) -> float:
    """Operations of the towers in a training step, of one pair: three times those of the forward."""
    few = batch[:2]

    def forward() -> None:
        model.encode_text(few.token_ids, few.token_mask)
        model.encode_video(normalise(few.frames), few.frame_mask)

    return 3 * 2 * multiply_adds(forward) / len(few.frames)


def _measured(
    bench: Bench, model: GARE, precision: str, batch: Batch, operations: float, budget_s: float
) -> Row:
    """The row of one model in one precision, with fewer pairs where memory does not suffice."""
    config = parse_config(
        bench.config.model_dump(mode="json") | {"model": model.config.model_dump(mode="json")},
        # What is frozen is what train.clip_weights freezes.
        [f"train.precision={precision}", "train.diagnostics_every=0", "train.freeze=patch_conv"],
    )
    size = len(batch.frames)
    while size >= 2:
        bench.reset_peak()
        found = if_memory_suffices(bench, partial(_steps, bench, model, config, batch[:size], budget_s))
        model.zero_grad(set_to_none=True)
        if found is not None:
            break
        size //= 2
    else:
        return {"left_out": "not even two pairs fit into the device's memory"}
    torch.set_float32_matmul_precision("highest")  # whatever the precision set
    row: Row = {"pairs": size, **found}
    row["pairs_per_s"] = size / row["step_ms"] * 1e3
    row["tflops"] = operations * row["pairs_per_s"] / 1e12
    if size < len(batch.frames):
        row["note"] = f"{len(batch.frames)} pairs do not fit into the device's memory"
    if ceilings := bench.found.get("ceilings", {}).get("tflops"):
        row["share_of_ceiling"] = {name: row["tflops"] / rate for name, rate in ceilings.items()}
    return row


def _steps(bench: Bench, model: GARE, config: Config, batch: Batch, budget_s: float) -> dict[str, Any]:
    learner = build_learner(model, config, STEPS_OF_A_RUN, bench.device)
    once(bench, lambda: train_step(learner, batch))  # kernels and libraries are loaded
    timing = seconds_of(bench, lambda: train_step(learner, batch), budget_s=budget_s / 2, most=20)
    return {
        "step_ms": timing.seconds * 1e3,
        "runs": timing.runs,
        "peak_gb": bench.peak_gb(),
        "stages_ms": _stages(bench, learner, batch, budget_s / 3),
    }


def _stages(bench: Bench, learner: Learner, batch: Batch, budget_s: float) -> dict[str, float]:
    """Median milliseconds of each stage; ``other`` is what no stage has."""
    recorder = start_recording(bench.device)
    steps: list[dict[str, float]] = []
    began = time.perf_counter()
    try:
        while not steps or (len(steps) < WATCHED and time.perf_counter() - began < budget_s):
            started = recorder.now()
            train_step(learner, batch)
            whole = recorder.now() - started
            seconds = recorder.take()
            steps.append(seconds | {"other": max(whole - sum(seconds.values()), 0.0)})
    finally:
        stop_recording()
    names = dict.fromkeys(name for step in steps for name in step)
    return {name: 1e3 * statistics.median(step.get(name, 0.0) for step in steps) for name in names}


def _line(row: Row) -> str:
    head = f"{row['model']:<9} {row['precision']:<8}"
    if "left_out" in row:
        return f"{head} left out: {row['left_out']}"
    stages = ", ".join(f"{name} {ms:.1f}" for name, ms in row["stages_ms"].items())
    share = ", ".join(
        f"{100 * part:.0f} % of {name}" for name, part in row.get("share_of_ceiling", {}).items()
    )
    text = (
        f"{head} {row['pairs']} pairs: {row['step_ms']:.1f} ms, {row['pairs_per_s']:.1f} pairs/s, "
        f"{row['tflops']:.4g} TFLOP/s{f' ({share})' if share else ''}, {row['peak_gb']:.2f} GB\n"
        f"    by stage, ms: {stages}"
    )
    return text + (f"\n    {row['note']}" if "note" in row else "")
