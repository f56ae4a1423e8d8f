"""Choosing queries for the retrieval picture, and their rankings.

N texts, M videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gare.data.frames import FrameReader, NoPictures
from gare.data.manifest import ManifestRow
from gare.retrieval.pictures import Candidate, Example
from gare.retrieval.ranks import Ranking

#: Candidates shown for a query.
TOP = 5


def choose_examples(
    ranking: Ranking,
    video_of_text: Tensor,
    texts: Sequence[str],
    rows: Sequence[ManifestRow],
    reader: FrameReader | NoPictures,
    count: int,
    order: Literal["spread", "best and worst"] = "spread",
) -> list[Example]:
    """Queries spread evenly over the texts, in order, so that neither hits nor misses are picked out.

    Args:
        ranking: of the texts.
        video_of_text: (N,) owner of each text.
        texts: the N captions.
        rows: the M videos.
        reader: for thumbnails.
        count: queries to show.
        order: the half that is ranked best and the half that is ranked worst, in place of such a sample.
    """
    chosen = np.unique(np.linspace(0, len(texts) - 1, min(count, len(texts))).astype(int))
    if order == "best and worst":
        by_rank = np.argsort(ranking.rank.numpy(), kind="stable")
        head = (len(chosen) + 1) // 2
        chosen = np.concatenate([by_rank[:head], by_rank[len(by_rank) - (len(chosen) - head) :]])
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
