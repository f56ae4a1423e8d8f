"""The progress line of a training run, with advice if the run waits for data."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.status.progress import duration

EVERY_S = 10.0
#: Share of the time spent waiting for data above which the line calls the run slow because of it.
SLOW_SHARE = 0.2
#: Loss terms in the order of the line, with their names in it.
_TERMS = {
    "loss/nce_t2v": "t2v",
    "loss/nce_v2t": "v2t",
    "loss/bottleneck": "bottleneck",
    "loss/radii": "radii",
    "loss/direction": "direction",
}
#: Parts of loading a batch: the metric's name, and its name in the line.
PARTS = {
    "fetch": "fetching from the store",
    "jpeg": "decoding JPEG",
    "augment": "augmentation",
    "transfer": "the transfer to the device",
}
_SCORES = {"val/t2v/R1": "t2v", "val/v2t/R1": "v2t"}


@dataclass(frozen=True)
class RunShape:
    """Size of a training run.

    Attributes:
        run: its name.
        epoch_ends: steps done at the end of each epoch.
        batch_size: global batch.
        rank: rank of this worker; ranks above 0 log only if they wait for data.
        advice: returns advice for the part of the loading that takes longest.
        on_device: parts of the loading that happen during the transfer to the device; others are done by the
            loaders.
    """

    run: str
    epoch_ends: tuple[int, ...]
    batch_size: int
    rank: int = 0
    advice: Callable[[str], str] = str
    on_device: tuple[str, ...] = ("transfer",)

    @property
    def steps(self) -> int:
        """Number of steps of the whole run."""
        return self.epoch_ends[-1]

    def epoch(self, step: int) -> int:
        """Returns the epoch, counted from 1, of the step that was the given number of steps into the run."""
        return min(bisect_left(self.epoch_ends, step) + 1, len(self.epoch_ends))


class TrainStatus:
    """Sums up steps and returns a status line now and then; rates are of the steps since the last line.

    Args:
        whole: size of the run.
        step: steps done before.
        memory: returns the memory held by this worker, as text for the line.
        clock: returns seconds from any starting point.
    """

    def __init__(
        self,
        whole: RunShape,
        step: int,
        memory: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.whole, self._memory, self._clock = whole, memory, clock
        self._first, self._said_step = step, step
        self._began = self._said = clock()
        self._waited = self._worked = 0.0
        self._parts = dict.fromkeys(PARTS, 0.0)
        self._spoke = False
        self._scores: dict[str, tuple[int, float]] = {}
        self._best = 0.0

    def validated(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Stores the metrics of a validation after ``epoch`` epochs."""
        for name, value in metrics.items():
            if name in _SCORES:
                self._scores[_SCORES[name]] = (epoch, value)
        self._best = max(self._best, metrics.get("val/t2v/R1", 0.0))

    def step(self, step: int, values: Mapping[str, float]) -> str:
        """Adds a step and returns the line if it is time for one, else an empty string.

        The first and the last step always have a line.

        Args:
            step: steps done.
            values: the step's metrics by name, with ``time/step_s`` and ``time/data_wait_s``, and if known
                ``time/data_PART_s`` for each of ``PARTS``.
        """
        self._waited += values["time/data_wait_s"]
        self._worked += values["time/step_s"]
        for part in PARTS:
            self._parts[part] += values.get(f"time/data_{part}_s", 0.0)
        now = self._clock()
        if self._spoke and now - self._said < EVERY_S and step != self.whole.steps:
            return ""
        line = self._line(step, values, now)
        # The first batch is waited for while actors start, which is no sign of slow data.
        is_slow = self._spoke and self._share() > SLOW_SHARE
        self._spoke, self._said, self._said_step = True, now, step
        self._waited = self._worked = 0.0
        self._parts = dict.fromkeys(PARTS, 0.0)
        if self.whole.rank:
            return line if is_slow else ""
        return line

    def _share(self) -> float:
        return self._waited / max(self._waited + self._worked, 1e-9)

    def _line(self, step: int, values: Mapping[str, float], now: float) -> str:
        whole = self.whole
        rate = (step - self._said_step) / max(now - self._said, 1e-9)
        overall = (step - self._first) / max(now - self._began, 1e-9)
        share = self._share()
        name = whole.run if not whole.rank else f"{whole.run}, worker {whole.rank}"
        parts = [
            f"{name}: step {step} of {whole.steps} ({100 * step / max(whole.steps, 1):.0f} %), "
            f"epoch {whole.epoch(step)} of {len(whole.epoch_ends)}",
            f"loss {values['loss/total']:.3f}{_bracketed(values)}",
            self._val(),
            f"{rate * whole.batch_size:.{0 if rate * whole.batch_size >= 10 else 1}f} pairs/s",
            f"data wait {100 * share:.0f} %",
            self._memory(),
            f"{duration((whole.steps - step) / overall)} left" if overall else "",
        ]
        line = ", ".join(part for part in parts if part)
        if self._spoke and share > SLOW_SHARE:
            line += f"; SLOW because of data: {self._slow(step - self._said_step)}"
        return line

    def _slow(self, steps: int) -> str:
        """Returns the slowest part of the loading and what to do about it.

        Loaders and the copy to the device overlap: a step waits for the slower of the two.
        """
        seconds = {part: spent / max(steps, 1) for part, spent in self._parts.items()}
        lines = [self.whole.on_device, [part for part in PARTS if part not in self.whole.on_device]]
        slower = max(lines, key=lambda parts: sum(seconds[part] for part in parts))
        part = max(slower, key=lambda name: seconds[name])
        return f"{PARTS[part]} takes {seconds[part]:.3g} s a batch: {self.whole.advice(part)}"

    def _val(self) -> str:
        if not self._scores:
            return ""
        scores = [f"{value:.1f} {name}" for name, (_, value) in self._scores.items()]
        epoch, newest = next(iter(self._scores.values()))
        best = f" (best {self._best:.1f})" if self._best > newest else ""
        return f"val R@1 {' '.join(scores)} after epoch {epoch}{best}"


def _bracketed(values: Mapping[str, float]) -> str:
    terms = [f"{name} {values[key]:.3g}" for key, name in _TERMS.items() if values.get(key)]
    return f" ({', '.join(terms)})" if terms else ""


def advice(part: str, *, from_features: bool, can_be_raw: bool, loaders: int, on_gpu: bool = False) -> str:
    """Returns advice on making data arrive faster.

    Args:
        part: the part of ``PARTS`` that takes longest.
        from_features: True if the run learns from a feature store.
        can_be_raw: True if the frame store holds JPEGs that could be raw frames.
        loaders: number of loading actors for each worker.
        on_gpu: True if clips are augmented on a GPU.
    """
    more = f"raise cluster.loaders_per_worker (now {loaders}) where CPUs are free"
    features = "learn from features (train.input=features)"
    if part == "transfer":
        return "give the worker more CPUs (cluster.cpus_per_worker): others use those that copy"
    if from_features:
        return f"raise features.cache_mb so that the store fits into memory, or {more}"
    if part == "fetch":
        return f"{more}, bring the store nearer (storage.root), or {features}"
    if part == "augment":
        return f"lower augment.operations, or {'' if on_gpu else f'{more}, or '}{features}"
    raw = ", extract with extract.encoding=raw" if can_be_raw else ""
    return f"{more}{raw}, or {features}"
