"""Pictures that a person looks at: they must come out whatever the captions, ids and numbers are."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gare.report.pictures import Candidate, Example, contact_sheet, curves_picture, retrieval_picture
from tests.helpers.pictures import count_colour, pixels_of

GREEN, RED = (26, 152, 80), (196, 60, 57)


def _example(rng: np.random.Generator, query: str, right_rank: int, in_list: bool = True) -> Example:
    ranks = [*range(1, 6), *([right_rank] if right_rank > 5 and in_list else [])]
    ranked = [
        # Grey thumbnails: only frames and texts are coloured.
        Candidate(
            f"video{rank}",
            np.repeat(rng.integers(0, 255, (rng.integers(8, 90), rng.integers(8, 90), 1), np.uint8), 3, 2),
            1 / rank,
            rank == right_rank,
        )
        for rank in ranks
    ]
    return Example(query, ranked, right_rank)


def test_the_right_video_is_framed_green_or_shown_red_with_its_rank(rng: np.random.Generator) -> None:
    # Else a person cannot see at a glance whether the query was answered.
    hit = pixels_of(retrieval_picture([_example(rng, "a red circle", 3)]))
    assert count_colour(hit, GREEN) > 300
    assert count_colour(hit, RED) == 0
    missed = pixels_of(retrieval_picture([_example(rng, "a red circle", 1234)]))
    assert count_colour(missed, RED) > 300
    assert count_colour(missed, GREEN) == 0
    absent = pixels_of(retrieval_picture([_example(rng, "a red circle", 1234, in_list=False)]))
    assert 0 < count_colour(absent, RED) < count_colour(missed, RED)


def test_each_query_gets_a_row(rng: np.random.Generator) -> None:
    # Else queries are drawn over each other.
    one, four = (pixels_of(retrieval_picture([_example(rng, "q", 1)] * n)).shape for n in (1, 4))
    assert four[1] == one[1]
    assert four[0] - one[0] == 3 * 175


@pytest.mark.parametrize(
    "query",
    [
        "",
        "$5 and $6 \\frac{",
        "猫が歩く 👩‍👩‍👧 \u202e\x00\x1b[31m",
        "a" * 500,
        "word " * 300,
        "tab\tline\nbreak",
        "\ud800",
        "^_{}%#&",
    ],
)
def test_any_caption_and_id_can_be_drawn(rng: np.random.Generator, query: str) -> None:
    # Else one odd caption costs the run its picture: missing glyphs and mathematics raise here.
    example = _example(rng, query, 7)
    odd = [Candidate(query, c.thumbnail, c.score, c.is_right) for c in example.ranked]
    assert pixels_of(retrieval_picture([Example(query, odd, 7)], title=query)).size
    assert pixels_of(curves_picture({query: [(0, 1.0)], f"{query}/R1": [(0, 1.0)]}, title=query)).size
    assert pixels_of(contact_sheet([example.ranked[0].thumbnail], [query])).size


@pytest.mark.parametrize(
    "history",
    [
        {},
        {"loss": []},
        {"loss": [(0, 1.0)], "t2v/R1": [(0, 0.0)], "v2t/R1": [(0, 100.0)]},
        {"loss": [(0, math.nan), (1, math.inf)], "t2v/R1": [(0, math.nan)]},
        {
            "loss": [(step, 1.0) for step in range(50)],
            "tiny": [(3, 1e-9)],
            "radii": [(3, 1e-5), (4, math.nan)],
        },
        {"loss": [(0, 0.0)], "radii": [(0, -0.5), (1, 3e5)]},
        {f"term{index}": [(0, index), (1, index)] for index in range(9)},
    ],
)
def test_any_history_can_be_drawn(history: dict[str, list[tuple[int, float]]]) -> None:
    # Else a run of one step, or one that diverged, ends without the picture that shows it.
    assert pixels_of(curves_picture(history)).shape[2] == 3


def test_a_contact_sheet_has_a_cell_for_each_image(rng: np.random.Generator) -> None:
    # Else previews are missing from the sheet.
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    images = [np.full((int(rng.integers(9, 500)), 40, 3), colour, np.uint8) for colour in colours]
    sheet = pixels_of(contact_sheet(images, ["a", "b", "c"], columns=2))
    assert all(count_colour(sheet, colour) > 100 for colour in colours)
    with pytest.raises(ValueError, match="3 images"):
        contact_sheet(images, ["a"])
    assert pixels_of(contact_sheet([], [])).size
