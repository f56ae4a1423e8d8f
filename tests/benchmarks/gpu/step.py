"""A training step by stage: baseline and GARE in every training precision, and by ``VARIANTS``.

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
from gare.errors import ConfigError
from gare.model.gare import GARE
from gare.train.stages import start_recording, stop_recording
from gare.train.step import Learner, build_learner, train_step
from tests.benchmarks.gpu.bench import Bench, Row, if_memory_suffices, once, say, seconds_of
from tests.benchmarks.gpu.variants import VARIANTS, LoopingBertAdam, Variant, ratios
from tests.benchmarks.size import multiply_adds

#: Number of steps with measured stages; each end of a stage then waits for the device.
WATCHED = 5
#: Number of steps of a run, so large that no learning rate reaches its peak.
STEPS_OF_A_RUN = 10**6


def measure(bench: Bench) -> Row:
    """Measures one row for each model and precision, not compiled, then one for each variant."""
    kinds = {"baseline": bench.config.model.baseline(), "gare": bench.config.model}
    precisions = [one for one in get_args(TrainConfig.model_fields["precision"].annotation) if one != "auto"]
    batch = random_batch(bench)
    rows: list[Row] = []
    for kind, model_config in kinds.items():
        left = len(kinds) * len(precisions) + len(VARIANTS) - len(rows)
        rows += _of_model(bench, kind, model_config, precisions, batch, left)
    varied = _of_variants(bench, batch)
    found = ratios(varied)
    if found:
        say("  " + ", ".join(f"{name.replace('_', ' ')} {ratio:.3f}" for name, ratio in found.items()))
    return {
        "optimizer": bench.config.train.optimizer,
        "ratios": found,
        "frames": batch.frames.shape[1],
        "image_px": batch.frames.shape[-2],
        "rows": rows + varied,
    }


def _of_model(
    bench: Bench, kind: str, model_config: ModelConfig, precisions: Sequence[str], batch: Batch, left: int
) -> list[Row]:
    """Measures the rows of one model; ``left`` rows, including these, share the part's remaining time."""
    model = build_model(bench, bench.config.model_copy(update={"model": model_config}))
    operations = tower_operations(model, batch)
    rows = []
    for number, precision in enumerate(precisions):
        budget_s = bench.left_s() / (left - number)
        row: Row = {"model": kind, "precision": precision, "compile": "off"}
        row |= _measured(bench, model, precision, batch, operations, budget_s)
        rows.append(row)
        say("  " + _line(row))
    return rows


def _of_variants(bench: Bench, batch: Batch) -> list[Row]:
    """Measures GARE in bf16, with a new model per row, because compiled code stays compiled."""
    rows = []
    for number, variant in enumerate(VARIANTS):
        model = build_model(bench, bench.config)
        operations = tower_operations(model, batch)
        budget_s = bench.left_s() / (len(VARIANTS) - number)
        how = "towers" if "train.compile=towers" in variant.settings else "off"
        row: Row = {"model": "gare", "precision": "bf16", "compile": how, "variant": variant.name}
        row |= _measured(bench, model, "bf16", batch, operations, budget_s, variant)
        rows.append(row)
        say("  " + _line(row))
    return rows


def build_model(bench: Bench, config: Config) -> GARE:
    """Builds a model with random weights, on the device."""
    torch.manual_seed(bench.seed)
    with bench.device:
        return GARE(config.model)


def random_batch(bench: Bench) -> Batch:
    """Draws a batch of the configured size on the device: whole clips, captions of 8 words and more."""
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
    """Counts the operations of the towers per pair in a training step: three times the forward's."""
    few = batch[:2]

    def forward() -> None:
        model.encode_text(few.token_ids, few.token_mask)
        model.encode_video(normalise(few.frames), few.frame_mask)

    return 3 * 2 * multiply_adds(forward) / len(few.frames)


