"""One worker's part in the evaluation of a split: its shares of work, from features that all workers hold.

N texts, M videos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gare.model.gare import GARE
from gare.retrieval.ranking.encode import text_of, video_of
from gare.retrieval.ranking.grid import Grid
from gare.retrieval.ranking.postprocess import PostProcessing, Variant
from gare.retrieval.ranking.ranks import Counts, Ranks, count, join_counts
from gare.retrieval.ranking.scoring import ModelBlocks
from gare.retrieval.ranking.survey import Survey, join_surveys, survey

#: Arrays by name: video/frames, video/mask, text/embedding, text/mask and, if scores need them, text/words;
#: bank/…, like text/…, for the captions of a query bank.
Features = Mapping[str, np.ndarray]


class RankWorker:
    """Worker that surveys and counts shares of a split.

    Args:
        model: the trained model.
        features: of the split, and of a query bank if there is one.
        video_of_text: (N,) int64, the video that each text describes.
        processing: post-processed metrics beside the plain ones.
        device: where to compute.
    """

    def __init__(
        self,
        model: GARE,
        features: Features,
        video_of_text: Tensor,
        processing: PostProcessing,
        device: str = "cpu",
    ) -> None:
        video = video_of(features)
        self.blocks = ModelBlocks(model, text_of(features), video, device)
        self.grid = self.blocks.grid(video_of_text)
        self.processing = processing
        self.bank: tuple[ModelBlocks, Grid] | None = None
        if processing.bank_survey_request is not None:
            bank = text_of(features, "bank")
            # Captions of a bank have no video in the gallery; the map only has to be valid.
            nobody = torch.arange(len(bank.embedding)) % len(video)
            blocks = ModelBlocks(model, bank, video, device)
            self.bank = blocks, blocks.grid(nobody)

    def survey(self, share: int) -> Survey:
        """Surveys a share of the split."""
        return survey(self.blocks, self.grid, share, self.processing.survey_request)

    def bank_survey(self, share: int) -> Survey:
        """Surveys a share of the bank's scores."""
        assert self.bank is not None
        assert self.processing.bank_survey_request is not None
        return survey(*self.bank, share, self.processing.bank_survey_request)

    def count(self, share: int, seen: Survey, variants: Sequence[Variant]) -> Counts:
        """Counts a share."""
        return count(self.blocks, self.grid, share, seen, variants)


def rank_by_workers(
    planner: RankWorker,
    call: Callable[[Iterable[tuple[Any, ...]]], Iterable[Any]],
    share_once: Callable[[Any], Any] = lambda value: value,
) -> dict[str, Ranks]:
    """Computes ranks of all queries, by variant, from workers' shares.

    Args:
        planner: a worker of the same split, used only for planning.
        call: runs tasks, (method of ``RankWorker``, arguments), on workers, and returns their results.
        share_once: turns an argument of many tasks into a handle that is sent instead.

    Raises:
        DataError: for a score that is not finite.
        GareError: for a share without a result.
    """
    grid, processing = planner.grid, planner.processing
    shares = range(grid.num_shares)
    seen = join_surveys(call([("survey", share) for share in shares]), grid)
    bank = None
    if planner.bank is not None:
        bank_grid = planner.bank[1]
        tasks = [("bank_survey", share) for share in range(bank_grid.num_shares)]
        bank = join_surveys(call(tasks), bank_grid)
    variants = processing.variants(seen, bank)
    held = share_once(seen), share_once(variants)
    return join_counts(call([("count", share, *held) for share in shares]), grid, seen, variants)
