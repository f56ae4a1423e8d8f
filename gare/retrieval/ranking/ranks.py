"""Ranks of all queries of a split, block by block: no matrix of all scores is ever held.

Two passes over the grid's blocks. The survey finds each text's score with its own video, for which it only
needs the blocks with such pairs; the count then compares every pair with it, once. Counts are integers, so
the ranks are the same for any division into blocks, shares and workers, and in any order. Tied candidates get
their mean rank, as in ``metrics``. N texts, M videos, Q queries, K best candidates kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.retrieval.ranking import top
from gare.retrieval.ranking.grid import Grid, each_share_once
from gare.retrieval.ranking.metrics import rank_summary
from gare.retrieval.ranking.postprocess import PostProcessing, Variant
from gare.retrieval.ranking.scoring import Blocks, ModelBlocks
from gare.retrieval.ranking.survey import Survey, checked_block, join_surveys, survey


@dataclass(frozen=True)
class Ranking:
    """The queries of one direction.

    Attributes:
        query: (Q,) int64, the texts, in order; or the videos that have captions, in order.
        rank: (Q,) float64, from 1.
        own_score: (Q,) the right candidate's score: of the own video, or of the best own caption.
        candidates: (Q, K) int64, the best videos, best first, ties by number; for video queries, the videos
            with the best captions. −1 if there are fewer than K.
        scores: (Q, K) float32, scores of the candidates.
    """

    query: Tensor
    rank: Tensor
    own_score: Tensor
    candidates: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Ranks:
    """Rankings of both directions; video → text is None if a variant has none."""

    t2v: Ranking
    v2t: Ranking | None

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Returns metrics, named as in ``retrieval_metrics``, after the prefix and a slash if it is set."""
        found = rank_summary(self.t2v.rank, "t2v")
        if self.v2t is not None:
            found |= rank_summary(self.v2t.rank, "v2t")
        return {f"{prefix}/{name}" if prefix else name: value for name, value in found.items()}


@dataclass(frozen=True)
class RankThresholds:
    """Scores that candidates are compared with.

    Attributes:
        text: (N,) each text's score with its own video.
        video: (M,) the best score of each video with its own captions; +inf for videos without; or None.
    """

    text: Tensor
    video: Tensor | None

    def to(self, device: torch.device) -> RankThresholds:
        """Copies it to a device."""
        return RankThresholds(self.text.to(device), None if self.video is None else self.video.to(device))

    @classmethod
    def of(cls, grid: Grid, seen: Survey, variant: Variant) -> RankThresholds:
        """Builds the thresholds from the survey."""
        places = torch.arange(len(grid.order))
        text = variant.by_text(seen.own, places, grid.owner)
        scores = variant.by_video(seen.own, places, grid.owner)
        if scores is None:
            return cls(text, None)
        best = scores.new_full((grid.num_videos,), -torch.inf)
        best = best.scatter_reduce(0, grid.owner, scores, reduce="amax")
        return cls(text, best.masked_fill(best.isneginf(), torch.inf))


class RankCounts:
    """Counts of Q queries, on the scores' device: fetching them for every block would wait for it.

    Attributes:
        better: (Q,) int64, candidates with a greater score than the right one.
        tied: (Q,) int64, other candidates with the same score.
        best: (Q, K) keys of the best candidates.
    """

    def __init__(self, num_queries: int, device: torch.device | str = "cpu") -> None:
        self.better = torch.zeros(num_queries, dtype=torch.int64, device=device)
        self.tied = torch.zeros(num_queries, dtype=torch.int64, device=device)
        self.best = top.no_candidates(num_queries, device)

    def cpu(self) -> RankCounts:
        """Copies it to the CPU."""
        self.better, self.tied, self.best = self.better.cpu(), self.tied.cpu(), self.best.cpu()
        return self

    def add(self, queries: slice, scores: Tensor, candidates: Tensor, marks: Tensor, own: Tensor) -> None:
        """Counts a block.

        Args:
            queries: positions in these counts.
            scores: (queries, candidates); scores of right candidates are overwritten.
            candidates: (C,) their numbers.
            marks: (queries,) thresholds.
            own: (2, P) positions in the block of the right pairs, which do not compete.
        """
        keys = top.pack_keys(scores, candidates)
        self.best[queries] = top.merge(self.best[queries], keys)
        marks = marks.unsqueeze(1)
        # Right pairs are found by position, not by score.
        scores[own[0], own[1]] = -torch.inf
        self.better[queries] += (scores > marks).sum(dim=1)
        self.tied[queries] += (scores == marks).sum(dim=1)

    def join(self, queries: slice, other: RankCounts) -> None:
        """Adds the counts of the same queries over other candidates."""
        self.better[queries] += other.better
        self.tied[queries] += other.tied
        self.best[queries] = top.merge(self.best[queries], other.best)


@dataclass(frozen=True)
class Counts:
    """Counts of one share: of the texts and of the videos, by variant."""

    share: int
    texts: dict[str, RankCounts]
    videos: dict[str, RankCounts]


