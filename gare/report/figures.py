"""Figures of an evaluation and of a training for MLflow: ranks, similarities, increments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gare.report.pictures import FAINT, INK, LINES, as_png, draw_lines, drawable

#: Largest number of videos in the similarity matrix.
SHOWN = 100
_EDGES = (1, 2, 6, 11, 51)


def rank_histogram(ranks: Mapping[str, NDArray[np.float64]], title: str = "") -> bytes:
    """Draws the share of queries by rank of the right one: 1, 2 to 5, 6 to 10, 11 to 50, above 50.

    Args:
        ranks: (Q,) ranks from 1, by direction.
        title: heading.

    Returns:
        A PNG.
    """
    figure = _figure(title, 9.6, 4.2)
    axes = figure.subplots()
    labels = ["1", "2 to 5", "6 to 10", "11 to 50", "above 50"]
    width = 0.8 / max(len(ranks), 1)
    for index, (direction, values) in enumerate(ranks.items()):
        # A tie's mean rank of 1.5 is not rank 1.
        bins = np.searchsorted(_EDGES, np.ceil(values), side="right") - 1
        share = 100 * np.bincount(bins, minlength=len(labels)) / max(len(values), 1)
        at = np.arange(len(labels)) + (index - (len(ranks) - 1) / 2) * width
        name = {"t2v": "text → video", "v2t": "video → text"}.get(direction, direction)
        bars = axes.bar(
            at, share, width * 0.94, color=LINES[index], label=f"{name} ({len(values):,} queries)"
        )
        axes.bar_label(bars, fmt="%.1f", size=9, color=INK, padding=2)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("rank of the right one", color=INK)
    axes.set_ylabel("queries (%)", color=INK)
    _plain_axes(axes)
    axes.legend(frameon=False, fontsize=9)
    return as_png(figure)


def similarity_matrix(scores: NDArray[np.float32], num_videos: int, title: str = "") -> bytes:
    """Draws scores of captions (rows) for videos (columns); right pairs are the diagonal.

    Args:
        scores: (S, S).
        num_videos: number of videos in the whole gallery.
        title: heading.

    Returns:
        A PNG.
    """
    figure = _figure(title, 7.4, 6.6)
    axes = figure.subplots()
    shown = axes.imshow(scores, cmap="cividis", interpolation="nearest")
    figure.colorbar(shown, ax=axes, label="score", shrink=0.9)
    axes.set_xlabel(f"video ({len(scores):,} of {num_videos:,}, at equal steps)", color=INK)
    axes.set_ylabel("its first caption", color=INK)
    axes.tick_params(colors=INK, labelsize=9)
    return as_png(figure)


def increments_picture(steps: Mapping[str, Sequence[tuple[int, float]]], title: str = "") -> bytes | None:
    """Draws norms, angles and the modality gap over training; returns None if nothing was measured.

    Args:
        steps: (step, value) points by metric name; only ``delta/…`` and ``gap/…`` are drawn.
        title: heading.

    Returns:
        A PNG.
    """
    delta = {
        name.removeprefix("delta/"): points for name, points in steps.items() if name.startswith("delta/")
    }
    gap = {name.removeprefix("gap/"): points for name, points in steps.items() if name.startswith("gap/")}
    if not delta and not gap:
        return None
    angles = {name: points for name, points in delta.items() if "cos" in name or "angle" in name}
    distances = {name: points for name, points in delta.items() if name.startswith("distance")}
    spread = {name: points for name, points in delta.items() if name == "sigma"}
    norms = {name: points for name, points in delta.items() if name not in angles | distances | spread}
    panels = [
        (norms, "Lengths", "length"),
        (distances, "Distances of text and video", "distance"),
        (angles, "Angles of Δ", "cosine"),
        (spread, "Spread of Δ over the texts of a video", "σ"),
        (gap, "Modality gap", "value"),
    ]
    panels = [panel for panel in panels if panel[0]]
    columns = min(len(panels), 2)
    grid = math.ceil(len(panels) / columns)
    figure = _figure(title, 7.2 * columns, 4.4 * grid)
    every = np.atleast_1d(figure.subplots(grid, columns)).ravel()
    for axes, (curves, name, unit) in zip(every, panels, strict=False):
        draw_lines(axes, curves, unit, "step", name)
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    return as_png(figure)


def checkpoints_picture(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    marked: Mapping[str, tuple[int, float]],
    note: str,
    title: str = "",
) -> bytes:
    """Draws R@1 of a run's checkpoints over its steps, with some of them marked.

    Args:
        curves: (step, percent) points by name.
        marked: point by label, such as "the checkpoint that training chose".
        note: line below the heading.
        title: heading.

    Returns:
        A PNG.
    """
    figure = _figure(title, 9.6, 4.8)
    axes = figure.subplots()
    draw_lines(axes, curves, "R@1 (%)", "step", note)
    # Rings of different sizes, because several marks may be at the same point.
    for number, ((name, (step, value)), colour) in enumerate(zip(marked.items(), LINES[2:], strict=False)):
        axes.plot(
            [step], [value], "o", color=colour,
            markersize=11 + 6 * number, markerfacecolor="none", markeredgewidth=2,
            label=f"{drawable(name)}: step {step:,}, {value:.1f}",
        )  # fmt: skip
    axes.legend(fontsize=9, frameon=True, framealpha=0.85, edgecolor="#e6e8ec", loc="best")
    return as_png(figure)


def _figure(title: str, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")
    figure.suptitle(drawable(title), size=13, weight="bold", color=INK, x=0.01, ha="left")
    return figure


def _plain_axes(axes: Any) -> None:
    axes.grid(axis="y", color="#e6e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
