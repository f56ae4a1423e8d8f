"""Ranks counted block by block are those of the whole matrix, whatever the blocks, shares and repetitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gare.errors import DataError, GareError
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.retrieval.ranking.grid import Grid
from gare.retrieval.ranking.metrics import retrieval_metrics, text_to_video_ranks, video_to_text_ranks
from gare.retrieval.ranking.postprocess import Plain
from gare.retrieval.ranking.ranks import count, join_counts, rank_blocks, rank_split
from gare.retrieval.ranking.scoring import MatrixBlocks, ModelBlocks
from gare.retrieval.ranking.survey import SurveyRequest, join_surveys, survey
from tests.helpers.golden import GOLDEN
from tests.helpers.tiny import tiny_config


def random_grid(rng: np.random.Generator, owner: torch.Tensor, num_videos: int) -> Grid:
    return Grid.of(
        owner,
        num_videos,
        texts=int(rng.integers(1, len(owner) + 3)),
        videos=int(rng.integers(1, num_videos + 3)),
        by_rows=bool(rng.integers(2)),
    )


def random_matrix(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with many ties, several captions a video in any order, videos without captions."""
    num_texts, num_videos = int(rng.integers(1, 60)), int(rng.integers(1, 40))
    scores = torch.from_numpy(rng.integers(-4, 5, (num_texts, num_videos)) / 7)
    kind = (torch.float32, torch.float64)[rng.integers(2)]
    return scores.to(kind), torch.from_numpy(rng.integers(0, num_videos, num_texts))


def test_any_blocks_give_the_whole_matrix_metrics(rng: np.random.Generator) -> None:
    """A number that moves with the memory of the machine cannot be compared; these are equal to the bit."""
    for _ in range(60):
        scores, owner = random_matrix(rng)
        found = rank_blocks(MatrixBlocks(scores), random_grid(rng, owner, scores.shape[1]))[""]
        assert found.metrics() == retrieval_metrics(scores, owner)
        assert torch.equal(found.t2v.rank, text_to_video_ranks(scores, owner))
        assert found.v2t is not None
        assert torch.equal(found.v2t.rank, video_to_text_ranks(scores, owner))
        assert torch.equal(found.v2t.query, owner.unique())


@pytest.mark.parametrize("name", ["square", "multi"])
def test_blocks_of_the_released_codes_matrices(name: str, rng: np.random.Generator) -> None:
    """The blockwise way is the one that publishes: it must give the released numbers itself."""
    golden = np.load(GOLDEN / "metrics.npz")
    scores = torch.from_numpy(golden[name])
    owner = torch.from_numpy(golden["multi_owner"]).long() if name == "multi" else torch.arange(len(scores))
    found = rank_blocks(MatrixBlocks(scores), random_grid(rng, owner, scores.shape[1]))[""].metrics()
    names = {"R1": "R1", "R5": "R5", "R10": "R10", "R50": "R50", "MeanR": "MnR"}
    if name == "square":
        # The released median of several captions is the lower middle value; ours is the mean of the two.
        names["MedianR"] = "MdR"
    prefix = "multi_" if name == "multi" else ""
    compared = 0
    for direction in ("t2v", "v2t"):
        for theirs, ours in names.items():
            if (key := f"{prefix}{direction}/{theirs}") in golden.files:
                assert found[f"{direction}/{ours}"] == pytest.approx(float(golden[key]), rel=1e-5), key
                compared += 1
    assert compared >= 8


def test_best_candidates_are_those_of_a_sort(rng: np.random.Generator) -> None:
    """The lists that people look at must be the model's, with equals in one order on every machine."""
    for _ in range(20):
        scores, owner = random_matrix(rng)
        scores = scores.float()
        found = rank_blocks(MatrixBlocks(scores), random_grid(rng, owner, scores.shape[1]))[""]
        order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :10]
        kept = order.shape[1]
        assert torch.equal(found.t2v.candidates[:, :kept], order)
        assert torch.equal(found.t2v.scores[:, :kept], scores.gather(1, order))
        assert (found.t2v.candidates[:, kept:] == -1).all()
        assert torch.equal(found.t2v.own_score, scores.gather(1, owner.unsqueeze(1)).squeeze(1))
        videos = owner.unique()
        best = torch.stack([scores[owner == video].amax(dim=0) for video in videos.tolist()])[:, videos].T
        order = torch.argsort(best, dim=1, descending=True, stable=True)[:, :10]
        assert found.v2t is not None
        assert torch.equal(found.v2t.candidates[:, : order.shape[1]], videos[order])
        assert torch.equal(found.v2t.own_score, best.diagonal())


def test_uneven_and_repeated_shares_count_once(rng: np.random.Generator) -> None:
    """Workers die, tasks run again and results come in any order: no query may be lost or counted twice."""
    for _ in range(20):
        scores, owner = random_matrix(rng)
        blocks, grid = MatrixBlocks(scores), random_grid(rng, owner, scores.shape[1])
        shares = range(grid.num_shares)
        again = [*rng.permutation(grid.num_shares), *rng.choice(grid.num_shares, 2)]
        seen = join_surveys([survey(blocks, grid, int(share), SurveyRequest()) for share in again], grid)
        counted = [count(blocks, grid, int(share), seen, [Plain()]) for share in again]
        found = join_counts(counted, grid, seen, [Plain()])[""]
        assert found.metrics() == retrieval_metrics(scores, owner)
        lost = int(rng.choice(shares))
        kept = [part for part in counted if part.share != lost]
        with pytest.raises(GareError, match=f"missing: {lost}$"):
            join_counts(kept, grid, seen, [Plain()])


