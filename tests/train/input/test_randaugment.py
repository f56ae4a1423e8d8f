"""The policy: which operations the seeds draw, how strong they are, and how few passes they become."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from gare.config import AugmentConfig
from gare.train.input.randaugment import OPERATIONS, Operation, draw_operations, steps_of

#: A true frequency leaves these bounds about once in 10^10 tests.
SIGMAS = 6.5
SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
ENHANCEMENTS = ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing")


def draws(config: AugmentConfig, rng: np.random.Generator, clips: int = 4000) -> list[tuple[Operation, ...]]:
    return [draw_operations(config, int(seed)) for seed in rng.integers(2**63, size=clips)]


def assert_share(count: int, total: int, share: float) -> None:
    spread = SIGMAS * np.sqrt(total * share * (1 - share))
    assert abs(count - total * share) <= spread, f"{count} of {total}, not {share:.3f}"


def test_nothing_is_drawn_by_default(rng: np.random.Generator) -> None:
    """A run that asked for no augmentation must train on the pictures as they are."""
    assert set(draws(AugmentConfig(), rng, 50)) == {()}


def test_operations_are_drawn_uniformly_with_replacement(rng: np.random.Generator) -> None:
    """Else some of the paper's changes would be rare, and the model not robust to them."""
    drawn = draws(AugmentConfig(operations=15, probability=1.0), rng)
    assert {len(operations) for operations in drawn} == {15}
    counts = Counter(operation.name for operations in drawn for operation in operations)
    assert set(counts) == set(OPERATIONS)
    for count in counts.values():
        assert_share(count, 15 * len(drawn), 1 / 15)
    # The first two of a clip: all 225 pairs, equal ones among them, none much more often than another.
    pairs = Counter((one[0].name, one[1].name) for one in drawn)
    expected = len(drawn) / 225
    chi_square = sum((pairs[a, b] - expected) ** 2 / expected for a in OPERATIONS for b in OPERATIONS)
    assert abs(chi_square - 224) < SIGMAS * np.sqrt(2 * 224) + 40


def test_half_of_the_operations_are_carried_out_by_default(rng: np.random.Generator) -> None:
    """The released code skips each with probability 0.5; without it clips change about twice as much."""
    drawn = draws(AugmentConfig(operations=4), rng)
    assert_share(sum(map(len, drawn)), 4 * len(drawn), 0.5)
    untouched = sum(not operations for operations in drawn)
    assert_share(untouched, len(drawn), 0.5**4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AutoContrast", {()}),
        ("Equalize", {()}),
        ("Invert", {()}),
        ("Rotate", {(21.0,), (-21.0,)}),
        ("PosterizeIncreasing", {(2,)}),
        ("SolarizeIncreasing", {(77,)}),
        ("SolarizeAdd", {(77,)}),
        ("ColorIncreasing", {(1.63,), (0.37,)}),
        ("ContrastIncreasing", {(1.63,), (0.37,)}),
        ("BrightnessIncreasing", {(1.63,), (0.37,)}),
        ("SharpnessIncreasing", {(1.63,), (0.37,)}),
        ("ShearX", {(0.21,), (-0.21,)}),
        ("ShearY", {(0.21,), (-0.21,)}),
        ("TranslateXRel", {(0.315,), (-0.315,)}),
        ("TranslateYRel", {(0.315,), (-0.315,)}),
    ],
)
def test_arguments_at_the_papers_magnitude(
    name: str, expected: set[tuple[float, ...]], rng: np.random.Generator
) -> None:
    """A wrong range is another augmentation than the one that the paper's numbers were reached with."""
    config = AugmentConfig(operations=15, magnitude=7.0, noise=0.0, probability=1.0)
    drawn = {
        tuple(round(argument, 9) for argument in operation.arguments)
        for operations in draws(config, rng, 100)
        for operation in operations
        if operation.name == name
    }
    assert drawn == expected


