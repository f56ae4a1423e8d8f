"""Figures of ranks, similarities and increments can be drawn from what runs leave."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from gare.report.figures import checkpoints_picture, increments_picture, rank_histogram, similarity_matrix


def colours(png: bytes) -> set[tuple[int, ...]]:
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return set(map(tuple, np.unique(pixels.reshape(-1, 3), axis=0).tolist()))


def test_figures_show_what_they_are_given(rng: np.random.Generator) -> None:
    """An empty figure in MLflow would pass for a result."""
    ranks = {"t2v": np.ceil(rng.exponential(8, 500)), "v2t": np.array([1.0, 1.5, 60.0])}
    blue, orange = (0, 114, 178), (213, 94, 0)
    assert {blue, orange} <= colours(rank_histogram(ranks, "two directions"))
    assert orange not in colours(rank_histogram({"t2v": ranks["t2v"]}))
    scores = (rng.standard_normal((20, 20)) + 3 * np.eye(20)).astype(np.float32)
    assert len(colours(similarity_matrix(scores, 400, "scores"))) > 150
    assert len(colours(similarity_matrix(np.zeros((20, 20), np.float32), 400))) < len(
        colours(similarity_matrix(scores, 400))
    )


def test_increments_are_drawn_where_they_were_measured(rng: np.random.Generator) -> None:
    """A baseline has no increments, and its training must not end because of that."""
    assert increments_picture({"loss/total": [(1, 2.0)]}) is None
    steps = {
        name: [(step, float(value)) for step, value in enumerate(rng.random(9))]
        for name in ("delta/norm_positive", "delta/cosine_gap_positive", "gap/modality")
    }
    png = increments_picture(steps, "Δ")
    assert png is not None
    assert (0, 114, 178) in colours(png)


def test_checkpoints_are_drawn_with_the_one_to_report(rng: np.random.Generator) -> None:
    """The eye goes to the highest point, which is the one that must not be reported."""
    points = [(step, float(value)) for step, value in enumerate(rng.uniform(1, 2, 12))]
    curves = {"text → video": points, "video → text": points[::-1]}
    plain = colours(checkpoints_picture(curves, {}, "note"))
    marked = {"the checkpoint to report": points[3], "the best of 12 looks": points[7]}
    green, pink = (0, 158, 115), (204, 121, 167)
    assert not {green, pink} & plain
    assert {green, pink} <= colours(checkpoints_picture(curves, marked, "note", "title $a$"))
