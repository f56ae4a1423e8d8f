"""Scores of whole splits, block by block.

N texts, M videos.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from gare.model.budget import MEGABYTE, Budget
from gare.model.factorized.prepared import PreparedVideo
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.model.streaming import owners_at_once, stream_scores
from gare.retrieval.ranking.grid import TEXTS, VIDEOS, Grid

#: Blocks are padded to multiples of this. Matrix products of whole tiles treat all positions alike, so that
#: equal captions or equal clips get equal scores, bit for bit, wherever in the split they are.
TILE = 64
#: Videos of a block if texts own the basis, which is then computed anew for every block of videos.
VIDEOS_OF_WORDS = 4096
#: Bytes of blocks that are kept because they will be requested again.
KEPT_BYTES = 64 * MEGABYTE


class Blocks(Protocol):
    """A source of scores."""

    def block(self, texts: Tensor, columns: slice, *, again: bool = False) -> Tensor:
        """Returns scores (texts, videos), the same bits for each request of the same block; read-only.

        Args:
            texts: (T,) int64, indices of the texts.
            columns: range of the videos.
            again: whether the same block will be requested once more.
        """
        ...


class MatrixBlocks:
    """Blocks of a score matrix that exists already.

    Args:
        scores: (N, M).
    """

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def block(self, texts: Tensor, columns: slice, *, again: bool = False) -> Tensor:
        """Copies a part of the matrix."""
        return self.scores[texts, columns]


class ModelBlocks:
    """Blocks of a model's scores from encoded captions and clips.

    The prepared videos of the previous block are kept, so blocks of the same videos should follow each other.

    Args:
        model: the trained model.
        text: N encoded captions.
        video: M encoded clips.
        device: where to compute; features are moved there block by block.
    """

    def __init__(
        self, model: GARE, text: TextFeatures, video: VideoFeatures, device: str | torch.device = "cpu"
    ) -> None:
        self.scorer = model.to(device).eval().scorer
        self.text, self.video, self.device = text, video, device
        self._columns: slice | None = None
        self._prepared: VideoFeatures | PreparedVideo | None = None
        self._kept: dict[tuple[bytes, int, int], Tensor] = {}
        self._kept_bytes = 0

    def grid(self, video_of_text: Tensor) -> Grid:
        """Builds the grid of blocks for which this source is efficient."""
        by_rows = self.scorer.context_of == "text"
        videos = VIDEOS_OF_WORDS
        if not by_rows:
            frames, words = self.video.mask.shape[1], self.text.mask.shape[1]
            # The CPU's budget, wherever scores are computed: all workers must have the same grid, since its
            # shares are dealt out to them.
            budget = Budget.of(self.scorer.config.memory_mb, torch.device("cpu"))
            owners = owners_at_once(self.scorer, frames, words, 4, budget.total)
            # Preparing them may take half of the budget.
            videos = max(min(2 * owners, 2 * VIDEOS) // TILE * TILE, TILE)
        return Grid.of(video_of_text, len(self.video), texts=TEXTS, videos=videos, by_rows=by_rows)

    @torch.inference_mode()
    def block(self, texts: Tensor, columns: slice, *, again: bool = False) -> Tensor:
        """Computes scores (texts, videos) float32 on the device; keeps some that will be requested again."""
        key = (texts.numpy().tobytes(), columns.start, columns.stop)
        if (kept := self._kept.pop(key, None)) is not None:
            self._kept_bytes -= kept.nbytes
            return kept
        scores = self._score(texts, columns)
        if again and self._kept_bytes + scores.nbytes <= KEPT_BYTES:
            self._kept[key] = scores
            self._kept_bytes += scores.nbytes
        return scores

    def _score(self, texts: Tensor, columns: slice) -> Tensor:
        if columns != self._columns or self._prepared is None:
            self._prepared = self._prepare(columns)
            self._columns = columns
        text = self.text if self.scorer.needs_words else replace(self.text, words=None)
        some = text[_filled(texts)].to(self.device)
        scores = stream_scores(self.scorer, some, self._prepared).float()
        return scores[: len(texts), : columns.stop - columns.start].contiguous()

    def _prepare(self, columns: slice) -> VideoFeatures | PreparedVideo:
        # Freed before the next one is made.
        self._prepared = None
        video = self.video[_filled(torch.arange(columns.start, columns.stop))].to(self.device)
        if self.scorer.path() == "direct" or self.scorer.context_of == "text":
            return video
        return self.scorer.prepare_video(video)


def _filled(positions: Tensor) -> Tensor:
    """Pads positions to a whole number of tiles by repeating the last one."""
    rest = -len(positions) % TILE
    return torch.cat([positions, positions[-1:].expand(rest)])


@torch.inference_mode()
def score_split(model: GARE, text: TextFeatures, video: VideoFeatures) -> Tensor:
    """Computes all scores at once, (N, M) float32 on the CPU, for callers that need the whole matrix."""
    return model.score(text, video).float().cpu()
