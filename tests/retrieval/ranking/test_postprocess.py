"""Dual softmax and query-bank normalisation, block by block, against their definitions on whole matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gare.errors import DataError
from gare.retrieval.ranking.grid import Grid
from gare.retrieval.ranking.metrics import retrieval_metrics
from gare.retrieval.ranking.postprocess import PostProcessing
from gare.retrieval.ranking.ranks import rank_blocks
from gare.retrieval.ranking.scoring import MatrixBlocks
from tests.retrieval.ranking.test_ranks import random_grid

BOTH = PostProcessing(dsl_scale=30.0, qbnorm_scale=20.0)


def only(metrics: dict[str, float], direction: str) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith(direction)}


def released_bank_norm(bank: torch.Tensor, scores: torch.Tensor, scale: float) -> torch.Tensor:
    """As the paper's code has it: queries whose first video is first for one of the bank are divided."""
    activated = set(bank.argmax(dim=1).tolist())
    sums = (scale * bank).exp().sum(dim=0)
    rows = [
        (scale * row).exp() / sums if int(row.argmax()) in activated else (scale * row).exp()
        for row in scores
    ]
    return torch.stack(rows)


def test_blocks_give_the_definitions(rng: np.random.Generator) -> None:
    """Numbers under these names are compared with papers that apply them to the whole matrix."""
    for _ in range(15):
        num_texts, num_videos, num_bank = (int(count) for count in rng.integers(2, 40, 3))
        owner = torch.from_numpy(rng.integers(0, num_videos, num_texts))
        scores = torch.from_numpy(rng.uniform(-1, 1, (num_texts, num_videos)))
        bank = torch.from_numpy(rng.uniform(-1, 1, (num_bank, num_videos)))
        grid = random_grid(rng, owner, num_videos)
        bank_owner = torch.from_numpy(rng.integers(0, num_videos, num_bank))
        banks = MatrixBlocks(bank), random_grid(rng, bank_owner, num_videos)
        found = rank_blocks(MatrixBlocks(scores), grid, BOTH, banks)
        assert set(found) == {"", "dsl", "qbnorm"}
        assert found[""].metrics() == retrieval_metrics(scores, owner)
        over_texts = scores * (30 * scores).softmax(dim=0)
        over_videos = scores * (30 * scores).softmax(dim=1)
        dual = found["dsl"].metrics("dsl")
        assert only(dual, "dsl/t2v") == {
            f"dsl/{name}": value for name, value in only(retrieval_metrics(over_texts, owner), "t2v").items()
        }
        assert only(dual, "dsl/v2t") == {
            f"dsl/{name}": value for name, value in only(retrieval_metrics(over_videos, owner), "v2t").items()
        }
        released = retrieval_metrics(released_bank_norm(bank, scores, 20.0), owner)
        assert found["qbnorm"].metrics() == only(released, "t2v")


def test_a_hub_no_longer_wins() -> None:
    """What the correction is for: a video that is near every query steps back for the right ones."""
    scores = torch.full((6, 6), 0.1).fill_diagonal_(0.5)
    scores[:, 0] = 0.55
    bank = torch.full((20, 6), 0.1)
    bank[:, 0] = 0.55
    owner = torch.arange(6)
    grid = Grid.of(owner, 6, texts=4, videos=4)
    banks = MatrixBlocks(bank), Grid.of(torch.zeros(20, dtype=torch.int64), 6)
    found = rank_blocks(MatrixBlocks(scores), grid, BOTH, banks)
    assert found[""].metrics()["t2v/R1"] == pytest.approx(100 / 6)
    assert found["dsl"].metrics("dsl")["dsl/t2v/R1"] > 80
    assert found["qbnorm"].metrics("qbnorm")["qbnorm/t2v/R1"] > 80


def test_equal_queries_stay_equal(rng: np.random.Generator) -> None:
    """Corrections that break ties by rounding would make the order of the files matter."""
    scores = torch.from_numpy(rng.uniform(-1, 1, (1, 9))).float().repeat(9, 1)
    found = rank_blocks(
        MatrixBlocks(scores), Grid.of(torch.arange(9), 9, texts=2, videos=4), PostProcessing(50.0)
    )
    assert found["dsl"].v2t is not None
    assert torch.equal(found["dsl"].v2t.rank, torch.full((9,), 5.0, dtype=torch.float64))


def test_a_bank_is_needed() -> None:
    """Plain numbers under the name qbnorm would claim what was not done."""
    owner = torch.arange(3)
    with pytest.raises(DataError, match="no bank"):
        rank_blocks(MatrixBlocks(torch.eye(3)), Grid.of(owner, 3), PostProcessing(qbnorm_scale=20.0))
