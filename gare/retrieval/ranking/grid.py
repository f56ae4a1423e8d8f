"""Division of a split's pairs into blocks, and of blocks into shares of work.

N texts, M videos.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from gare.errors import DataError, GareError

#: Texts and videos of a block unless its source sets other sizes.
TEXTS, VIDEOS = 1024, 128


class HasShare(Protocol):
    """A result of one share of work."""

    @property
    def share(self) -> int:
        """Number of the share."""
        ...


Part = TypeVar("Part", bound=HasShare)


@dataclass(frozen=True)
class Grid:
    """A partition of N × M pairs into blocks.

    Texts are sorted by their videos and a block holds whole caption sets, so that the best caption of a set
    is known within one block. The grid depends on the split alone, never on the number of workers.

    Attributes:
        order: (N,) int64, the text at each place.
        owner: (N,) int64, the video of the text at each place.
        num_videos: M.
        rows: places of the texts of each strip of blocks.
        columns: videos of each column of blocks.
        by_rows: whether a share of work is a strip of blocks; otherwise it is a column.
    """

    order: Tensor
    owner: Tensor
    num_videos: int
    rows: tuple[slice, ...]
    columns: tuple[slice, ...]
    by_rows: bool

    @classmethod
    def of(
        cls,
        video_of_text: Tensor,
        num_videos: int,
        *,
        texts: int = TEXTS,
        videos: int = VIDEOS,
        by_rows: bool = False,
    ) -> Grid:
        """Divides the pairs into blocks.

        Args:
            video_of_text: (N,) int64, the video that each text describes.
            num_videos: M.
            texts: of a block at most, except for a single caption set that is larger.
            videos: of a block at most.
            by_rows: whether a share is a strip.

        Raises:
            DataError: for owners that are not int64 numbers from 0 to M − 1, or if there is no text.
        """
        check_owners(video_of_text, num_videos)
        order = torch.argsort(video_of_text, stable=True)
        owner = video_of_text[order]
        rows = tuple(_strips(owner.numpy(), texts))
        columns = tuple(slice(at, min(at + videos, num_videos)) for at in range(0, num_videos, videos))
        return cls(order, owner, num_videos, rows, columns, by_rows)

    @property
    def num_shares(self) -> int:
        """Number of shares of work; each is done as a whole."""
        return len(self.rows if self.by_rows else self.columns)

    def extent(self, share: int) -> tuple[slice, slice]:
        """Returns the places of the texts, and the videos, that make up a share."""
        every_row, every_column = slice(0, len(self.order)), slice(0, self.num_videos)
        return (self.rows[share], every_column) if self.by_rows else (every_row, self.columns[share])

    def cells(self, share: int) -> Iterator[tuple[slice, slice]]:
        """Yields the blocks of a share."""
        if self.by_rows:
            return ((self.rows[share], columns) for columns in self.columns)
        return ((rows, self.columns[share]) for rows in self.rows)

    def own_pairs(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Finds where in a block the texts meet their own videos: row and column of each such pair."""
        owner = self.owner[rows]
        at = ((owner >= columns.start) & (owner < columns.stop)).nonzero().squeeze(1)
        return at, owner[at] - columns.start


def check_owners(video_of_text: Tensor, num_videos: int) -> None:
    """Refuses an invalid text → video map.

    Raises:
        DataError: for another dtype or shape, no text, or an owner out of range.
    """
    if not isinstance(video_of_text, Tensor) or video_of_text.dtype != torch.int64:
        raise DataError("video_of_text is no int64 tensor", where="retrieval metrics")
    if video_of_text.ndim != 1 or not len(video_of_text):
        raise DataError(
            f"video_of_text has shape {tuple(video_of_text.shape)}",
            where="retrieval metrics",
            accepted="(N,), one owner for each of at least one text",
        )
    low, high = int(video_of_text.min()), int(video_of_text.max())
    if low < 0 or high >= num_videos:
        raise DataError(
            f"owners run from {low} to {high}", where="retrieval metrics", accepted=f"0 to {num_videos - 1}"
        )


def each_share_once(parts: Iterable[Part], num_shares: int) -> Iterator[Part]:
    """Yields every share once, as it arrives, however often its work was repeated.

    Args:
        parts: results of shares, in any order; repeated results of a share are identical.
        num_shares: number of shares expected.

    Raises:
        GareError: at the end, naming shares that are missing or unknown, so that no pair is left out.
    """
    found: set[int] = set()
    for part in parts:
        if part.share not in found:
            found.add(part.share)
            yield part
    missing, unknown = sorted(set(range(num_shares)) - found), sorted(found - set(range(num_shares)))
    if missing or unknown:
        faults = {"missing": missing, "unknown": unknown}
        said = "; ".join(f"{what}: {', '.join(map(str, which))}" for what, which in faults.items() if which)
        raise GareError(f"of {num_shares} shares of the evaluation some are {said}", where="evaluation")


def _strips(owner: np.ndarray, texts: int) -> Iterator[slice]:
    """Yields consecutive places of at most ``texts`` texts, cut between caption sets."""
    ends = np.append(np.flatnonzero(np.diff(owner)) + 1, len(owner))
    start = 0
    while start < len(owner):
        # The last end that fits, or else the end of a set that is too large.
        fitting = np.searchsorted(ends, start + max(texts, 1), side="right") - 1
        stop = int(ends[fitting])
        if fitting < 0 or stop <= start:
            stop = int(ends[np.searchsorted(ends, start, side="right")])
        yield slice(start, stop)
        start = stop
