"""Pictures of what a retrieval run did: rankings with thumbnails, curves, contact sheets.

They are made with matplotlib's objects, not pyplot: no window, no state shared between calls or threads.
"""

from __future__ import annotations

import functools
import io
import math
import re
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.font_manager
import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

INK, FAINT, RIGHT, WRONG = "#1f2430", "#8a909c", "#1a9850", "#c43c39"
#: Colours that people with common colour deficiencies can tell apart, too (Okabe and Ito).
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
_TOP = 5


@dataclass(frozen=True)
class Candidate:
    """A video in a ranking.

    Attributes:
        video_id: its id.
        thumbnail: (H, W, 3) uint8, any size.
        score: the model's score for the query.
        is_right: whether the query belongs to it.
    """

    video_id: str
    thumbnail: NDArray[np.uint8]
    score: float
    is_right: bool


@dataclass(frozen=True)
class Example:
    """A query and its ranking.

    Attributes:
        query: the caption.
        ranked: the best candidates, best first; a right one that is not among the first five may follow
            anywhere after them and is shown on its own.
        right_rank: rank of the right video in the whole gallery, from 1.
    """

    query: str
    ranked: Sequence[Candidate]
    right_rank: int


def retrieval_picture(examples: Sequence[Example], title: str = "Text to video") -> bytes:
    """Draws a row for each query: its text, its five best videos, and the right one if not among them.

    Args:
        examples: at least one.
        title: heading.

    Returns:
        A PNG.
    """
    row_inches = 1.75
    height = row_inches * max(len(examples), 1) + 0.75
    figure = Figure(figsize=(13.6, height), dpi=100, facecolor="white")
    figure.text(
        0.012,
        1 - 0.3 / height,
        _literal(ellipsis(_plain(title), 60)),
        size=14,
        weight="bold",
        color=INK,
        va="center",
    )
    note = (
        "frame and check mark: the right video; at the far right, where it came if not among the first five"
    )
    figure.text(0.988, 1 - 0.3 / height, note, size=9, color=FAINT, va="center", ha="right")
    left, width = 0.235, 0.123
    for row, example in enumerate(examples):
        top = 1 - (0.6 + row * row_inches) / height
        _query_text(figure, example, top, height)
        for place, candidate in enumerate(example.ranked[:_TOP]):
            box = (left + place * width, top - 1.4 / height, width - 0.008, 1.15 / height)
            _thumbnail(figure, box, candidate, place + 1, RIGHT if candidate.is_right else None)
        missed = next((c for c in example.ranked[_TOP:] if c.is_right), None)
        if missed is not None and not any(c.is_right for c in example.ranked[:_TOP]):
            box = (left + _TOP * width + 0.018, top - 1.4 / height, width - 0.008, 1.15 / height)
            _thumbnail(figure, box, missed, example.right_rank, WRONG)
    return as_png(figure)


def _query_text(figure: Figure, example: Example, top: float, height: float) -> None:
    lines = textwrap.wrap(_plain(example.query), 34) or ["(empty query)"]
    if len(lines) > 5:
        lines = [*lines[:4], lines[4][:32].rstrip() + " …"]
    hit = example.right_rank <= _TOP
    figure.text(
        0.012, top - 0.1 / height, f"right video at rank {example.right_rank:,}", size=10, weight="bold",
        color=RIGHT if hit else WRONG, va="center",
    )  # fmt: skip
    text = _literal("\n".join(lines))
    figure.text(0.012, top - 0.27 / height, text, size=10.5, color=INK, va="top", linespacing=1.25)


def _thumbnail(
    figure: Figure, box: tuple[float, float, float, float], candidate: Candidate, rank: int, frame: str | None
) -> None:
    axes = figure.add_axes(box, facecolor="#eceef1")
    axes.imshow(_shrink(candidate.thumbnail, 240), aspect="equal")
    # The frame goes around the picture itself, whatever its shape.
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(color=frame or "#c9cdd4", linewidth=3.5 if frame else 0.8)
    mark = "✓  " if candidate.is_right else ""
    label = f"{mark}{rank:,}.   {candidate.score:.3f}"
    weight = "bold" if candidate.is_right else "normal"
    colour = frame or INK
    axes.text(0, 1.045, label, transform=axes.transAxes, size=9.5, weight=weight, color=colour, va="bottom")
    name = _literal(ellipsis(_plain(candidate.video_id), 21))
    axes.text(0.5, -0.05, name, transform=axes.transAxes, size=8.5, color=FAINT, va="top", ha="center")


