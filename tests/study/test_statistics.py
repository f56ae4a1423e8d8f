"""Statistics of studies: the stated rates of finding what is there, and what is not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from gare.errors import DataError
from gare.retrieval.results.table import mean_and_deviation
from gare.study.statistics import LEVEL, POWER, holm, paired_effect

SEEDS, VIDEOS, CAPTIONS = 5, 120, 3
STUDIES = 200
#: By how much rates may differ from the nominal ones: degrees of freedom are estimated, too.
SLACK = 0.02


def study(
    rng: np.random.Generator, difference: float, of_seed: float, of_query: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws values of two settings for the same queries and seeds, with a true mean difference.

    Videos are hard or easy for both settings, and better for one of them; seeds are lucky for one of them.
    """
    videos = np.repeat(np.arange(VIDEOS), CAPTIONS)
    hard = rng.normal(0, 30, VIDEOS)[videos]
    fits = rng.normal(0, of_query, VIDEOS)[videos]
    luck = rng.normal(0, of_seed, (SEEDS, 1))
    noise = rng.normal(0, 20, (2, SEEDS, len(videos)))
    return hard + noise[0], hard + noise[1] + difference + fits + luck, videos


def true_error(of_seed: float, of_query: float) -> float:
    rest = 2 * 20**2 / (SEEDS * VIDEOS * CAPTIONS)
    return math.sqrt(of_seed**2 / SEEDS + of_query**2 / VIDEOS + rest)


def bounds(rate: float) -> tuple[float, float]:
    """Counts among ``STUDIES`` that a rate leaves once in 10,000 times."""
    return float(stats.binom.ppf(1e-4, STUDIES, rate)), float(stats.binom.isf(1e-4, STUDIES, rate))


@pytest.mark.parametrize(("of_seed", "of_query"), [(0.0, 0.0), (3.0, 0.0), (0.0, 30.0), (2.0, 20.0)], ids=str)
def test_no_difference_is_found_where_there_is_none(of_seed: float, of_query: float, seed: int) -> None:
    """Else every study of twenty settings would have a winner."""
    rng = np.random.default_rng(seed)
    effects = [paired_effect(*study(rng, 0.0, of_seed, of_query)) for _ in range(STUDIES)]
    found = sum(effect.p_value < 1 - LEVEL for effect in effects)
    assert found <= bounds(1 - LEVEL + SLACK)[1]
    for effect in effects:
        assert (effect.p_value < 1 - LEVEL) == (not effect.low <= 0 <= effect.high)


@pytest.mark.parametrize("comparisons", [1, 8])
@pytest.mark.parametrize(("of_seed", "of_query"), [(3.0, 0.0), (0.0, 30.0), (2.0, 20.0)], ids=str)
def test_a_planted_difference_is_found_at_the_stated_rate(
    of_seed: float, of_query: float, comparisons: int, seed: int
) -> None:
    """Else a study says "no difference" of what it could not see. It is found among others that are none."""
    rng = np.random.default_rng(seed)
    error = true_error(of_seed, of_query)
    drawn = [paired_effect(*study(rng, 0.0, of_seed, of_query), comparisons) for _ in range(STUDIES)]
    freedom = float(np.median([effect.freedom for effect in drawn]))
    assert np.sqrt(np.mean([effect.error**2 for effect in drawn])) == pytest.approx(error, rel=0.15)
    detectable = float(np.median([effect.detectable / effect.error for effect in drawn])) * error
    reach = float(stats.t.ppf(1 - (1 - LEVEL) / 2 / comparisons, freedom))
    assert float(stats.nct.sf(reach, freedom, detectable / error)) == pytest.approx(POWER, abs=0.02)
    found = 0
    for _ in range(STUDIES):
        planted = paired_effect(*study(rng, detectable, of_seed, of_query), comparisons).p_value
        found += holm([planted, *rng.uniform(size=comparisons - 1)])[0] < 1 - LEVEL
    assert bounds(POWER - 2 * SLACK)[0] <= found <= bounds(POWER + 2 * SLACK)[1]


def test_intervals_hold_the_true_difference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    effects = [paired_effect(*study(rng, 4.0, 2.0, 20.0)) for _ in range(STUDIES)]
    held = sum(effect.low <= 4.0 <= effect.high for effect in effects)
    assert held >= bounds(LEVEL - SLACK)[0]
    assert np.mean([effect.difference for effect in effects]) == pytest.approx(
        4.0, abs=4 * true_error(2.0, 20.0) / math.sqrt(STUDIES)
    )


def test_errors_over_seeds_and_queries_add_up(seed: int) -> None:
    """Five seeds of one split, or many queries of one seed, know only half of what varies."""
    rng = np.random.default_rng(seed)
    errors = [paired_effect(*study(rng, 0.0, 2.0, 20.0)).error for _ in range(STUDIES)]
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(true_error(2.0, 20.0), rel=0.1)


def test_captions_of_a_video_count_together() -> None:
    """They succeed and fail together: ten copies of each caption are no more knowledge than one."""
    rng = np.random.default_rng(1)
    one, other = rng.normal(0, 1, (3, 40)), rng.normal(0.5, 1, (3, 40))
    single = paired_effect(one, other, np.arange(40))
    copies = (np.repeat(values, 10, axis=1) for values in (one, other))
    copied = paired_effect(*copies, np.repeat(range(40), 10))
    assert copied.error == pytest.approx(single.error)
    assert copied.p_value == pytest.approx(single.p_value)


def test_a_single_seed_says_so() -> None:
    one = np.arange(20.0)[None]
    effect = paired_effect(one, one + 1 + np.tile([0.0, 1.0], 10), np.arange(20))
    assert (effect.over_seeds, effect.by_seed) == (False, (1.5,))
    assert effect.low < 1.5 < effect.high


def test_equal_runs_have_no_difference() -> None:
    values = np.random.default_rng(0).normal(size=(2, 10))
    effect = paired_effect(values, values, np.arange(10))
    assert (effect.difference, effect.p_value, effect.low, effect.high) == (0, 1, 0, 0)
    assert paired_effect(values, values + 1, np.arange(10)).p_value == pytest.approx(0)


@pytest.mark.parametrize(
    ("first", "videos"), [((2, 5), 5), ((2, 6), 5), ((6,), 6)], ids=["seeds", "queries", "flat"]
)
def test_values_that_do_not_belong_together_are_refused(first: tuple[int, ...], videos: int) -> None:
    with pytest.raises(DataError, match="the same seeds and queries"):
        paired_effect(np.zeros(first), np.zeros((3, 5)), np.arange(videos))


def test_holm() -> None:
    """The example of the method: the smallest times four, and none below one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_holm_finds_nothing_among_many_settings_without_a_difference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    wrong = sum(min(holm(rng.uniform(size=8).tolist())) < 1 - LEVEL for _ in range(STUDIES))
    assert wrong <= bounds(1 - LEVEL)[1]


def test_mean_and_deviation() -> None:
    assert mean_and_deviation([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert mean_and_deviation([5.0]) == (5.0, None)
