"""The table and the figures of a study, from results that were made up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from gare.study.plan import StudyFile, plan_study
from gare.study.report import diagnostics_figure, study_figure, study_table
from gare.study.results import CellScores, StudyResults, at_end, summarise
from gare.study.statistics import holm
from tests.helpers.pictures import pixels_of
from tests.helpers.pipelines import tiny
from tests.retrieval.results.test_table import evaluated

FILE = StudyFile.model_validate(
    {
        "title": "Increment | or none",
        "factors": {"model": {"baseline": {"model.increment": False}, "gare": {}}},
        "reference": {"factor": "model", "level": "baseline"},
        "seeds": [0, 1],
    }
)
SCORES = {f"{way}/{name}": 10.0 for way in ("t2v", "v2t") for name in ("R1", "R5", "R10", "MdR", "MnR")}


@pytest.fixture
def results() -> StudyResults:
    plan = plan_study(tiny(), "made-up", FILE, checkpoint_of=lambda config: "/best")
    baseline, gare = (
        CellScores(cell, {seed: SCORES | {"t2v/R1": 10.0 + seed} for seed in plan.seeds})
        for cell in plan.cells
    )
    measured = {
        0: {"tension/cancelled": 0.5, "delta/sigma": 0.01, "negatives/false": 0.2},
        1: {"tension/cancelled": 0.7, "delta/sigma": 0.03, "negatives/false": 0.2},
    }
    return StudyResults(plan, (baseline, replace(gare, diagnostics=measured)), ())


def test_measures_of_the_training_stand_beside_the_scores(results: StudyResults) -> None:
    table = study_table(results)
    assert "# Increment \\| or none" in table
    assert "| baseline | 2 | 10.50 ± 0.71 |" in table
    head, rule, *rows = table[table.index("| setting | cancelled") :].splitlines()[:4]
    assert head == "| setting | cancelled | σ | false negatives, % |"
    assert rule == "| --- | ---: | ---: | ---: |"
    assert rows == ["| baseline |  |  |  |", "| gare | 0.6 ± 0.1 | 0.02 ± 0.01 | 0.2 ± 0 |"]
    assert results.numbers()["gare/delta/sigma/mean"] == pytest.approx(0.02)


def test_what_is_detectable_allows_for_all_comparisons(rng: np.random.Generator) -> None:
    """With four settings a difference has to be larger to be found, and the table would promise too much."""
    factors = {
        "model": FILE.factors["model"] | {name: {"loss.prior_std": std} for name, std in (("b", 1), ("c", 2))}
    }
    plan = plan_study(tiny(), "made-up", FILE.model_copy(update={"factors": factors}), checkpoint_of=str)
    found = {(run.cell.name, run.seed): evaluated(run.name, rng, 2.0) for run in plan.runs}
    comparisons = summarise(plan, found).comparisons
    assert len(comparisons) == 3
    for one in comparisons:
        effect = one.effects["t2v/R1"]
        reach = float(stats.t.isf(0.05 / 2 / 3, effect.freedom))
        power = float(stats.nct.sf(reach, effect.freedom, effect.detectable / effect.error))
        assert power == pytest.approx(0.8, abs=0.01)
    # Also while runs are missing, so that what is found does not depend on their order.
    some = {key: evaluation for key, evaluation in found.items() if key[0] != "c"}
    comparisons = summarise(plan, some).comparisons
    p_values = [one.effects["t2v/R1"].p_value if one.effects else 1.0 for one in comparisons]
    assert p_values.count(1.0) == 1
    assert [one.corrected for one in comparisons] == holm(p_values)


def test_figures_have_a_panel_for_each_measure(results: StudyResults) -> None:
    picture = diagnostics_figure(results)
    assert picture is not None
    assert pixels_of(picture).shape[1] == 3 * 400  # the score, and two measures that differ
    assert pixels_of(study_figure(results)).shape[1] == 1300


def test_nothing_measured_is_nothing_drawn(results: StudyResults) -> None:
    bare = replace(results, scores=tuple(replace(one, diagnostics={}) for one in results.scores))
    assert diagnostics_figure(bare) is None
    assert "Measures of the training" not in study_table(bare)


def test_the_end_of_a_training_is_its_last_points() -> None:
    points = {"gap/modality": [(150, 9.0), (151, 1.0), (175, 2.0), (200, 3.0)], "delta/norm": []}
    assert at_end(points) == {"gap/modality": 2.0}
    # Few steps, or measures far apart: those of the beginning are not the end's.
    points = {
        "loss/total": [(1, 5.0), (122, 2.0)],
        "delta/sigma": [(1, 0.0), (51, 0.1), (101, 0.3)],
        "early": [(1, 1)],
    }
    assert at_end(points) == {"loss/total": 2.0, "delta/sigma": 0.3}
