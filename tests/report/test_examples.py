"""The queries that the retrieval picture shows are a fair sample, with their true ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gare.config import ExtractConfig
from gare.data.manifest import ManifestRow
from gare.data.store.frame_reader import FrameReader
from gare.report.examples import TOP, choose_examples
from gare.retrieval.ranking.grid import Grid
from gare.retrieval.ranking.ranks import Ranking, rank_blocks
from gare.retrieval.ranking.scoring import MatrixBlocks
from tests.helpers.stores import write_store

EXTRACT = ExtractConfig(num_frames=4, image_size=16, encoding="raw")
NUM_VIDEOS = 8


@pytest.fixture
def rows() -> list[ManifestRow]:
    return [
        ManifestRow(f"v{index}", f"/v{index}.mp4", None, None, "test", ("a", "b"))
        for index in range(NUM_VIDEOS)
    ]


def ranking_of(scores: torch.Tensor, owners: torch.Tensor) -> Ranking:
    grid = Grid.of(owners, scores.shape[1], texts=3, videos=4)
    return rank_blocks(MatrixBlocks(scores), grid)[""].t2v


@pytest.mark.parametrize("count", [1, 3, 16, 99])
def test_examples(rows: list[ManifestRow], rng: np.random.Generator, tmp_path: Path, count: int) -> None:
    """A picture with another order, rank or thumbnail than the metrics saw misleads who looks at it."""
    stored = write_store(str(tmp_path), EXTRACT, [row.video_id for row in rows], rng)
    owners = torch.arange(NUM_VIDEOS).repeat_interleave(2)
    scores = torch.from_numpy(rng.permutation(16 * NUM_VIDEOS).reshape(16, NUM_VIDEOS).astype(np.float32))
    texts = [f"text {index}" for index in range(16)]
    reader = FrameReader(str(tmp_path))
    examples = choose_examples(ranking_of(scores, owners), owners, texts, rows, reader, count)
    assert len(examples) == min(count, 16)
    assert len({example.query for example in examples}) == len(examples)
    for example in examples:
        text = texts.index(example.query)
        order = scores[text].argsort(descending=True).tolist()
        right = int(owners[text])
        rank = order.index(right) + 1
        assert example.right_rank == rank
        expected = order[:TOP] if rank <= TOP else [*order[:TOP], right]
        assert [candidate.video_id for candidate in example.ranked] == [
            rows[index].video_id for index in expected
        ]
        assert [candidate.is_right for candidate in example.ranked] == [index == right for index in expected]
        for candidate, index in zip(example.ranked, expected, strict=True):
            assert candidate.score == float(scores[text, index])
            frames = stored[rows[index].video_id]
            assert np.array_equal(candidate.thumbnail, frames[len(frames) // 2])


def test_few_videos_are_all_shown(rows: list[ManifestRow], rng: np.random.Generator, tmp_path: Path) -> None:
    """A first try with two videos must get its picture too."""
    write_store(str(tmp_path), EXTRACT, ["v0", "v1"], rng)
    scores = torch.tensor([[0.1, 0.2], [0.3, 0.3]])
    owners = torch.tensor([0, 1])
    ranking = ranking_of(scores, owners)
    examples = choose_examples(ranking, owners, ["x", "y"], rows[:2], FrameReader(str(tmp_path)), 6)
    assert [len(example.ranked) for example in examples] == [2, 2]
    # Tied with one other, the right one ranks 1.5, which a person reads as second.
    assert [example.right_rank for example in examples] == [2, 2]


def test_best_and_worst(rows: list[ManifestRow], rng: np.random.Generator, tmp_path: Path) -> None:
    """Where the model fails is seen only if the failures are those shown, and not one video's alone."""
    write_store(str(tmp_path), EXTRACT, [row.video_id for row in rows], rng)
    owners = torch.arange(NUM_VIDEOS).repeat_interleave(2)
    ranking = ranking_of(torch.from_numpy(rng.random((16, NUM_VIDEOS), np.float32)), owners)
    texts = [str(index) for index in range(16)]
    reader = FrameReader(str(tmp_path))
    examples = choose_examples(ranking, owners, texts, rows, reader, 5, "best and worst")
    of_video = ranking.rank.reshape(NUM_VIDEOS, 2)
    best, worst = sorted(of_video.amin(1).tolist()), sorted(of_video.amax(1).tolist())
    assert [example.right_rank for example in examples] == [*best[:3], *worst[-2:]]
    right = [next(one.video_id for one in example.ranked if one.is_right) for example in examples]
    assert len(set(right[:3])) == 3
    assert len(set(right[3:])) == 2
    # One video with all the captions: there are no others to choose.
    alone = torch.zeros(16, dtype=torch.long)
    single = ranking_of(torch.from_numpy(rng.random((16, 1), np.float32)), alone)
    shown = choose_examples(single, alone, texts, rows[:1], reader, 5, "best and worst")
    assert len({example.query for example in shown}) == 5
