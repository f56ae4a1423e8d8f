"""Results of a study: scores of each setting over the seeds, and differences to the reference.

S seeds, Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from gare.retrieval.results.evaluation import Evaluation, why_not_comparable
from gare.retrieval.results.queries import DIRECTIONS, false_negative_shares, require_same_queries
from gare.retrieval.results.table import mean_and_deviation, more_is_better
from gare.study.plan import Cell, StudyPlan
from gare.study.statistics import LEVEL, Effect, holm, paired_effect

#: Measures that are a mean over queries, so that differences have an error over them, too.
MEASURES = ("t2v/R1", "t2v/R5", "t2v/R10", "t2v/MnR", "v2t/R1", "v2t/R5", "v2t/R10", "v2t/MnR")
#: Measures that the paper argues with, and their headings: of a training the share of the gradient at a text
#: that cancels, the modalities' distance, angles and lengths of Δ, and the spread that the bottleneck holds;
#: of an evaluation the negatives that are known to be false.
DIAGNOSTICS = {
    "tension/cancelled_before": "cancelled, without Δ",
    "tension/cancelled": "cancelled",
    "gap/modality": "modality gap",
    "gap/alignment": "alignment",
    "delta/cos_gap_positive": "cos(Δ, gap), own",
    "delta/cos_gap_negative": "cos(Δ, gap), others",
    "delta/norm_positive": "‖Δ‖, own",
    "delta/norm_negative": "‖Δ‖, others",
    "delta/text_norm_before": "‖t‖",
    "delta/sigma": "σ",
    "negatives/false": "false negatives, %",
    "negatives/false_hardest": "false, hardest, %",
}
#: A training's end is its last points, as many as this, and none before this share of its steps.
LAST, END_FROM = 3, 0.7
#: Evaluations by cell and seed.
Evaluations = Mapping[tuple[str, int], Evaluation]


@dataclass(frozen=True)
class CellScores:
    """Scores of a cell's runs.

    Attributes:
        cell: the combination of levels.
        by_seed: metrics of each run that is done, by seed.
        diagnostics: measures of each run by seed: of its training at its end (see ``at_end``), and of its
            evaluation's negatives.
    """

    cell: Cell
    by_seed: dict[int, dict[str, float]]
    diagnostics: dict[int, dict[str, float]] = field(default_factory=dict)

    def mean(self, metric: str) -> tuple[float, float | None]:
        """Returns mean and deviation over the seeds; the deviation of one seed is None."""
        return mean_and_deviation([metrics[metric] for metrics in self.by_seed.values()])

    def diagnostic(self, name: str) -> tuple[float, float | None] | None:
        """Returns mean and deviation of a diagnostic over the seeds; None where no run has it."""
        values = [found[name] for found in self.diagnostics.values() if name in found]
        return mean_and_deviation(values) if values else None


def at_end(points: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, float]:
    """Returns each measure of a training as it was at the end: the mean of its last points.

    Args:
        points: (step, value) by name; a name without points at the end is left out.
    """
    steps = max((some[-1][0] for some in points.values() if some), default=0)
    ends = {
        name: [value for step, value in some[-LAST:] if step > END_FROM * steps]
        for name, some in points.items()
    }
    return {name: float(np.mean(values)) for name, values in ends.items() if values}


@dataclass(frozen=True)
class Comparison:
    """A cell against the reference with the same other levels.

    Attributes:
        reference: the cell to compare with.
        cell: the cell.
        seeds: those that both have.
        effects: differences by measure; empty if there is no seed or the data differ.
        corrected: p-value of the study's measure, corrected for the number of comparisons (Holm).
        reason: why there are no effects.
        expected: what the paper reports: better, worse, level, or empty.
    """

    reference: Cell
    cell: Cell
    seeds: tuple[int, ...]
    effects: dict[str, Effect]
    corrected: float = 1.0
    reason: str = ""
    expected: str = ""

    def verdict(self, measure: str) -> str:
        """Returns better, worse, or no difference found, of the study's measure after the correction."""
        effect = self.effects.get(measure)
        if effect is None:
            return ""
        if self.corrected >= 1 - LEVEL:
            return "no difference found"
        return "better" if (effect.difference > 0) == more_is_better(measure) else "worse"