def _measured(
    bench: Bench,
    model: GARE,
    precision: str,
    batch: Batch,
    operations: float,
    budget_s: float,
    variant: Variant | None = None,
) -> Row:
    """Measures a model in one precision, with fewer pairs if memory does not suffice."""
    settings = variant.settings if variant else ("train.compile=off",)
    if precision == "fp16_released":  # requires this optimiser
        settings = (*settings, "train.optimizer=bert_adam")
    config = parse_config(
        bench.config.model_dump(mode="json") | {"model": model.config.model_dump(mode="json")},
        # Freezes the same parameters as train.clip_weights does.
        [f"train.precision={precision}", "train.diagnostics_every=0", "train.freeze=patch_conv", *settings],
    )
    size = len(batch.frames)
    while size >= 2:
        bench.reset_peak()
        steps = partial(_steps, bench, model, config, batch[:size], budget_s)
        if variant and variant.is_old:
            steps = partial(steps, is_old=True)
        try:
            found = if_memory_suffices(bench, steps)
        except ConfigError as error:  # there is no compiler
            return {"left_out": str(error)}
        model.zero_grad(set_to_none=True)
        if found is not None:
            break
        size //= 2
    else:
        return {"left_out": "not even two pairs fit into the device's memory"}
    torch.set_float32_matmul_precision("highest")  # resets the setting of the precision
    row: Row = {"pairs": size, **found}
    row["pairs_per_s"] = size / row["step_ms"] * 1e3
    row["tflops"] = operations * row["pairs_per_s"] / 1e12
    if size < len(batch.frames):
        row["note"] = f"{len(batch.frames)} pairs do not fit into the device's memory"
    if ceilings := bench.found.get("ceilings", {}).get("tflops"):
        row["share_of_ceiling"] = {name: row["tflops"] / rate for name, rate in ceilings.items()}
    return row


def _steps(
    bench: Bench, model: GARE, config: Config, batch: Batch, budget_s: float, *, is_old: bool = False
) -> dict[str, Any]:
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"batch_size": len(batch.frames)})}
    )
    began = time.perf_counter()
    learner = build_learner(model, config, STEPS_OF_A_RUN, bench.device)
    built_s = time.perf_counter() - began
    if is_old:
        learner.optimizer = LoopingBertAdam(learner.optimizer)
    once(bench, lambda: train_step(learner, batch))  # warm-up: loads kernels and libraries
    timing = seconds_of(bench, lambda: train_step(learner, batch), budget_s=budget_s / 2, most=20)
    # Most of it is compiling, less if the same code was compiled before, in this run or an earlier one.
    cold_start = {"cold_start_s": built_s} if config.train.compile == "towers" else {}
    return {
        **cold_start,
        "step_ms": timing.seconds * 1e3,
        "runs": timing.runs,
        "peak_gb": bench.peak_gb(),
        "stages_ms": _stages(bench, learner, batch, budget_s / 3),
    }


def _stages(bench: Bench, learner: Learner, batch: Batch, budget_s: float) -> dict[str, float]:
    """Returns the median milliseconds of each stage; ``other`` is the time outside all stages."""
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
    if "variant" in row:
        head += f" {row['variant']}:"
    if "left_out" in row:
        return f"{head} left out: {row['left_out']}"
    stages = ", ".join(f"{name} {ms:.1f}" for name, ms in row["stages_ms"].items())
    share = ", ".join(
        f"{100 * part:.0f} % of {name}" for name, part in row.get("share_of_ceiling", {}).items()
    )
    text = (
        f"{head} {row['pairs']} pairs: {row['step_ms']:.1f} ms, {row['pairs_per_s']:.1f} pairs/s, "
        f"{row['tflops']:.4g} TFLOP/s{f' ({share})' if share else ''}, {row['peak_gb']:.2f} GB"
        f"{', cold start {:.1f} s'.format(row['cold_start_s']) if 'cold_start_s' in row else ''}\n"
        f"    by stage, ms: {stages}"
    )
    return text + (f"\n    {row['note']}" if "note" in row else "")