@torch.inference_mode()
def count(blocks: Blocks, grid: Grid, share: int, seen: Survey, variants: Sequence[Variant]) -> Counts:
    """Counts a share's pairs, each once.

    Args:
        blocks: the scores.
        grid: of the split.
        share: which.
        seen: the joined survey.
        variants: rules to rank by.

    Raises:
        DataError: for a score that is not finite.
    """
    rows, columns = grid.extent(share)
    marks = {variant.name: RankThresholds.of(grid, seen, variant) for variant in variants}
    texts: dict[str, RankCounts] = {}
    videos: dict[str, RankCounts] = {}
    for row, column in grid.cells(share):
        scores = checked_block(blocks, grid, row, column)
        if not texts:
            marks = {name: mark.to(scores.device) for name, mark in marks.items()}
            texts = {name: RankCounts(rows.stop - rows.start, scores.device) for name in marks}
            by_video = [name for name, mark in marks.items() if mark.video is not None]
            videos = {name: RankCounts(columns.stop - columns.start, scores.device) for name in by_video}
        places = torch.arange(row.start, row.stop, device=scores.device)
        numbers = torch.arange(column.start, column.stop, device=scores.device)
        own = torch.stack(grid.own_pairs(row, column)).to(scores.device)
        owners = torch.unique_consecutive(grid.owner[row], return_inverse=True)
        owner, owner_of_row = (one.to(scores.device) for one in owners)
        for variant in variants:
            mark = marks[variant.name]
            for_videos = variant.by_video(scores, places.unsqueeze(1), numbers)
            if mark.video is not None and for_videos is not None:
                best = for_videos.new_full((len(owner), len(numbers)), -torch.inf)
                index = owner_of_row.unsqueeze(1).expand(-1, len(numbers))
                best = best.scatter_reduce(0, index, for_videos, reduce="amax")
                right = torch.stack([own[1], owner_of_row[own[0]]])
                queries = _within(column, columns)
                videos[variant.name].add(queries, best.T.contiguous(), owner, mark.video[column], right)
            by_text = variant.by_text(scores, places.unsqueeze(1), numbers).clone()
            texts[variant.name].add(_within(row, rows), by_text, numbers, mark.text[row], own)
    return Counts(
        share,
        {name: tally.cpu() for name, tally in texts.items()},
        {name: tally.cpu() for name, tally in videos.items()},
    )


def _within(part: slice, whole: slice) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)


def join_counts(
    parts: Iterable[Counts], grid: Grid, seen: Survey, variants: Sequence[Variant]
) -> dict[str, Ranks]:
    """Turns all shares' counts into ranks, by variant; order of arrival and repeats make no difference.

    Raises:
        GareError: for a share that is missing.
    """
    texts = {variant.name: RankCounts(len(grid.order)) for variant in variants}
    videos = {variant.name: RankCounts(grid.num_videos) for variant in variants}
    for part in each_share_once(parts, grid.num_shares):
        rows, columns = grid.extent(part.share)
        for name, tally in part.texts.items():
            texts[name].join(rows, tally)
        for name, tally in part.videos.items():
            videos[name].join(columns, tally)
    # From places back to texts.
    back, captioned = torch.argsort(grid.order), torch.unique(grid.owner)
    found = {}
    for variant in variants:
        marks = RankThresholds.of(grid, seen, variant)
        t2v = _ranking(texts[variant.name], marks.text, torch.arange(len(back)), back)
        v2t = None
        if marks.video is not None:
            v2t = _ranking(videos[variant.name], marks.video, captioned, captioned)
        found[variant.name] = Ranks(t2v, v2t)
    return found


def _ranking(tally: RankCounts, marks: Tensor, query: Tensor, chosen: Tensor) -> Ranking:
    rank = 1 + tally.better[chosen].double() + tally.tied[chosen].double() / 2
    candidates, scores = top.unpack_keys(tally.best[chosen])
    return Ranking(query, rank, marks[chosen], candidates, scores)


def rank_blocks(
    blocks: Blocks,
    grid: Grid,
    processing: PostProcessing | None = None,
    bank: tuple[Blocks, Grid] | None = None,
) -> dict[str, Ranks]:
    """Computes ranks of all queries in this process, by variant; the plain ones under the empty name.

    Args:
        blocks: scores of the split's texts with its videos.
        grid: of the split.
        processing: post-processed metrics to compute besides the plain ones.
        bank: scores of the bank's captions with the same videos, if query-bank normalisation is on.

    Raises:
        DataError: for a score that is not finite.
    """
    processing = processing or PostProcessing()
    shares = range(grid.num_shares)
    seen = join_surveys((survey(blocks, grid, share, processing.survey_request) for share in shares), grid)
    bank_seen = None
    if bank is not None and processing.bank_survey_request is not None:
        queries, their_grid = bank
        request = processing.bank_survey_request
        parts = (survey(queries, their_grid, share, request) for share in range(their_grid.num_shares))
        bank_seen = join_surveys(parts, their_grid)
    variants = processing.variants(seen, bank_seen)
    counts = (count(blocks, grid, share, seen, variants) for share in shares)
    return join_counts(counts, grid, seen, variants)


def rank_split(model: GARE, text: TextFeatures, video: VideoFeatures, video_of_text: Tensor) -> Ranks:
    """Computes ranks of a split by a model's scores, in this process.

    Args:
        model: on the device where to compute.
        text: N encoded captions.
        video: M encoded clips.
        video_of_text: (N,) int64, the video that each text describes.

    Raises:
        DataError: for invalid owners, or a score that is not finite.
    """
    blocks = ModelBlocks(model, text, video, model.logit_scale.device)
    return rank_blocks(blocks, blocks.grid(video_of_text.cpu()))[""]
