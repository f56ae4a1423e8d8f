"""Survey of a split's blocks: the first pass, whose findings are needed before pairs can be counted.

N texts, M videos. Rows of tensors are places of the grid, not texts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gare.errors import DataError
from gare.retrieval.ranking import top
from gare.retrieval.ranking.grid import Grid, each_share_once
from gare.retrieval.ranking.scoring import Blocks


@dataclass(frozen=True)
class SurveyRequest:
    """Request of a survey, besides texts' scores with their own videos, which need only a few blocks.

    Attributes:
        text_scales: scales κ for which to sum exp(κ s_ij) over the videos of each text.
        video_scales: scales for which to sum over the texts of each video.
        best: whether to find the best video of each text.
    """

    text_scales: tuple[float, ...] = ()
    video_scales: tuple[float, ...] = ()
    best: bool = False

    @property
    def everywhere(self) -> bool:
        """True if all blocks are needed."""
        return bool(self.text_scales or self.video_scales or self.best)


@dataclass(frozen=True)
class Survey:
    """Findings of one share, or of all shares joined.

    Attributes:
        share: number of the share; −1 for all.
        own: (N,) scores of the texts with their own videos; nan for pairs outside the share.
        text_sums: by scale κ, (N,) float64 log Σ_j exp(κ s_ij).
        video_sums: by scale κ, (M,) float64 log Σ_i exp(κ s_ij).
        best: (N, 1) the key of each text's best video, see ``top``; None if not requested.
    """

    share: int
    own: Tensor
    text_sums: dict[float, Tensor] = field(default_factory=dict)
    video_sums: dict[float, Tensor] = field(default_factory=dict)
    best: Tensor | None = None


@torch.inference_mode()
def survey(blocks: Blocks, grid: Grid, share: int, request: SurveyRequest) -> Survey:
    """Surveys a share.

    The score of a text with its own video is taken from the same block in which the pair's competitors are
    counted later, so that equal scores stay equal: a pair computed in a block of another shape may differ in
    its last bit.

    Raises:
        DataError: for a score that is not finite.
    """
    num_texts = len(grid.order)
    own: Tensor | None = None
    nothing = torch.full((num_texts,), -torch.inf, dtype=torch.float64)
    text_sums = {scale: nothing.clone() for scale in request.text_scales}
    video_sums = {scale: nothing.new_full((grid.num_videos,), -torch.inf) for scale in request.video_scales}
    best = torch.full((num_texts, 1), top.NONE) if request.best else None
    for rows, columns in grid.cells(share):
        at, column = grid.own_pairs(rows, columns)
        if not (len(at) or request.everywhere):
            continue
        scores = checked_block(blocks, grid, rows, columns, again=True)
        if own is None:
            own = torch.full((num_texts,), torch.nan, dtype=scores.dtype)
        own[rows.start + at] = scores[at.to(scores.device), column.to(scores.device)].cpu()
        for scale, sums in text_sums.items():
            found = (scale * scores.double()).logsumexp(dim=1).cpu()
            sums[rows] = torch.logaddexp(sums[rows], found)
        for scale, sums in video_sums.items():
            found = (scale * scores.double()).logsumexp(dim=0).cpu()
            sums[columns] = torch.logaddexp(sums[columns], found)
        if best is not None:
            numbers = torch.arange(columns.start, columns.stop, device=scores.device)
            found = top.pack_keys(scores, numbers).amax(dim=1, keepdim=True).cpu()
            best[rows] = torch.maximum(best[rows], found)
    own = torch.full((num_texts,), torch.nan) if own is None else own
    return Survey(share, own, text_sums, video_sums, best)


def join_surveys(parts: Iterable[Survey], grid: Grid) -> Survey:
    """Joins all shares' surveys; order of arrival and repeated shares make no difference.

    Raises:
        GareError: for a share that is missing.
    """
    # Sums are always joined in the same order; nothing else depends on it.
    ordered = sorted(each_share_once(parts, grid.num_shares), key=lambda part: part.share)
    own = ordered[0].own
    for part in ordered:
        if not part.own.isnan().all():
            own = torch.where(part.own.isnan(), own.to(part.own.dtype), part.own)

    def summed(sums: list[dict[float, Tensor]]) -> dict[float, Tensor]:
        return {scale: torch.stack([one[scale] for one in sums]).logsumexp(dim=0) for scale in sums[0]}

    bests = [part.best for part in ordered if part.best is not None]
    return Survey(
        -1,
        own,
        summed([part.text_sums for part in ordered]),
        summed([part.video_sums for part in ordered]),
        torch.stack(bests).amax(dim=0) if bests else None,
    )


def checked_block(blocks: Blocks, grid: Grid, rows: slice, columns: slice, *, again: bool = False) -> Tensor:
    """Computes a block's scores and checks that they are finite.

    Args:
        blocks: the scores.
        grid: of the split.
        rows: places of the texts.
        columns: the videos.
        again: whether the block will be requested once more.

    Raises:
        DataError: for a score that is not finite, naming text and video.
    """
    scores = blocks.block(grid.order[rows], columns, again=again)
    if not scores.isfinite().all():
        row, column = (~scores.isfinite()).nonzero()[0].tolist()
        text, video = int(grid.order[rows.start + row]), columns.start + column
        raise DataError(f"the score of text {text} with video {video} is not finite", where="evaluation")
    return scores
