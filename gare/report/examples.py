"""Selection of queries, with their rankings, for the retrieval picture.

N texts, M videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gare.data.manifest import ManifestRow
from gare.data.store.frame_reader import FrameReader, GreyPictures
from gare.report.pictures import Candidate, Example
from gare.retrieval.ranking.ranks import Ranking

#: Candidates shown for a query.
TOP = 5


def choose_examples(
    ranking: Ranking,
    video_of_text: Tensor,
    texts: Sequence[str],
    rows: Sequence[ManifestRow],
    reader: FrameReader | GreyPictures,
    count: int,
    order: Literal["spread", "best and worst"] = "spread",
) -> list[Example]:
    """Chooses queries spread evenly over the texts, in order, so that neither hits nor misses are favoured.

    Args:
        ranking: of the texts.
        video_of_text: (N,) owner of each text.
        texts: the N captions.
        rows: the M videos.
        reader: for thumbnails.
        count: queries to show.
        order: ``best and worst`` takes, in place of such a sample, one half from the texts ranked best and
            one from those ranked worst, of different videos if there are enough.
    """
    chosen = np.unique(np.linspace(0, len(texts) - 1, min(count, len(texts))).astype(int))
    if order == "best and worst":
        chosen = _best_and_worst(ranking.rank.numpy(), video_of_text.numpy(), len(chosen))
    examples = []
    for text in chosen:
        right = int(video_of_text[text])
        best = [video for video in ranking.candidates[text, :TOP].tolist() if video >= 0]
        scores = dict(zip(best, ranking.scores[text].tolist(), strict=False))
        scores.setdefault(right, float(ranking.own_score[text]))
        shown = list(scores)
        frames, mask = reader.read([rows[video].video_id for video in shown])
        middle = mask.sum(axis=1) // 2
        candidates = [
            Candidate(rows[video].video_id, frames[place, middle[place]], scores[video], video == right)
            for place, video in enumerate(shown)
        ]
        rank = int(torch.ceil(ranking.rank[text]))
        examples.append(Example(texts[text], candidates, rank))
    return examples


def _best_and_worst(rank: NDArray[np.float64], video: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Returns texts, best first; one per video if there are enough, since its captions are ranked alike."""
    by_rank = np.argsort(rank, kind="stable")
    tail = count // 2
    best = _of_different_videos(by_rank, video)[: count - tail]
    worst = [text for text in _of_different_videos(by_rank[::-1], video) if text not in set(best)][:tail]
    return np.array([*best, *worst[::-1]])


def _of_different_videos(texts: NDArray[np.int64], video: NDArray[np.int64]) -> list[int]:
    """Orders texts so that each video's first one comes before all repeats."""
    seen: set[int] = set()
    first: list[int] = []
    later: list[int] = []
    for text in texts.tolist():
        (later if int(video[text]) in seen else first).append(text)
        seen.add(int(video[text]))
    return first + later
