"""CLIP's tokens of a split's captions, computed once per run and then looked up.

N captions over all M videos, m videos of a batch, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: Captions that are tokenised at once: each takes W 64-bit numbers meanwhile.
_AT_ONCE = 4096


@dataclass(frozen=True)
class CaptionTokens:
    """Tokens of every caption, 2 bytes each, since CLIP's vocabulary has 49,408.

    Attributes:
        ids: (N, W) uint16, zero after a caption's end.
        lengths: (N,) uint16, tokens of each caption.
        first: (M + 1,) int64, position of each video's first caption.
    """

    ids: npt.NDArray[np.uint16]
    lengths: npt.NDArray[np.uint16]
    first: npt.NDArray[np.int64]

    @classmethod
    def of(cls, captions: Sequence[Sequence[str]], max_words: int) -> CaptionTokens:
        """Tokenises the captions of each video.

        Args:
            captions: of each of M videos.
            max_words: W.

        Raises:
            DataError: for a caption that is not a string.
        """
        from gare.model.encoders.tokenizer import tokenize  # here: loaders need no torch, which takes memory

        texts = [text for group in captions for text in group]
        ids = np.zeros((len(texts), max_words), np.uint16)
        lengths = np.zeros(len(texts), np.uint16)
        for start in range(0, len(texts), _AT_ONCE):
            rows = slice(start, start + _AT_ONCE)
            token_ids, mask = tokenize(texts[rows], max_words)
            ids[rows], lengths[rows] = token_ids.numpy(), mask.sum(dim=1).numpy()
        counts = [len(group) for group in captions]
        return cls(ids, lengths, np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]))

    def of_pairs(
        self, videos: npt.NDArray[np.int64], captions: npt.NDArray[np.int64]
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Looks up one caption of each video.

        Returns:
            ``token_ids`` (m, W) int32 and ``token_mask`` (m, W) bool.
        """
        return self._rows(self.first[videos] + captions)

    def of_videos(self, videos: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.generic]]:
        """Looks up all captions of videos, one after another.

        Returns:
            ``token_ids`` and ``token_mask`` of the captions, and ``caption_counts`` (m,) int64.
        """
        counts = self.first[videos + 1] - self.first[videos]
        rows = [np.arange(self.first[video], self.first[video + 1]) for video in videos]
        return self._rows(np.concatenate([np.empty(0, np.int64), *rows])) | {"caption_counts": counts}

    def _rows(self, rows: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.generic]]:
        mask = np.arange(self.ids.shape[1]) < self.lengths[rows][:, None]
        return {"token_ids": self.ids[rows].astype(np.int32), "token_mask": mask}
