"""Retrieval metrics from a score matrix and an explicit text → video map.

N texts, M videos. Ranks count from 1. Tied candidates get their mean rank: a model that gives all candidates
the same score then ranks the right one in the middle, neither first (optimistic: a collapsed model would look
perfect) nor last, and the result does not depend on the order of the files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gare.errors import DataError
from gare.retrieval.ranking.grid import check_owners

#: Depths k of R@k.
RECALL_DEPTHS = (1, 5, 10, 50)


def retrieval_metrics(scores: Tensor, video_of_text: Tensor) -> dict[str, float]:
    """Computes R@1, R@5, R@10, R@50 in percent, median and mean rank, text→video and video→text.

    Text→video ranks the videos for every caption. In video→text a gallery item is a video's set of captions,
    its score is the maximum over them, and the rank is among the videos that have captions; videos without
    captions are not used as queries.

    Args:
        scores: (N, M), higher is better.
        video_of_text: (N,) int64, the video (column) that each text (row) describes.

    Returns:
        ``t2v/R1`` … ``t2v/R50``, ``t2v/MdR`` (mean of the two middle ranks), ``t2v/MnR``, and the
        same under ``v2t/``.

    Raises:
        DataError: for shapes that do not fit, scores that are not finite, or an owner out of range.
    """
    _check(scores, video_of_text)
    return rank_summary(text_to_video_ranks(scores, video_of_text), "t2v") | rank_summary(
        video_to_text_ranks(scores, video_of_text), "v2t"
    )


def text_to_video_ranks(scores: Tensor, video_of_text: Tensor) -> Tensor:
    """Computes the rank (N,) float64 of each text's own video among all M videos."""
    right = scores.gather(1, video_of_text.unsqueeze(1))
    return _rank(scores, right)


def video_to_text_ranks(scores: Tensor, video_of_text: Tensor) -> Tensor:
    """Ranks each captioned video's own captions among the caption sets, float64, in order of the videos."""
    captioned, owner = torch.unique(video_of_text, return_inverse=True)
    best = scores.new_full((len(captioned), len(captioned)), -torch.inf)
    index = owner.unsqueeze(1).expand(-1, len(captioned))
    best = best.scatter_reduce(0, index, scores[:, captioned], reduce="amax")
    by_video = best.T
    return _rank(by_video, by_video.diagonal().unsqueeze(1))


def _rank(candidates: Tensor, right: Tensor) -> Tensor:
    """Computes 1 + better candidates + half of the other tied ones, along the rows."""
    better = (candidates > right).sum(dim=1, dtype=torch.float64)
    tied = (candidates == right).sum(dim=1, dtype=torch.float64) - 1
    return 1 + better + tied / 2


def rank_summary(ranks: Tensor, direction: str) -> dict[str, float]:
    """Computes R@k in percent, median and mean of ranks (Q,) float64 of one direction, by metric name."""
    recalls = {
        # From the count, not from a mean, so that 15.9375 is not shown as 15.937499999999998.
        f"{direction}/R{depth}": ((ranks <= depth).double().sum() * 100 / len(ranks)).item()
        for depth in RECALL_DEPTHS
    }
    return recalls | {
        f"{direction}/MdR": ranks.quantile(0.5).item(),
        f"{direction}/MnR": ranks.mean().item(),
    }


def _check(scores: Tensor, video_of_text: Tensor) -> None:
    if not (isinstance(scores, Tensor) and scores.is_floating_point()):
        raise DataError("scores are no floating-point tensor", where="retrieval_metrics")
    shape = video_of_text.shape if isinstance(video_of_text, Tensor) else ()
    if scores.ndim != 2 or shape != scores.shape[:1] or not scores.numel():
        raise DataError(
            f"scores {tuple(scores.shape)} and video_of_text {tuple(shape)} do not fit",
            where="retrieval_metrics",
            accepted="(N, M) scores and N owners",
        )
    if not scores.isfinite().all():
        bad = (~scores.isfinite()).nonzero()[0].tolist()
        raise DataError(f"score at {bad} is not finite", where="retrieval_metrics")
    check_owners(video_of_text, scores.shape[1])
