"""A real training run with pipelines/train.py on generated clips: time of a step including its data.

No video is decoded: the frame store and the manifest are written directly. The times are read from the run's
own record of its steps.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gare.config import Config, parse_config
from gare.data.manifest import Manifest, ManifestRow, write_manifest
from gare.model.encoders.compiled import resolve_compile
from gare.train.checkpoint.history import History
from tests.benchmarks.gpu.bench import Bench, OutOfTimeError, Row, say
from tests.benchmarks.gpu.clip_store import write_clips
from tests.benchmarks.gpu.variants import NEW

STEPS, CLIPS, CAPTIONS = 30, 256, 20
#: Number of first steps that are not counted: they load kernels and fill queues.
LEFT_OUT = 5
#: Seconds before the part's end at which the run is asked to stop, since saving takes time.
STOPPING_S = 20.0
#: Seconds within which a stopped run must have ended.
GONE_S = 10.0
REPOSITORY = Path(__file__).resolve().parents[3]
WORDS = ("a", "man", "woman", "dog", "red", "car", "is", "cooking", "runs", "on", "the", "street", "plays")


def measure(bench: Bench) -> Row:
    """Measures ms per step and its wait for data, pairs per second, and the share of the wait."""
    clips, steps = (16, 6) if bench.tiny else (CLIPS, STEPS)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        config = _config(bench, name, steps)
        folder = Path(name) / config.name
        rng = np.random.default_rng(bench.seed)
        ids = [f"clip{number:04d}" for number in range(clips)]
        write_clips(str(folder / "frames"), config.extract, ids, rng)
        rows = tuple(ManifestRow(one, f"/{one}.mp4", None, None, "train", _captions(rng)) for one in ids)
        write_manifest(Manifest(rows, "generated", "none"), str(folder / "manifest.parquet"))
        file = Path(name) / "config.yaml"
        file.write_text(config.to_yaml(), encoding="utf-8")
        history = folder / "runs" / config.train.run / "history.json"
        status = _train(bench, file, history, steps)
        record = History.read(str(history)).steps
    if not record.get("time/step_s"):
        if status is None or bench.left_s() < STOPPING_S:
            raise OutOfTimeError("no step was recorded before the part's time was over")
        raise RuntimeError(f"training ended with status {status}; what it said is above")
    found = summary(record, config.train.batch_size)
    compiled = resolve_compile(config.train.compile, bench.device)
    in_step = [row for row in bench.found.get("step", {}).get("rows", []) if _is_of(row, config, compiled)]
    if in_step:
        found["times_the_step_alone"] = found["wall_ms"] / in_step[0]["step_ms"]
    _tell(found)
    return found


def _config(bench: Bench, root: str, steps: int) -> Config:
    """Returns the configuration with one worker, this device, and outputs below ``root``."""
    overrides = [
        f"storage.root={root}",
        "name=bench-gpu",
        "extract.encoding=jpeg",
        "model.clip.vocab_size=49408",
        "train.run=bench",
        f"train.max_steps={steps}",
        "train.epochs=1000",  # the run is ended by the number of steps
        "train.checkpoint_every_s=0",
        "train.clip_weights=",
        "train.diagnostics_every=0",
        "data.val_videos=0",
        "tracking.uri=sqlite:///mlflow.db",
        "cluster.address=",
        "cluster.train_workers=1",
        f"cluster.use_gpu={str(bench.is_gpu).lower()}",
    ]
    return parse_config(bench.config.model_dump(mode="json"), overrides)


def _captions(rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(" ".join(rng.choice(WORDS, int(rng.integers(5, 13)))) for _ in range(CAPTIONS))


def _train(bench: Bench, file: Path, history: Path, steps: int) -> int | None:
    """Runs the pipeline until its record has all steps or time is up; returns its exit status, if ended."""
    # PYTHONPATH, because Ray's workers import the project too.
    paths = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH", ""))))
    process = subprocess.Popen(
        [sys.executable, "pipelines/train.py", "--config", str(file)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
    )
    stops_at = time.perf_counter() + max(bench.left_s() - STOPPING_S, 0.0)
    try:
        while process.poll() is None and time.perf_counter() < stops_at and not _has(history, steps):
            time.sleep(0.2)
        if process.poll() is None and not _has(history, steps):
            process.send_signal(signal.SIGTERM)  # it saves its record and ends
            while process.poll() is None and bench.left_s() and not history.exists():
                time.sleep(0.2)
        return process.poll()
    finally:
        # The remaining work, registering the model, is not needed.
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(GONE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _has(history: Path, steps: int) -> bool:
    """Returns True if the record exists and has all steps."""
    if not history.exists():
        return False
    return len(History.read(str(history)).steps.get("time/step_s", ())) >= steps


def _is_of(row: Row, config: Config, compiled: str) -> bool:
    kind = "gare" if config.model.increment else "baseline"
    named = row["model"], row["precision"], row["compile"], row.get("variant", NEW)
    return named == (kind, config.train.precision, compiled, NEW) and "step_ms" in row


def summary(record: Mapping[str, Sequence[Sequence[float]]], batch_size: int) -> dict[str, Any]:
    """Returns medians of a run's recorded steps, without the first ones.

    Args:
        record: (step, value) by metric name, as in ``history.json``.
        batch_size: pairs of a step.
    """
    seconds = {
        name: [value for _, value in points] for name, points in record.items() if name.startswith("time/")
    }
    # A run that was cut short keeps at least one step.
    skip = min(LEFT_OUT, len(seconds["time/step_s"]) - 1)
    medians = {name: statistics.median(values[skip:]) for name, values in seconds.items() if values[skip:]}
    waits = seconds.get("time/data_wait_s", [0.0] * len(seconds["time/step_s"]))
    walls = [step + wait for step, wait in zip(seconds["time/step_s"], waits, strict=True)][skip:]
    return {
        "steps": len(walls),
        "steps_left_out": skip,
        "wall_ms": 1e3 * statistics.median(walls),
        "pairs_per_s": batch_size * len(walls) / sum(walls),
        "data_wait_share": sum(waits[skip:]) / sum(walls),
        "ms": {name.removeprefix("time/").removesuffix("_s"): 1e3 * at for name, at in medians.items()},
    }


def _tell(found: Row) -> None:
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in found["ms"].items())
    alone = found.get("times_the_step_alone")
    say(
        f"  {found['steps']} steps: {found['wall_ms']:.0f} ms each"
        f"{f' ({alone:.1f} times the step alone)' if alone else ''}, {found['pairs_per_s']:.1f} pairs/s, "
        f"waiting for data {100 * found['data_wait_share']:.0f} %\n    ms: {parts}"
    )