@pytest.mark.parametrize("context", ["frames", "words"])
def test_a_models_split_is_ranked_as_its_matrix(context: str, seed: int, rng: np.random.Generator) -> None:
    """Both forms of the context, padding of blocks included, give the ranks of the scores of all pairs."""
    torch.manual_seed(seed)
    model = GARE(tiny_config(f"model.context={context}").model).eval()
    num_texts, num_videos = 75, 70
    mask = torch.arange(4) < torch.randint(1, 5, (num_videos, 1))
    word_mask = torch.arange(8) < torch.randint(1, 9, (num_texts, 1))
    words = torch.randn(num_texts, 8, 32) * word_mask.unsqueeze(-1)
    text = TextFeatures(torch.randn(num_texts, 32), words, word_mask)
    video = VideoFeatures(torch.randn(num_videos, 4, 32) * mask.unsqueeze(-1), mask)
    owner = torch.from_numpy(rng.integers(0, num_videos, num_texts))
    found = rank_split(model, text, video, owner)
    exact = model.score(text, video).detach()
    assert found.metrics() == pytest.approx(retrieval_metrics(exact, owner))
    torch.testing.assert_close(found.t2v.own_score, exact.gather(1, owner.unsqueeze(1)).squeeze(1))


def test_blocks_of_a_model_are_bounded(seed: int) -> None:
    """A block that grows with the split would bring the matrix of all scores back."""
    torch.manual_seed(seed)
    model = GARE(tiny_config().model).eval()
    text = TextFeatures(torch.randn(3000, 32), None, torch.ones(3000, 1, dtype=torch.bool))
    video = VideoFeatures(torch.randn(3000, 4, 32), torch.ones(3000, 4, dtype=torch.bool))
    grid = ModelBlocks(model, text, video).grid(torch.arange(3000))
    largest = max((r.stop - r.start) * (c.stop - c.start) for r in grid.rows for c in grid.columns)
    assert largest <= 1024 * 256
    covered = [0] * 3000
    for share in range(grid.num_shares):
        for rows, columns in grid.cells(share):
            if rows.start == 0:
                covered[columns] = [count + 1 for count in covered[columns]]
    assert covered == [1] * 3000


@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_the_grid_does_not_depend_on_the_device(
    kernel: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Who plans the shares has a CPU, who scores them GPUs: another grid would leave videos out, or twice."""
    torch.manual_seed(seed)
    model = GARE(tiny_config(f"model.kernel={kernel}").model).eval()
    text = TextFeatures(torch.randn(300, 32), None, torch.ones(300, 1, dtype=torch.bool))
    video = VideoFeatures(torch.randn(300, 4, 32), torch.ones(300, 4, dtype=torch.bool))
    planned = ModelBlocks(model, text, video).grid(torch.arange(300))
    blocks = ModelBlocks(model, text, video)
    blocks.device = "cuda"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70 * 10**9, 80 * 10**9))
    found = blocks.grid(torch.arange(300))
    assert (found.rows, found.columns) == (planned.rows, planned.columns)


def test_a_score_that_is_no_number_is_named() -> None:
    """A nan compares false with everything: its query would rank first."""
    scores = torch.zeros(4, 5)
    scores[2, 3] = torch.nan
    owner = torch.tensor([4, 0, 3, 1])
    with pytest.raises(DataError, match="text 2 with video 3"):
        rank_blocks(MatrixBlocks(scores), Grid.of(owner, 5, texts=2, videos=2))


def test_owners_out_of_range_are_refused() -> None:
    """A wrong map would give plausible numbers of the wrong videos."""
    with pytest.raises(DataError, match="0 to 2"):
        Grid.of(torch.tensor([0, 3]), 3)
    with pytest.raises(DataError, match="int64"):
        Grid.of(torch.tensor([0.0]), 3)


def test_a_block_has_the_same_bits_again(seed: int) -> None:
    """Marks come from one pass and competitors from another: a last bit between them would turn ties."""
    torch.manual_seed(seed)
    model = GARE(tiny_config().model).eval()
    text = TextFeatures(torch.randn(90, 32), None, torch.ones(90, 1, dtype=torch.bool))
    video = VideoFeatures(torch.randn(70, 4, 32), torch.ones(70, 4, dtype=torch.bool))
    blocks, texts, columns = ModelBlocks(model, text, video), torch.arange(5, 90), slice(3, 70)
    first = blocks.block(texts, columns, again=True)
    assert blocks.block(texts, columns) is first
    elsewhere = ModelBlocks(model, text, video)
    elsewhere.block(torch.arange(7), slice(0, 9))
    for source in (blocks, elsewhere):
        again = source.block(texts, columns)
        assert again is not first
        assert torch.equal(again, first)
