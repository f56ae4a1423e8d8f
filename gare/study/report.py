"""The table and the figure of a study."""

from __future__ import annotations

import textwrap

from matplotlib.figure import Figure

from gare.report.pictures import FAINT, INK, LINES, RIGHT, WRONG, as_png, drawable
from gare.retrieval.results.table import more_is_better
from gare.study.results import Comparison, StudyResults
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
    return "\n".join(lines)


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
        f"{100 * POWER:.0f} times in 100.",
        f"{measure}: {'more' if more_is_better(measure) else 'less'} is better.",
    ]
    if any(
        effect and not effect.over_seeds for one in results.comparisons for effect in one.effects.values()
    ):
        notes.append("One seed: the intervals are over videos alone and say nothing about other seeds.")
    if results.missing:
        shown = ", ".join(results.missing[:5]) + (", …" if len(results.missing) > 5 else "")
        notes.append(
            f"NOT COMPLETE: {len(results.missing)} of {len(results.plan.runs)} runs are missing: {shown}"
        )
    return notes


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
    for at, scores in enumerate(results.scores):
        values = [metrics[file.measure] for metrics in scores.by_seed.values()]
        left.plot(values, [at] * len(values), "o", color=LINES[0], alpha=0.45, markersize=5)
        if values:
            left.plot([sum(values) / len(values)], [at], "|", color=INK, markersize=16, markeredgewidth=2.2)
    left.set_yticks(range(len(results.scores)), [drawable(one.cell.name) for one in results.scores])
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
    for axes, count in ((left, len(results.scores)), (right, len(labels))):
        axes.set_ylim(max(count, 1) - 0.5, -0.5)
        axes.tick_params(labelsize=9, colors=INK)
        axes.grid(axis="x", color="#e6e8ec", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return as_png(figure)
