"""The sampling rule: a reader compares scores with the paper only if the same moments are looked at."""

from __future__ import annotations

import numpy as np
import pytest

from gare.data.decode.sampling import (
    equally_spaced,
    frames_on_screen,
    keyframes_within,
    sample_times,
    uniform_times,
)


def test_one_frame_per_second_from_the_start() -> None:
    """Lost otherwise: frames of other moments than the released loader's."""
    assert sample_times(0, 3.5, 1).tolist() == [0, 1, 2, 3]
    assert sample_times(0, 3.0, 1).tolist() == [0, 1, 2]  # the end is excluded
    assert sample_times(0.1, 1.1, 2).tolist() == [0.1, 0.6]
    assert sample_times(0, 2, 0.25).tolist() == [0]


def test_end_that_rounding_puts_after_the_last_frame() -> None:
    """Lost otherwise: a second copy of the last frame, because 300 · (1/30) is a hair above 10."""
    assert len(sample_times(0, 10.0000000001, 1)) == 10


@pytest.mark.parametrize("end_s", [0.0, 1e-9, 0.01])
def test_the_shortest_clip_has_a_frame(end_s: float) -> None:
    """Lost otherwise: clips of a single picture."""
    assert sample_times(0, end_s, 1).tolist() == [0]


@pytest.mark.parametrize(
    ("start_s", "end_s", "fps"), [(0, 1, 0), (0, 1, -1), (0, 1, float("inf")), (2, 1, 1)]
)
def test_impossible_requests_are_refused(start_s: float, end_s: float, fps: float) -> None:
    """Lost otherwise: an empty or endless list in place of a message."""
    with pytest.raises(ValueError):
        sample_times(start_s, end_s, fps)


def test_choose_is_the_released_rule(rng: np.random.Generator) -> None:
    """Lost otherwise: first or last frame, or positions rounded where the released code truncates."""
    assert equally_spaced(5, 12).tolist() == [0, 1, 2, 3, 4]
    assert equally_spaced(12, 12).tolist() == list(range(12))
    assert equally_spaced(20, 12).tolist() == [0, 1, 3, 5, 6, 8, 10, 12, 13, 15, 17, 19]
    assert equally_spaced(7, 1).tolist() == [0]
    for num_candidates, num_frames in rng.integers(1, 200, (200, 2)):
        kept = equally_spaced(int(num_candidates), int(num_frames))
        assert len(kept) == min(num_candidates, num_frames)
        assert kept[0] == 0
        assert kept[-1] == num_candidates - 1 or num_frames == 1
        assert (np.diff(kept) > 0).all()


@pytest.mark.parametrize(("num_candidates", "num_frames"), [(0, 1), (1, 0)])
def test_choose_from_nothing_is_refused(num_candidates: int, num_frames: int) -> None:
    """Lost otherwise: an empty clip."""
    with pytest.raises(ValueError):
        equally_spaced(num_candidates, num_frames)


def test_uniform_moments_are_the_centres_of_equal_segments() -> None:
    """Lost otherwise: the same share of the clip on both sides of each frame."""
    assert uniform_times(0, 12, 3).tolist() == [2, 6, 10]
    assert uniform_times(5, 6, 4).tolist() == [5.125, 5.375, 5.625, 5.875]
    assert uniform_times(7, 7, 2).tolist() == [7, 7]  # a single picture without a duration
    for start_s, end_s, num_frames in ((0, 1, 0), (2, 1, 3), (0, float("nan"), 3)):
        with pytest.raises(ValueError):
            uniform_times(start_s, end_s, num_frames)


def test_keyframes_of_a_clip() -> None:
    """Lost otherwise: the keyframe at the very start, or pictures from outside of the clip."""
    keys_s = np.array([0.0, 2.0, 5.0, 9.0, 14.0])
    assert keyframes_within(keys_s, 0, 20, 12).tolist() == [0, 1, 2, 3, 4]
    assert keyframes_within(keys_s, 2, 14, 12).tolist() == [1, 2, 3]  # the end is excluded
    assert keyframes_within(keys_s, 0, 20, 3).tolist() == [0, 2, 4]
    assert keyframes_within(keys_s, 9.5, 13, 12).tolist() == [3]  # none inside: the nearest to the middle
    assert keyframes_within(keys_s, 30, 40, 12).tolist() == [4]


def test_the_frame_on_screen(rng: np.random.Generator) -> None:
    """Lost otherwise: at a variable frame rate, the picture after the moment, not the one shown then."""
    frames_s = np.array([0.5, 1.0, 4.0, 4.1])
    times_s = np.array([0, 0.5, 0.99, 1, 3.99, 4, 9])
    assert frames_on_screen(frames_s, times_s).tolist() == [0, 0, 0, 1, 1, 2, 3]
    frames_s = np.unique(rng.uniform(0, 10, 50))
    times_s = rng.uniform(-1, 11, 200)
    slow = [max([i for i, t in enumerate(frames_s) if t <= time + 1e-6], default=0) for time in times_s]
    assert frames_on_screen(frames_s, times_s).tolist() == slow
