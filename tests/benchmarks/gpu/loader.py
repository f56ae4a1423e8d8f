"""Clips per second of the loader on this machine's CPUs: one process, and one process per CPU.

As a command, ``python -m tests.benchmarks.gpu.loader STORE CONFIG``, it is a process that loads on request.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gare.config import Config, load_config
from tests.benchmarks.gpu.bench import Bench, OutOfTimeError, Row, say
from tests.benchmarks.gpu.clip_store import write_clips
from tests.benchmarks.gpu.parts import is_there

CLIPS, BATCH = 96, 8
#: Packages needed for augmentation.
AUGMENTING = ("cv2",)
REPOSITORY = Path(__file__).resolve().parents[3]


def make_loader(
    store: str, config: Config, batches: Sequence[Sequence[str]], *, augmented: bool
) -> Callable[[int], int]:
    """Makes the loader from the store to the training step, in one process.

    No other function of the benchmark depends on the loader.

    Args:
        store: location of the frame store.
        config: configuration of the run.
        batches: video ids of each batch.
        augmented: True to augment clips as ``config.augment`` says.

    Returns:
        A function that loads a batch by its number and returns how many clips it has.
    """
    from gare.train.input.loader import FrameLoader
    from gare.train.input.tokens import CaptionTokens
    from tests.helpers.plans import listed

    plan = listed(batches)
    num, width = len(plan.ids["train"]), config.model.max_words
    # The values of the tokens do not matter here.
    tokens = CaptionTokens(np.ones((num, width), np.uint16), np.full(num, 8, np.uint16), np.arange(num + 1))
    load = FrameLoader(store, plan, {"train": tokens}, augment=config.augment if augmented else None)
    return lambda number: len(load(number, 0, len(batches[number]))["frames"])


def measure(bench: Bench) -> Row:
    """Measures clips/s, plain and augmented, of one process and of one process per CPU."""
    cpus = 2 if bench.tiny else len(os.sched_getaffinity(0))
    seconds = 0.05 if bench.tiny else min(3.0, bench.left_s() / 10)
    found: Row = {"cpus": cpus, "image_px": bench.config.extract.image_size, "clips_per_s": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = bench.config.model_copy(
            update={"extract": bench.config.extract.model_copy(update={"encoding": "jpeg"})}
        )
        (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        ids = [f"clip{number:04d}" for number in range(16 if bench.tiny else CLIPS)]
        write_clips(str(folder / "frames"), config.extract, ids, np.random.default_rng(bench.seed))
        with Processes(cpus, folder, bench.left_s()) as processes:
            for kind in ("plain", "augmented"):
                absent = [package for package in AUGMENTING if not is_there(package)]
                if kind == "augmented" and absent:
                    found["clips_per_s"][kind] = {"left_out": f"{', '.join(absent)} is not installed"}
                else:
                    one = processes.clips_per_s(kind, 1, seconds)
                    all_of_them = processes.clips_per_s(kind, cpus, seconds)
                    per_cpu = all_of_them / cpus
                    rates = {"one_process": one, "all_cpus": all_of_them, "per_cpu": per_cpu}
                    found["clips_per_s"][kind] = rates
                say(f"  {kind:<10} {_line(found['clips_per_s'][kind])}")
    fastest = max((row.get("pairs_per_s", 0.0) for row in _steps(bench)), default=0.0)
    if fastest:
        found["gpu_takes_pairs_per_s"] = fastest
        say(f"  the fastest training step takes {fastest:.0f} clips/s")
    return found


def _steps(bench: Bench) -> list[Row]:
    rows: list[Row] = bench.found.get("step", {}).get("rows", [])
    return rows


def _line(rates: Row) -> str:
    if "left_out" in rates:
        return f"left out: {rates['left_out']}"
    return (
        f"{rates['one_process']:.1f} clips/s in one process, {rates['all_cpus']:.1f} on all CPUs, "
        f"{rates['per_cpu']:.1f} a CPU"
    )


class Processes:
    """Processes with one thread each that load on request; ended on exit.

    Args:
        count: number of processes.
        folder: folder with the store and the configuration.
        limit_s: seconds after which they are killed.
    """

    def __init__(self, count: int, folder: Path, limit_s: float) -> None:
        # Without the GPU: a process that only queries it takes some of its memory.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        environment = os.environ | threads | {"CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "tests.benchmarks.gpu.loader"]
        command += [str(folder / "frames"), str(folder / "config.yaml")]
        self.processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
                env=environment,
                cwd=REPOSITORY,
            )
            for _ in range(count)
        ]
        self.is_late = False
        self.timer = threading.Timer(limit_s, self._end)

    def __enter__(self) -> Processes:
        self.timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        self._kill()
        for process in self.processes:
            process.communicate()

    def _end(self) -> None:
        self.is_late = True
        self._kill()

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()

    def clips_per_s(self, kind: str, count: int, seconds: float) -> float:
        """Returns clips/s of the first ``count`` processes together, after all have warmed up."""
        self._ask(count, f"{kind} 0")
        answers = [answer.split() for answer in self._ask(count, f"{kind} {seconds}")]
        return sum(int(clips) / float(taken) for clips, taken in answers)

    def _ask(self, count: int, request: str) -> list[str]:
        asked, answers = self.processes[:count], [""]
        # A process that has ended cannot be written to.
        with contextlib.suppress(BrokenPipeError):
            for process in asked:
                assert process.stdin is not None
                process.stdin.write(request + "\n")
            answers = [process.stdout.readline() for process in asked if process.stdout is not None]
        if not all(answers):
            if self.is_late:
                raise OutOfTimeError("the part's time was over before all processes had loaded their clips")
            raise RuntimeError("a loading process ended; what it said is above")
        return answers


def main() -> None:
    """Answers requests ``KIND SECONDS`` with the clips that were loaded and the seconds that it took."""
    store, config = sys.argv[1], load_config(sys.argv[2])
    from gare.data.store.contents import Store

    ids = sorted(Store(store).ids())
    np.random.default_rng(os.getpid()).shuffle(ids)  # processes read different clips at the same time
    batches = [ids[first : first + BATCH] for first in range(0, len(ids), BATCH)]
    loaders: dict[str, Callable[[int], int]] = {}
    for request in sys.stdin:
        kind, seconds = request.split()
        if kind not in loaders:
            loaders[kind] = make_loader(store, config, batches, augmented=kind == "augmented")
        load = loaders[kind]
        clips, number, started = 0, 0, time.perf_counter()
        while not clips or time.perf_counter() - started < float(seconds):
            clips += load(number % len(batches))
            number += 1
        sys.stdout.write(f"{clips} {time.perf_counter() - started}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
