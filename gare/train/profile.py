"""The profile of a run: seconds by stage of every step, as a table, a picture and a trace."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gare.train.input.loader import PARTS
from gare.train.loss.gather import world_size
from gare.train.stages import STAGES, start_recording, stop_recording, watch_gradients
from gare.train.step import Learner

#: Steps before the trace, in which kernels are loaded and memory is allocated.
WARM_UP = 3
#: Steps of the trace. Tracing makes them slower, so the table leaves them out.
TRACED = 3


class Profile:
    """Profile of the steps of one worker.

    Args:
        learner: whose steps are measured.
        device: that it trains on.
        trace: file for a Chrome trace of a few steps; empty for none.
    """

    def __init__(self, learner: Learner, device: torch.device, trace: str = "") -> None:
        self.recorder = start_recording(device)
        watch_gradients(learner.objective, self.recorder)
        self.steps: list[dict[str, float]] = []
        self.loading: list[dict[str, float]] = []
        left = learner.num_steps - learner.step
        self._trace, self._device = trace, device
        self._traced = range(min(WARM_UP, max(left - TRACED, 0)), min(WARM_UP + TRACED, left))
        self._profiler: Any = None
        self._begin_trace()

    def step(self, values: Mapping[str, float]) -> None:
        """Records a step; its values include ``time/step_s`` and ``time/data_wait_s``."""
        seconds = self.recorder.take()
        seconds["other"] = max(values["time/step_s"] - sum(seconds.values()), 0.0)
        self.steps.append(seconds | {"data_wait": values["time/data_wait_s"]})
        self.loading.append({part: values.get(f"time/data_{part}_s", 0.0) for part in (*PARTS, "transfer")})
        if self._profiler is not None and len(self.steps) == self._traced.stop:
            self._profiler.stop()
            self._profiler.export_chrome_trace(self._trace)
            self._profiler = None
        self._begin_trace()

    def _begin_trace(self) -> None:
        if not self._trace or len(self.steps) != self._traced.start or not self._traced:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()

    def finish(self) -> dict[str, Any]:
        """Ends the measuring and joins all workers' measurements; all workers must call it.

        Returns:
            ``workers``, ``steps`` (the number in the means), ``left_out``, ``mean_s`` by stage for each
            worker, and for this worker ``by_step`` and ``loading_s``, the mean seconds by part of loading a
            batch, in parallel to the steps.
        """
        stop_recording()
        left_out = {0, *self._traced} if self._trace else {0}
        counted = [step for number, step in enumerate(self.steps) if number not in left_out]
        counted, left_out = (counted, left_out) if counted else (self.steps, set())
        loading = [self.loading[number] for number in range(len(self.steps)) if number not in left_out]
        means = {
            name: statistics.fmean(step.get(name, 0.0) for step in counted)
            for name in STAGES
            if any(name in step for step in counted)
        }
        of_all: list[dict[str, float]] = [means] * world_size()
        if world_size() > 1:
            dist.all_gather_object(of_all, means)
        return {
            "workers": world_size(),
            "steps": len(counted),
            "left_out": sorted(number for number in left_out if number < len(self.steps)),
            "mean_s": of_all,
            "by_step": self.steps,
            "loading_s": {
                part: statistics.fmean(one[part] for one in loading) for part in (*PARTS, "transfer")
            }
            if loading
            else {},
        }


def table(profile: Mapping[str, Any]) -> str:
    """Formats the profile as text: mean seconds of the workers by stage, shares, and the slowest worker."""
    means: Sequence[Mapping[str, float]] = profile["mean_s"]
    names = [name for name in STAGES if any(name in worker for worker in means)]
    mean = {name: statistics.fmean(worker.get(name, 0.0) for worker in means) for name in names}
    whole = sum(mean.values()) or 1.0
    out = ", the first and the traced ones left out" if profile["left_out"] else ""
    of = f"{profile['workers']} worker{'s' * (profile['workers'] > 1)}"
    lines = [
        f"profile: mean seconds a step, {profile['steps']} steps{out}, {of}",
        f"  {'stage':<14} {'seconds':>9} {'share':>7}  {'slowest worker':<16} what it is",
    ]
    for name in names:
        slowest = max(range(len(means)), key=lambda rank: means[rank].get(name, 0.0))
        worst = f"{means[slowest].get(name, 0.0):.4f} ({slowest})"
        lines.append(
            f"  {name:<14} {mean[name]:>9.4f} {100 * mean[name] / whole:>5.1f} %  {worst:<16} {STAGES[name]}"
        )
    lines.append(f"  {'all':<14} {whole:>9.4f}")
    parts = [f"{part} {seconds:.4f}" for part, seconds in profile.get("loading_s", {}).items()]
    if parts:
        lines.append(
            f"  loading a batch took, beside the steps and shared by the loaders: {', '.join(parts)}"
        )
    return "\n".join(lines)


def picture(profile: Mapping[str, Any], title: str) -> bytes:
    """Draws every step of the first worker as a stack of its stages.

    Returns:
        A PNG.
    """
    from matplotlib.figure import Figure

    from gare.report.pictures import FAINT, INK, LINES, as_png

    steps: Sequence[Mapping[str, float]] = profile["by_step"]
    names = [name for name in STAGES if any(step.get(name) for step in steps)]
    figure = Figure(figsize=(9.6, 4.6), dpi=100, facecolor="white")
    axes = figure.subplots()
    figure.subplots_adjust(left=0.09, right=0.76, top=0.88, bottom=0.13)
    figure.text(0.012, 0.95, title, size=12, weight="bold", color=INK, va="center")
    series = [[step.get(name, 0.0) for step in steps] for name in names]
    colours = [(*LINES, *(FAINT, INK, "#b59f00", "#7a4fa3", "#8c564b"))[at] for at in range(len(names))]
    axes.stackplot(range(1, len(steps) + 1), series, labels=names, colors=colours, step="mid", linewidth=0)
    # The first steps load kernels; on their scale all others would be flat.
    totals = sorted(sum(step.values()) for step in steps)
    axes.set_ylim(0, 1.3 * totals[int(0.9 * (len(totals) - 1))] if totals else 1)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("seconds", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1.0), reverse=True)
    return as_png(figure)


def trace_file(folder: str) -> str:
    """Returns the path of the Chrome trace; its suffix makes the profiler compress it."""
    return str(Path(folder) / "trace.json.gz")