def test_levels_scatter_and_stay_on_the_scale(rng: np.random.Generator) -> None:
    """Without the noise all clips change equally much; beyond the scale a picture would vanish."""
    drawn = draws(AugmentConfig(operations=15, probability=1.0), rng)
    levels = [abs(one.arguments[0]) / 3 for many in drawn for one in many if one.name == "Rotate"]
    assert abs(np.mean(levels) - 7) < SIGMAS * 0.5 / np.sqrt(len(levels))
    assert abs(np.std(levels) - 0.5) < SIGMAS * 0.5 / np.sqrt(2 * len(levels))
    wild = draws(AugmentConfig(operations=15, magnitude=5.0, noise=50.0, probability=1.0), rng, 200)
    rotations = [abs(one.arguments[0]) for many in wild for one in many if one.name == "Rotate"]
    assert (min(rotations), max(rotations)) == (0, 30)


def test_half_of_the_signs_are_negative(rng: np.random.Generator) -> None:
    """Else all clips would lean to one side, or only ever become brighter."""
    drawn = [one for many in draws(AugmentConfig(operations=15, probability=1.0), rng) for one in many]
    for name in SIGNED + ENHANCEMENTS:
        middle = float(name in ENHANCEMENTS)
        signs = [one.arguments[0] > middle for one in drawn if one.name == name]
        assert_share(sum(signs), len(signs), 0.5)


def test_a_seed_draws_the_same_and_disturbs_nobody(seed: int) -> None:
    """A resumed run must see the same clips, and dropout must not depend on augmentation."""
    config = AugmentConfig(operations=15, crop_scale=0.5, flip=0.5)
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    one = draw_operations(config, seed)
    assert draw_operations(config, seed) == one
    assert len({draw_operations(config, seed + other) for other in range(20)}) == 20
    assert np.array_equal(np.random.get_state()[1], before)
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_another_magnitude_draws_the_same_operations(seed: int) -> None:
    """So that two runs that differ in one key differ in nothing else."""
    weak = draw_operations(AugmentConfig(operations=15, magnitude=3.0, flip=0.5), seed)
    strong = draw_operations(AugmentConfig(operations=15, magnitude=7.0, flip=0.5, crop_scale=0.5), seed)
    assert [one.name for one in weak] == [one.name for one in strong if one.name != "Crop"]


def test_crops_and_mirrors_have_the_share_that_was_asked_for(rng: np.random.Generator) -> None:
    """A crop that leaves the picture would train on grey; one that is too small on too little."""
    drawn = draws(AugmentConfig(crop_scale=0.3, flip=0.2), rng)
    assert_share(sum(operations[-1].name == "Flip" for operations in drawn), len(drawn), 0.2)
    left, top, side = np.array([operations[0].arguments for operations in drawn]).T
    assert side.min() ** 2 >= 0.3
    assert min(left.min(), top.min()) >= 0
    assert max((left + side).max(), (top + side).max()) <= 1 + 1e-12
    areas = side**2
    assert abs(areas.mean() - 0.65) < SIGMAS * 0.7 / np.sqrt(12 * len(areas))


def test_operations_become_few_passes() -> None:
    """A clip that is interpolated twice in a row is blurred twice, and takes twice the time."""
    geometric = [Operation("Crop", (0.1, 0.2, 0.5)), Operation("Flip"), Operation("ShearX", (0.2,))]
    tables = [Operation("Invert"), Operation("PosterizeIncreasing", (2,))]
    assert steps_of([], 20, 30) == ()
    assert [step.kind for step in steps_of(geometric, 20, 30)] == ["warp"]
    assert [step.kind for step in steps_of(geometric[1:2], 20, 30)] == ["mirror"]
    assert [step.kind for step in steps_of(tables, 20, 30)] == ["table"]
    mixed = [*geometric, *tables, Operation("Equalize"), *geometric]
    assert [step.kind for step in steps_of(mixed, 20, 30)] == ["warp", "table", "equalize", "warp"]


def test_an_unknown_operation_is_refused() -> None:
    """A misspelt name must not be an operation that does nothing."""
    with pytest.raises(ValueError, match="Posterise"):
        steps_of([Operation("Posterise", (2,))], 20, 30)