def curves_picture(
    history: Mapping[str, Sequence[tuple[int, float]]], title: str = "", accuracy_axis: str = "step"
) -> bytes:
    """Draws the loss, its terms on the increments where there are any, and R@1 of both directions.

    Args:
        history: (step, value) points by metric name. Names that end in ``R1`` are recalls in percent, all
            others are loss terms. Values that are not finite leave a gap.
        title: heading.
        accuracy_axis: what the recalls' steps count, such as ``epoch``.

    Returns:
        A PNG.
    """
    recalls = {name: points for name, points in history.items() if name.rsplit("/", 1)[-1] == "R1"}
    losses = {name: points for name, points in history.items() if name not in recalls}
    panels = _loss_panels(losses)
    width = 6.2 * (len(panels) + 1)
    figure = Figure(figsize=(width, 4.4), dpi=100, facecolor="white", layout="constrained")
    if title:
        figure.suptitle(
            _literal(ellipsis(_plain(title), 120)), size=13, weight="bold", color=INK, x=0.01, ha="left"
        )
    *lefts, right = figure.subplots(1, len(panels) + 1)
    for left, (curves, heading) in zip(lefts, panels, strict=True):
        draw_lines(left, curves, "loss", "step", heading)
    pretty = {_recall_name(name): points for name, points in recalls.items()}
    draw_lines(right, pretty, "R@1 (%)", accuracy_axis, "R@1 on validation")
    if recalls:
        best = max(
            (value for points in recalls.values() for _, value in points if math.isfinite(value)), default=0
        )
        right.set_ylim(0, min(102.0, max(best * 1.15, 5.0)))
    return as_png(figure)


def _loss_panels(
    losses: Mapping[str, Sequence[tuple[int, float]]],
) -> list[tuple[Mapping[str, Sequence[tuple[int, float]]], str]]:
    """Groups curves by panel, with headings: terms on the increments, if any is not 0, have their own panel.

    These terms are recorded without their weights, and can be hundreds of times the loss.
    """
    main = {name: points for name, points in losses.items() if re.search(r"total$|nce_", name)}
    others = {
        name: points for name, points in losses.items() if name not in main and any(v for _, v in points)
    }
    if not main:
        return [(losses, "Loss")]
    return [(main, "Loss"), *([(others, "Terms on Δ, before their weights")] if others else [])]


def draw_lines(
    axes: Any, curves: Mapping[str, Sequence[tuple[int, float]]], y_label: str, x_label: str, title: str
) -> None:
    """Draws (step, value) points by name as lines with a legend; small beside large ones on a log scale."""
    axes.set_title(title, size=11, color=INK, loc="left")
    axes.set_xlabel(x_label, size=10, color=INK)
    axes.set_ylabel(y_label, size=10, color=INK)
    axes.grid(color="#e6e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b5bac3")
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    drawn = {name: np.array(points, float).reshape(-1, 2) for name, points in curves.items() if len(points)}
    finite = [points[np.isfinite(points[:, 1]), 1] for points in drawn.values()]
    values = np.concatenate(finite) if finite else np.zeros(0)
    if not len(values):
        axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, color=FAINT, ha="center")
        axes.set(xticks=[], yticks=[])
        return
    positive = values[values > 0]
    sizes = [np.abs(line).max() for line in finite if np.any(line)]
    # Beside large terms, small ones would be a flat line at the bottom.
    if y_label == "loss" and len(positive) == len(values) and values.max() > 300 * values.min():
        axes.set_yscale("log")
    elif y_label == "loss" and sizes and max(sizes) > 300 * min(sizes):
        axes.set_yscale("symlog", linthresh=max(float(min(sizes)), 1e-3 * float(max(sizes)) ** 0.5))
    for index, (name, points) in enumerate(drawn.items()):
        marker = "o" if len(points) <= 25 else None
        style = "-" if index < len(LINES) else "--"
        axes.plot(
            points[:, 0], points[:, 1], style, color=LINES[index % len(LINES)], marker=marker, markersize=4.5,
            linewidth=1.7, label=f"{_literal(ellipsis(_plain(name), 40))}  (last {_last(points):.4g})",
        )  # fmt: skip
    steps = np.concatenate([points[:, 0] for points in drawn.values()])
    if steps.min() == steps.max():
        axes.set_xlim(steps.min() - 1, steps.min() + 1)
    legend = axes.legend(fontsize=9, frameon=True, framealpha=0.85, edgecolor="#e6e8ec", loc="best")
    for text in legend.get_texts():
        text.set_color(INK)


