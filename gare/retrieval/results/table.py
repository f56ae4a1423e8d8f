"""A table of runs across benchmarks with the paper's numbers, and notes on what must not be compared."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from gare.errors import DataError
from gare.retrieval.results.compare import Difference, compare_runs
from gare.retrieval.results.evaluation import ZERO_SHOT, Evaluation, why_not_comparable
from gare.retrieval.results.paper_scores import LOOKS, SOURCE, published_scores

#: Columns of scores.
METRICS = ("t2v/R1", "t2v/R5", "t2v/R10", "t2v/MdR", "t2v/MnR", "v2t/R1", "v2t/MnR")
HEADINGS = ("t→v R@1", "R@5", "R@10", "MdR", "MnR", "v→t R@1", "MnR")
COLUMNS = ("run", *HEADINGS)
#: Mean and deviation by metric.
Means = dict[str, tuple[float, float | None]]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        kind: ``run``, ``mean``, ``difference`` or ``paper``, which decides its look.
        cells: text by column, as many as ``COLUMNS``.
        better: columns to mark: for a mean, those in which it is the best of its section; for a difference,
            those in which the interval says that the second run is better.
        worse: for a difference, columns in which the interval says that the first run is better.
    """

    kind: str
    cells: tuple[str, ...]
    better: frozenset[int] = frozenset()
    worse: frozenset[int] = frozenset()

    def markdown(self) -> str:
        """Formats the row of a Markdown table, marked cells in bold."""
        marked = self.better | self.worse
        cells = [f"**{_cell(cell)}**" if at in marked else _cell(cell) for at, cell in enumerate(self.cells)]
        return f"| {' | '.join(cells)} |"


@dataclass
class Section:
    """Runs that were measured on the same data.

    Attributes:
        heading: name of the data.
        rows: its lines.
        notes: remarks that a reader must know, such as why runs are not comparable.
        verdict: the conclusion, in one line.
    """

    heading: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    verdict: str = ""


@dataclass
class ScoreTable:
    """The whole table.

    Attributes:
        title: heading.
        sections: one for each kind of data that runs were measured on.
        numbers: its numbers by metric name, to be logged.
    """

    title: str
    sections: list[Section] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)

    def markdown(self) -> str:
        """Formats the table as Markdown."""
        lines = [f"# {_cell(self.title)}"]
        for section in self.sections:
            lines += ["", f"## {_cell(section.heading)}", "", f"| {' | '.join(COLUMNS)} |"]
            lines.append("| --- |" + " ---: |" * len(METRICS))
            lines += [row.markdown() for row in section.rows]
            lines += ["", *(f"- {_cell(note)}" for note in section.notes)] if section.notes else []
        return "\n".join(lines) + "\n"

    def note(self) -> str:
        """Formats the verdicts, then the table, as Markdown: pages that fold a text show its first lines."""
        return "".join(f"- {_cell(section.verdict)}\n" for section in self.sections) + "\n" + self.markdown()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def comparison_table(
    pairs: Sequence[tuple[Evaluation, Evaluation]], *, resamples: int, seed: int, title: str
) -> ScoreTable:
    """Builds a table of pairs: both runs, the second minus the first with its interval, and the paper.

    If protocol, split, counts or queries differ, the difference is left out, and a note says why.

    Args:
        pairs: evaluations to compare.
        resamples: of the paired bootstrap.
        seed: of its draws.
        title: heading.
    """
    table = ScoreTable(title)
    for first, second in pairs:
        reasons = why_not_comparable(first, second)
        differences: dict[str, Difference] = {}
        if not reasons:
            try:
                differences = compare_runs(first.queries, second.queries, resamples=resamples, seed=seed)
            except DataError as error:
                reasons = [error.what]
        if reasons:
            said = f"NOT COMPARABLE: {first.name} and {second.name}: {'; '.join(reasons)}"
            for run in (first, second):
                verdict = f"{run.benchmark}: NOT COMPARABLE, {run.name} has R@1 {run.metrics['t2v/R1']:.1f}"
                table.sections.append(Section(heading_of(run), [run_row(run)], [said], verdict))
                _add_notes(table.sections[-1], [run])
            continue
        section = Section(heading_of(first), [run_row(first), run_row(second)])
        section.rows.append(_difference_row(differences))
        verdict = _verdict(first, second, differences["t2v/R1"])
        scores = f"{first.metrics['t2v/R1']:.1f} and {second.metrics['t2v/R1']:.1f}"
        section.verdict = f"{first.benchmark}: {verdict}; {scores}"
        section.notes.append(verdict)
        if section.rows[-1].better | section.rows[-1].worse:
            section.notes.append("marked: intervals without 0; green or red: the second is better or worse")
        _add_notes(section, [first, second])
        table.sections.append(section)
        for name, found in differences.items():
            table.numbers[f"{first.benchmark}/{name}/difference"] = found.difference
            table.numbers[f"{first.benchmark}/{name}/p_value"] = found.p_value
    return table