@dataclass(frozen=True)
class StudyResults:
    """All that a study has found so far.

    Attributes:
        plan: of the study.
        scores: by cell, in the plan's order.
        comparisons: of each cell with its reference.
        missing: names of the runs that are not done.
        taken: names of other runs, by the run whose training was taken from each.
    """

    plan: StudyPlan
    scores: tuple[CellScores, ...]
    comparisons: tuple[Comparison, ...]
    missing: tuple[str, ...] = ()
    taken: Mapping[str, str] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """Returns all numbers by name, for MLflow."""
        found: dict[str, float] = {}
        for scores in self.scores:
            for metric in _metrics_of(scores):
                mean, deviation = scores.mean(metric)
                found[f"{scores.cell.name}/{metric}/mean"] = mean
                if deviation is not None:
                    found[f"{scores.cell.name}/{metric}/deviation"] = deviation
            for name in DIAGNOSTICS:
                if measured := scores.diagnostic(name):
                    found[f"{scores.cell.name}/{name}/mean"] = measured[0]
        for comparison in self.comparisons:
            if comparison.effects:
                found[f"{comparison.cell.name}/{self.plan.file.measure}/p_corrected"] = comparison.corrected
            for metric, effect in comparison.effects.items():
                found[f"{comparison.cell.name}/{metric}/difference"] = effect.difference
                found[f"{comparison.cell.name}/{metric}/error"] = effect.error
                found[f"{comparison.cell.name}/{metric}/p_value"] = effect.p_value
                found[f"{comparison.cell.name}/{metric}/detectable"] = effect.detectable
        return found


def _metrics_of(scores: CellScores) -> list[str]:
    return [] if not scores.by_seed else list(next(iter(scores.by_seed.values())))


def summarise(
    plan: StudyPlan,
    evaluations: Evaluations,
    diagnostics: Mapping[tuple[str, int], dict[str, float]] | None = None,
    taken: Mapping[str, str] | None = None,
) -> StudyResults:
    """Compares what is done.

    Args:
        plan: of the study.
        evaluations: of the runs that are done.
        diagnostics: of their trainings' ends, by cell and seed.
        taken: names of other runs, by the run whose training was taken from each.
    """
    diagnostics = diagnostics or {}
    scores = tuple(
        CellScores(
            cell,
            {
                seed: dict(evaluations[cell.name, seed].metrics)
                for seed in plan.seeds
                if (cell.name, seed) in evaluations
            },
            {
                seed: diagnostics.get((cell.name, seed), {}) | _negatives(evaluations[cell.name, seed])
                for seed in plan.seeds
                if (cell.name, seed) in evaluations
            },
        )
        for cell in plan.cells
    )
    pairs = plan.comparisons()
    found = [_compare(plan, *pair, evaluations, len(pairs)) for pair in pairs]
    measure = plan.file.measure
    # Those that are not done yet count, too: what is found does not depend on the order of the runs.
    corrected = holm([one.effects[measure].p_value if one.effects else 1.0 for one in found])
    comparisons = tuple(
        replace(
            one,
            corrected=p_value,
            expected=plan.file.expected.get(one.cell.levels[plan.file.reference.factor], ""),
        )
        for one, p_value in zip(found, corrected, strict=True)
    )
    missing = tuple(run.name for run in plan.runs if (run.cell.name, run.seed) not in evaluations)
    return StudyResults(plan, scores, comparisons, missing, taken or {})


def _negatives(evaluation: Evaluation) -> dict[str, float]:
    shares = false_negative_shares(evaluation.queries.of_direction("t2v"))
    return {f"negatives/{name}": value for name, value in shares.items()}


def _compare(
    plan: StudyPlan, reference: Cell, cell: Cell, evaluations: Evaluations, comparisons: int
) -> Comparison:
    seeds = tuple(
        seed
        for seed in plan.seeds
        if (reference.name, seed) in evaluations and (cell.name, seed) in evaluations
    )
    if not seeds:
        return Comparison(reference, cell, seeds, {}, reason="no seed has both runs")
    pairs = [(evaluations[reference.name, seed], evaluations[cell.name, seed]) for seed in seeds]
    for first, second in pairs:
        if reasons := why_not_comparable(first, second):
            return Comparison(reference, cell, seeds, {}, reason=f"other data: {'; '.join(reasons)}")
        require_same_queries(first.queries, second.queries)
    effects = {}
    for direction in DIRECTIONS:
        tables = [[one.queries.of_direction(direction) for one in pair] for pair in pairs]
        if not len(tables[0][0]):
            continue
        # (2, S, Q), the reference first.
        ranks = np.stack([[table["rank"].to_numpy() for table in pair] for pair in tables], axis=1)
        videos = tables[0][0]["video_id"].to_numpy(zero_copy_only=False)
        for measure in (one for one in MEASURES if one.startswith(direction)):
            of_reference, of_cell = _values(ranks, measure)
            effects[measure] = paired_effect(of_reference, of_cell, videos, comparisons)
    return Comparison(reference, cell, seeds, effects)


def _values(ranks: NDArray[np.float64], measure: str) -> NDArray[np.float64]:
    """Returns the value of each query, whose mean is the measure."""
    name = measure.rpartition("/")[2]
    values = ranks if name == "MnR" else 100.0 * (ranks <= int(name[1:]))
    return np.asarray(values, np.float64)