def _last(points: NDArray[np.float64]) -> float:
    finite = points[np.isfinite(points[:, 1]), 1]
    return float(finite[-1]) if len(finite) else math.nan


def _recall_name(name: str) -> str:
    parts = name.split("/")
    words = {"t2v": "text → video", "v2t": "video → text", "R1": "", "val": ""}
    return " ".join(word for part in parts if (word := words.get(part, part))) or name


def contact_sheet(images: Sequence[NDArray[np.uint8]], captions: Sequence[str], columns: int = 6) -> bytes:
    """Draws pictures in a grid with a line or two of text below each.

    Args:
        images: (H, W, 3) uint8 each, any sizes.
        captions: as many.
        columns: pictures a row.

    Returns:
        A PNG.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images with {len(captions)} captions")
    columns = max(1, min(columns, len(images)))
    rows = max(1, math.ceil(len(images) / columns))
    cell = 2.0
    figure = Figure(figsize=(columns * cell, rows * (cell + 0.25)), dpi=100, facecolor="white")
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(index, columns)
        box = ((column + 0.04) / columns, 1 - (row + 0.70) / rows, 0.92 / columns, 0.66 / rows)
        axes = figure.add_axes(box)
        axes.imshow(_shrink(image, 320))
        axes.set_axis_off()
        lines = textwrap.wrap(_plain(caption), 28)
        text = "\n".join([*lines[:2], ellipsis(lines[2], 26) + " …"] if len(lines) > 3 else lines)
        figure.text(
            (column + 0.5) / columns,
            1 - (row + 0.73) / rows,
            text,
            size=8.5,
            color=INK,
            va="top",
            ha="center",
        )
    return as_png(figure)


def _shrink(image: NDArray[np.uint8], longest_px: int) -> NDArray[np.uint8]:
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    return np.asarray(picture)


@functools.cache
def _drawable() -> frozenset[int]:
    font = matplotlib.font_manager.get_font(matplotlib.font_manager.findfont("DejaVu Sans"))
    return frozenset(font.get_charmap())


def _plain(text: str) -> str:
    """Puts the text on one line, with boxes for characters that the font cannot draw."""
    normal = " ".join(unicodedata.normalize("NFC", text).split())
    known = _drawable()
    return "".join(c if ord(c) in known else "□" for c in normal if c.isprintable())


def drawable(text: str) -> str:
    """Puts the text on one line, in a form that matplotlib draws literally."""
    return _literal(_plain(text))


def _literal(text: str) -> str:
    """Keeps matplotlib from reading mathematics between dollar signs."""
    return text.replace("$", r"\$")


def ellipsis(text: str, length: int) -> str:
    """Shortens a text but keeps both ends: ids often differ only in the last characters."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def as_png(figure: Figure) -> bytes:
    """Renders a figure as PNG, whatever the user's own matplotlib settings are."""
    buffer = io.BytesIO()
    # The user's matplotlib settings, such as LaTeX text, must not change these.
    with rc_context({"font.family": "DejaVu Sans", "text.usetex": False}):
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