def suite_table(runs: Sequence[Evaluation], *, title: str) -> ScoreTable:
    """Builds a table of all runs by data; runs that differ only in their seed get mean ± deviation."""
    table = ScoreTable(title)
    by_data: dict[tuple[object, ...], list[Evaluation]] = {}
    for run in runs:
        by_data.setdefault(tuple(run.measured_on.values()), []).append(run)
    benchmarks = [members[0].benchmark for members in by_data.values()]
    for members in by_data.values():
        section = Section(heading_of(members[0]))
        name = members[0].benchmark
        if benchmarks.count(name) > 1:
            section.notes.append(f"not comparable with the other tables of {name}: they are of other data")
            name = f"{name}-{members[0].measured_on['split_sha256'][:8]}"
        by_settings: dict[str, list[Evaluation]] = {}
        for run in members:
            by_settings.setdefault(run.settings, []).append(run)
        said = []
        models = [seeds[0].model for seeds in by_settings.values()]
        all_means = [
            {
                metric: mean_and_deviation([run.metrics[metric] for run in seeds if metric in run.metrics])
                for metric in seeds[0].metrics
            }
            for seeds in by_settings.values()
        ]
        for (settings, seeds), means in zip(by_settings.items(), all_means, strict=True):
            section.rows += [run_row(run) for run in seeds]
            model = seeds[0].model
            label = model if models.count(model) == 1 else f"{model}-{settings[:8]}"
            section.rows.append(_mean_row(f"{label}: {_mean_over(seeds)}", means, all_means))
            said.append(f"{label} {section.rows[-1].cells[1]}")
            for metric, (mean, deviation) in means.items():
                table.numbers[f"{name}/{label}/{metric}/mean"] = mean
                if deviation is not None:
                    table.numbers[f"{name}/{label}/{metric}/deviation"] = deviation
        section.verdict = f"{name}, text → video R@1: {', '.join(said)}"
        if any(row.better for row in section.rows):
            section.notes.append("marked: the best mean; the deviations say whether that is more than chance")
        if any(len(seeds) == 1 and seeds[0].seed is not None for seeds in by_settings.values()):
            section.notes.append("a single seed has no deviation")
        _add_notes(section, members)
        table.sections.append(section)
    return table


def heading_of(run: Evaluation) -> str:
    """Names the data that a run was measured on."""
    on = run.measured_on
    return (
        f"{run.benchmark} {on['split']}: {on['protocol']}; {on['num_texts']:,} texts × "
        f"{on['num_videos']:,} videos; split {on['split_sha256'][:12]}"
    )


def run_row(run: Evaluation) -> Row:
    """Builds the row of a run's scores, R@1 with intervals."""
    seed = "" if run.seed is None else f", seed {run.seed}"
    cells = []
    for metric in METRICS:
        interval = run.intervals.get(metric) if metric.endswith("R1") else None
        range_ = f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else ""
        cells.append(_number(run.metrics.get(metric)) + range_)
    return Row("run", (f"{run.name} ({run.model}{seed})", *cells))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _difference_row(differences: dict[str, Difference]) -> Row:
    cells: list[str] = []
    better: set[int] = set()
    worse: set[int] = set()
    for column, metric in enumerate(METRICS, 1):
        found = differences.get(metric)
        low, high = (found.interval.low, found.interval.high) if found else (0.0, 0.0)
        cells.append(f"{found.difference:+.1f} [{low:+.1f}, {high:+.1f}]" if found else "")
        if low > 0 or high < 0:
            (better if (low > 0) == more_is_better(metric) else worse).add(column)
    cells = ["second − first, 95 % interval", *cells]
    return Row("difference", tuple(cells), frozenset(better), frozenset(worse))


def more_is_better(metric: str) -> bool:
    """Returns True for a recall, False for a rank."""
    return metric.rpartition("/")[2].startswith("R")


def _verdict(first: Evaluation, second: Evaluation, found: Difference) -> str:
    low, high = found.interval.low, found.interval.high
    if low > 0 or high < 0:
        better = second if low > 0 else first
        return f"{better.name} is better in text → video R@1 (paired bootstrap, p = {found.p_value:.2g})"
    return f"no difference in text → video R@1 that these queries can show (p = {found.p_value:.2g})"


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and the sample deviation, which a single value does not have."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _mean_over(runs: Sequence[Evaluation]) -> str:
    """Says what a mean is over: not every scored model was trained with a seed."""
    plural = "s" if len(runs) > 1 else ""
    if any(run.seed is not None for run in runs):
        return f"mean of {len(runs)} seed{plural}"
    if runs[0].model == ZERO_SHOT and not plural:
        return "not trained, no seed"
    return f"mean of {len(runs)} evaluation{plural}"


def _mean_row(label: str, means: Means, others: Sequence[Means]) -> Row:
    cells: list[str] = []
    better: set[int] = set()
    for column, metric in enumerate(METRICS, 1):
        mean, deviation = means.get(metric, (None, None))
        cells.append(_number(mean) + ("" if deviation is None else f" ± {deviation:.1f}"))
        known = [one[metric][0] for one in others if metric in one]
        best = (max if more_is_better(metric) else min)(known, default=None)
        # If all are the same, none is the best.
        if mean is not None and mean == best and len(set(known)) > 1:
            better.add(column)
    return Row("mean", (label, *cells), frozenset(better))


def _add_notes(section: Section, runs: Sequence[Evaluation]) -> None:
    """Adds the notes of the runs, and the paper's rows."""
    section.notes += [f"{run.name}: {run.note}" for run in runs if run.note]
    _add_paper(section, runs[0])


def _add_paper(section: Section, run: Evaluation) -> None:
    found = published_scores(run.benchmark) if run.measured_on["split"] == "test" else []
    for paper in found:
        cells = [_number(paper.metrics.get(metric)) for metric in METRICS]
        section.rows.append(Row("paper", (f"paper, {paper.model}", *cells)))
    if not found:
        section.notes.append("the paper has no scores for this")
        return
    if run.measured_on["protocol"] != found[0].protocol:
        section.notes.append(
            f"the paper's rows ({SOURCE}) are of another protocol and NOT COMPARABLE: {found[0].protocol}"
        )
    else:
        section.notes.append(f"paper: {SOURCE}")
    section.notes.append(LOOKS)
