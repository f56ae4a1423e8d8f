"""The order of text-video pairs in training, and seeds of random draws: pure functions."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gare.errors import DataError


@dataclass(frozen=True)
class EpochOrder:
    """The order of the pairs of one epoch, from which each global batch is computed by itself.

    Attributes:
        first: (M + 1,) int64, number of each video's first pair.
        order: numbers of pairs, in the order in which they are trained on.
        batch_size: pairs in a global batch.
    """

    first: npt.NDArray[np.int64]
    order: npt.NDArray[np.integer[Any]]
    batch_size: int

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.order) // self.batch_size

    def batch(self, step: int, rows: slice = slice(None)) -> npt.NDArray[np.int64]:
        """Returns video and caption of some pairs of a batch, (b, 2) int64."""
        start = step * self.batch_size
        return _pairs(self.first, self.order[start : start + self.batch_size][rows])


def epoch_order(
    num_captions: Sequence[int] | npt.NDArray[np.integer[Any]],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    captions_per_video: int = 0,
    unique_videos: bool = False,
) -> EpochOrder:
    """Draws the order of one epoch's pairs.

    Pairs are shuffled over the whole data set; those that do not fill a last batch are left out of this epoch
    (the next epoch has another order and leaves out others). Workers share the pairs of each batch, so the
    batches do not depend on the number of workers.

    Args:
        num_captions: captions of each video, in the order of the manifest.
        batch_size: pairs in a global batch.
        seed: of the run.
        epoch: 0 for the first.
        captions_per_video: number of captions of each video, drawn anew each epoch; 0 for all.
        unique_videos: whether each video is at most once in a batch; repeated ones wait for the next batch.

    Raises:
        DataError: if the pairs do not fill one batch.
    """
    rng = np.random.default_rng([seed, epoch])
    counts = np.asarray(num_captions, np.int64)
    first = np.concatenate([[0], np.cumsum(counts)])
    chosen = None
    if captions_per_video > 0 and (counts > captions_per_video).any():
        chosen = np.concatenate(
            [
                start
                + (
                    rng.choice(count, captions_per_video, replace=False)
                    if count > captions_per_video
                    else np.arange(count)
                )
                for start, count in zip(first.tolist(), counts.tolist(), strict=False)
            ]
        )
    total = int(first[-1]) if chosen is None else len(chosen)
    if unique_videos and batch_size > len(counts):
        raise DataError(
            f"{len(counts)} videos do not fill a batch of {batch_size} without repeating one",
            where="train split",
            accepted=f"train.batch_size of at most {len(counts)}, or train.unique_videos=false",
        )
    if total < batch_size:
        raise DataError(
            f"{total} text-video pairs do not fill a batch of {batch_size}",
            where="train split",
            accepted=f"train.batch_size of at most {total}, or more videos",
        )
    order = rng.permutation(total)
    order = order if chosen is None else chosen[order]
    if unique_videos:
        order = _without_repeats(order, _pairs(first, order)[:, 0], batch_size)
    else:
        order = order[: total // batch_size * batch_size]
    small = first[-1] <= np.iinfo(np.int32).max
    return EpochOrder(first, order.astype(np.int32) if small else order, batch_size)


def epoch_batches(
    num_captions: Sequence[int],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    captions_per_video: int = 0,
    unique_videos: bool = False,
) -> npt.NDArray[np.int64]:
    """Draws the global batches of one epoch, all at once; see ``epoch_order`` for the arguments.

    Returns:
        (steps, batch_size, 2) int64: video and caption of each pair.

    Raises:
        DataError: as ``epoch_order``.
    """
    found = epoch_order(
        num_captions,
        batch_size=batch_size,
        seed=seed,
        epoch=epoch,
        captions_per_video=captions_per_video,
        unique_videos=unique_videos,
    )
    return _pairs(found.first, found.order).reshape(-1, batch_size, 2)


def epoch_steps(num_captions: npt.NDArray[np.integer[Any]], batch_size: int, captions_per_video: int) -> int:
    """Returns the number of batches of each epoch in which videos may repeat; 0 if no batch is filled."""
    most = captions_per_video or np.iinfo(np.int32).max
    return int(np.minimum(num_captions, most).sum()) // batch_size


def _pairs(first: npt.NDArray[np.int64], numbers: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    """Returns video and caption of pairs, given by their numbers, (b, 2)."""
    videos = np.searchsorted(first, numbers, side="right") - 1
    return np.stack([videos, numbers - first[videos]], axis=1).astype(np.int64)


def step_seed(*numbers: int) -> int:
    """Derives a 63-bit seed from numbers such as (seed, step), without the correlations of their sum."""
    digest = hashlib.sha256("/".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def share_of(total: int, rank: int, world_size: int) -> slice:
    """Returns the rows of a batch that a worker takes; workers' shares differ by one row at most.

    Args:
        total: rows of the batch.
        rank: of the worker.
        world_size: number of workers.
    """
    return slice(rank * total // world_size, (rank + 1) * total // world_size)


def _without_repeats(
    order: npt.NDArray[np.int64], videos: npt.NDArray[np.int64], batch_size: int
) -> npt.NDArray[np.int64]:
    """Fills batches in the order of the pairs; a pair whose video is in the batch already waits for the next.

    A last batch that cannot be filled is left out.
    """
    found: list[int] = []
    waiting: deque[tuple[int, int]] = deque()
    coming = zip(order.tolist(), videos.tolist(), strict=True)
    while True:
        batch: list[int] = []
        seen: set[int] = set()
        again: deque[tuple[int, int]] = deque()
        while len(batch) < batch_size:
            pair = waiting.popleft() if waiting else next(coming, None)
            if pair is None:
                return np.array(found, dtype=np.int64)
            if pair[1] in seen:
                again.append(pair)
            else:
                seen.add(pair[1])
                batch.append(pair[0])
        found += batch
        waiting = again + waiting
