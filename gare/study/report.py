"""The table and the figure of a study."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gare.report.pictures import FAINT, INK, LINES, RIGHT, WRONG, as_png, drawable
from gare.retrieval.results.table import more_is_better
from gare.study.results import DIAGNOSTICS, CellScores, Comparison, StudyResults
from gare.study.statistics import LEVEL, POWER

#: Columns of scores.
METRICS = ("t2v/R1", "t2v/R5", "t2v/R10", "t2v/MdR", "t2v/MnR", "v2t/R1", "v2t/R10", "v2t/MnR")
_HEADINGS = ("t→v R@1", "R@5", "R@10", "MdR", "MnR", "v→t R@1", "R@10", "MnR")


def study_table(results: StudyResults) -> str:
    """Formats the study as Markdown: scores, differences to the reference, and how to read them."""
    plan, file = results.plan, results.plan.file
    reference = file.reference
    lines = [f"# {_cell(file.title)}", ""]
    if file.question:
        lines += [_cell(file.question), ""]
    lines += [
        f"{len(plan.cells)} settings × {len(plan.seeds)} seeds on {file.split}, mean ± deviation over seeds.",
        "",
        f"| setting | seeds | {' | '.join(_HEADINGS)} |",
        "| --- | ---: |" + " ---: |" * len(METRICS),
    ]
    for scores in results.scores:
        cells = [_mean(*scores.mean(metric)) if scores.by_seed else "" for metric in METRICS]
        lines.append(f"| {scores.cell.name} | {len(scores.by_seed)} | {' | '.join(cells)} |")
    lines += [
        "",
        f"## Difference to {reference.factor} {reference.level}, {file.measure}",
        "",
        f"| setting | against | difference | {100 * LEVEL:.0f} % interval | p | p, corrected | detectable "
        "| found | paper |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    lines += [_comparison_row(one, file.measure) for one in results.comparisons]
    lines += ["", *(f"- {note}" for note in _notes(results)), ""]
    lines += _diagnostics_table(results)
    return "\n".join(lines)


def _measured(results: StudyResults) -> list[str]:
    """Returns the diagnostics that any run has."""
    return [name for name in DIAGNOSTICS if any(one.diagnostic(name) for one in results.scores)]


def _diagnostics_table(results: StudyResults) -> list[str]:
    names = _measured(results)
    if not names:
        return []
    lines = [
        "## Measures of the training, at its end, and of the negatives",
        "",
        f"| setting | {' | '.join(DIAGNOSTICS[name] for name in names)} |",
        "| --- |" + " ---: |" * len(names),
    ]
    for scores in results.scores:
        cells = [_measure(scores.diagnostic(name)) for name in names]
        lines.append(f"| {scores.cell.name} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "- Cancelled: share of the gradients at a text that cancel each other, with Δ unless said. Own: a "
        "text and its video; others: a text and another video of the batch. Modality gap: distance of the "
        "means of texts and videos. σ: spread of a video's increments over texts. False negatives: other "
        "videos that have the text's own caption, word for word, among all and among each text's hardest.",
        "",
    ]


def _measure(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return ""
    mean, deviation = found
    return f"{mean:.3g}" + ("" if deviation is None else f" ± {deviation:.1g}")


def _comparison_row(one: Comparison, measure: str) -> str:
    effect = one.effects.get(measure)
    if effect is None:
        return f"| {one.cell.name} | {one.reference.name} | | | | | | {one.reason} | {one.expected} |"
    return (
        f"| {one.cell.name} | {one.reference.name} | {effect.difference:+.2f} | "
        f"{effect.low:+.2f} to {effect.high:+.2f} | {effect.p_value:.2g} | {one.corrected:.2g} | "
        f"{effect.detectable:.2f} | {one.verdict(measure)} | {one.expected} |"
    )


def _notes(results: StudyResults) -> list[str]:
    measure = results.plan.file.measure
    notes = [
        "Differences are paired by seed and query. Intervals are over both: other seeds and other videos "
        "(with all their captions) would move the mean as far.",
        f"p is corrected by Holm's method for {len(results.comparisons)} comparison"
        f"{'s' * (len(results.comparisons) != 1)}. A true difference as large as the detectable one is found "
        f"at least {100 * POWER:.0f} times in 100 after this correction, if errors are as estimated. "
        "Intervals are of each comparison alone.",
        f"{measure}: {'more' if more_is_better(measure) else 'less'} is better.",
    ]
    if any(
        effect and not effect.over_seeds for one in results.comparisons for effect in one.effects.values()
    ):
        notes.append("One seed: the intervals are over videos alone and say nothing about other seeds.")
    if results.taken:
        notes.append(
            f"{len(results.taken)} of {len(results.plan.runs)} trainings were taken from other runs with the "
            f"same settings and data: {_first_of(sorted(set(results.taken.values())))}"
        )
    if results.missing:
        notes.append(
            f"NOT COMPLETE: {len(results.missing)} of {len(results.plan.runs)} runs are missing: "
            f"{_first_of(results.missing)}"
        )
    return notes


def _first_of(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _mean(mean: float, deviation: float | None) -> str:
    return f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def study_figure(results: StudyResults) -> bytes:
    """Draws each setting's scores by seed, and the differences to the reference with their intervals.

    Returns:
        A PNG.
    """
    file = results.plan.file
    rows = max(len(results.scores), len(results.comparisons), 2)
    longest = max(len(cell.name) for cell in results.plan.cells)
    figure = Figure(figsize=(13, 1.9 + 0.42 * rows), dpi=100, facecolor="white", layout="constrained")
    figure.suptitle(drawable("\n".join(textwrap.wrap(file.title, 100))), color=INK, weight="bold", size=13)
    widths = (1.0 + longest / 60, 1.0 + longest / 60)
    left, right = figure.subplots(1, 2, width_ratios=widths)
    values = [_values_of(results, scores) for scores in results.scores]
    _draw_dots(left, [one.cell.name for one in results.scores], values)
    left.set_title(f"{file.measure} on {file.split}: a dot a seed, the mean as a line", size=10, color=INK)
    right.axvline(0, color=FAINT, linewidth=1)
    for at, one in enumerate(results.comparisons):
        effect = one.effects.get(file.measure)
        if effect is None:
            continue
        verdict = one.verdict(file.measure)
        colour = {"better": RIGHT, "worse": WRONG}.get(verdict, INK)
        right.plot([effect.low, effect.high], [at, at], color=colour, linewidth=2.4, solid_capstyle="butt")
        right.plot(effect.by_seed, [at] * len(effect.by_seed), "o", color=colour, alpha=0.35, markersize=4)
        right.plot([effect.difference], [at], "D", color=colour, markersize=6.5)
    labels = [drawable(f"{one.cell.name} − {one.reference.name}") for one in results.comparisons]
    right.set_yticks(range(len(labels)), labels)
    right.set_title(
        f"difference to the reference, {100 * LEVEL:.0f} % interval",
        size=10,
        color=INK,
    )
    _style(right, len(labels))
    return as_png(figure)


def diagnostics_figure(results: StudyResults) -> bytes | None:
    """Draws the measures of the trainings beside the score, a panel each, but for those that never differ.

    Returns:
        A PNG; None if nothing was measured.
    """
    panels: dict[str, list[list[float]]] = {}
    panels[results.plan.file.measure] = [_values_of(results, one) for one in results.scores]
    for name in _measured(results):
        values = [
            [found[name] for found in one.diagnostics.values() if name in found] for one in results.scores
        ]
        if len({value for some in values for value in some}) > 1:
            panels[DIAGNOSTICS[name]] = values
    if len(panels) == 1:
        return None
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    size = (4.0 * columns, (1.0 + 0.26 * len(results.scores)) * rows)
    figure = Figure(figsize=size, dpi=100, facecolor="white", layout="constrained")
    every = np.atleast_1d(figure.subplots(rows, columns, sharey=True)).ravel()
    for axes, (heading, values) in zip(every, panels.items(), strict=False):
        _draw_dots(axes, [one.cell.name for one in results.scores], values)
        axes.set_title(drawable(heading), size=10, color=INK)
        axes.locator_params(axis="x", nbins=4)
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    return as_png(figure)


def _values_of(results: StudyResults, scores: CellScores) -> list[float]:
    return [metrics[results.plan.file.measure] for metrics in scores.by_seed.values()]


def _draw_dots(axes: Axes, names: Sequence[str], values: Sequence[Sequence[float]]) -> None:
    """Draws a row for each setting: a dot a seed, and their mean as a line."""
    for at, some in enumerate(values):
        axes.plot(some, [at] * len(some), "o", color=LINES[0], alpha=0.45, markersize=5)
        if some:
            axes.plot([sum(some) / len(some)], [at], "|", color=INK, markersize=14, markeredgewidth=2.2)
    axes.set_yticks(range(len(names)), [drawable(name) for name in names])
    _style(axes, len(names))


def _style(axes: Axes, rows: int) -> None:
    axes.set_ylim(max(rows, 1) - 0.5, -0.5)
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(axis="x", color="#e6e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
