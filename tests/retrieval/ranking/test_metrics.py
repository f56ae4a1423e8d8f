"""Metrics against hand-made matrices, a brute-force count and the released code's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gare.errors import DataError
from gare.retrieval.ranking.metrics import retrieval_metrics
from tests.helpers.golden import GOLDEN


def brute_force(scores: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """The definition, query by query, candidate by candidate."""

    def rank(row: list[float], right: int) -> float:
        better = sum(value > row[right] for value in row)
        tied = sum(value == row[right] for value in row) - 1
        return 1 + better + tied / 2

    t2v = [rank(list(scores[i]), owner[i]) for i in range(len(owner))]
    captioned = sorted(set(owner.tolist()))
    v2t = []
    for position, video in enumerate(captioned):
        row = [max(scores[i, video] for i in range(len(owner)) if owner[i] == other) for other in captioned]
        v2t.append(rank(row, position))
    out = {}
    for name, ranks in (("t2v", t2v), ("v2t", v2t)):
        for k in (1, 5, 10, 50):
            out[f"{name}/R{k}"] = 100 * sum(r <= k for r in ranks) / len(ranks)
        out[f"{name}/MdR"] = float(np.median(ranks))
        out[f"{name}/MnR"] = float(np.mean(ranks))
    return out


def test_metrics_equal_a_brute_force_count(rng: np.random.Generator) -> None:
    """Ties, several captions a video and videos without captions: each shifts published numbers by points."""
    for _ in range(20):
        num_texts, num_videos = rng.integers(1, 40), rng.integers(1, 30)
        scores = rng.integers(0, 6, (num_texts, num_videos)) / 7
        owner = rng.integers(0, num_videos, num_texts)
        found = retrieval_metrics(torch.tensor(scores), torch.tensor(owner))
        assert found == pytest.approx(brute_force(scores, owner))


def test_a_model_that_says_nothing_gets_the_middle_rank() -> None:
    """A collapsed model must not look perfect."""
    found = retrieval_metrics(torch.zeros(9, 9), torch.arange(9))
    assert found["t2v/R1"] == 0
    assert found["t2v/MdR"] == found["v2t/MnR"] == 5


def test_square_equals_released_code() -> None:
    """Our R@k must be the R@k of the papers."""
    golden = np.load(GOLDEN / "metrics.npz")
    scores = torch.from_numpy(golden["square"])
    found = retrieval_metrics(scores, torch.arange(len(scores)))
    names = {"R1": "R1", "R5": "R5", "R10": "R10", "R50": "R50", "MedianR": "MdR", "MeanR": "MnR"}
    compared = 0
    for key in golden.files:
        direction, _, name = key.partition("/")
        if direction in ("t2v", "v2t") and name in names:
            assert found[f"{direction}/{names[name]}"] == pytest.approx(float(golden[key]), rel=1e-5), key
            compared += 1
    assert compared >= 10


def test_several_captions_equal_released_code() -> None:
    """MSVD has 41 captions a video: both directions must count them as the released code does."""
    golden = np.load(GOLDEN / "metrics.npz")
    scores, owner = torch.from_numpy(golden["multi"]), torch.from_numpy(golden["multi_owner"]).long()
    found = retrieval_metrics(scores, owner)
    compared = 0
    for key in golden.files:
        direction, _, name = key.removeprefix("multi_").partition("/")
        # The released median is the lower middle value there; ours is the mean of the two.
        if key.startswith("multi_") and name in ("R1", "R5", "R10", "R50", "MeanR"):
            ours = found[f"{direction}/{name.replace('MeanR', 'MnR')}"]
            assert ours == pytest.approx(float(golden[key]), rel=1e-5), key
            compared += 1
    assert compared >= 8


@pytest.mark.parametrize(
    ("scores", "owner", "said"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), "0 to 2"),
        (torch.zeros(2, 3), torch.tensor([0]), "do not fit"),
        (torch.tensor([[0.0, torch.nan]]), torch.tensor([0]), "not finite"),
    ],
)
def test_bad_input_is_named(scores: torch.Tensor, owner: torch.Tensor, said: str) -> None:
    """A wrong map or a nan must never become a plausible score."""
    with pytest.raises(DataError, match=said):
        retrieval_metrics(scores, owner)


def test_order_of_the_gallery_does_not_matter(rng: np.random.Generator) -> None:
    """Numbers that move when files are renamed cannot be published."""
    scores = torch.from_numpy(rng.integers(0, 5, (12, 9)) / 5)
    owner = torch.from_numpy(rng.integers(0, 9, 12))
    texts, videos = torch.from_numpy(rng.permutation(12)), torch.from_numpy(rng.permutation(9))
    place = torch.empty(9, dtype=torch.int64)
    place[videos] = torch.arange(9)
    moved = retrieval_metrics(scores[texts][:, videos], place[owner[texts]])
    assert moved == pytest.approx(retrieval_metrics(scores, owner))


def test_videos_without_captions_are_candidates_but_no_queries() -> None:
    """A gallery with distractors is harder for text→video, and has no question to ask of them."""
    scores = torch.tensor([[0.5, 0.9, 0.1], [0.2, 0.8, 0.3]])
    found = retrieval_metrics(scores, torch.tensor([0, 2]))
    assert found["t2v/MnR"] == 2
    assert found["v2t/MnR"] == 1
    assert found["v2t/R1"] == 100
