"""The order of text-video pairs in training, and seeds of random draws: pure functions."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence

import numpy as np

from gare.errors import DataError


def epoch_batches(
    num_captions: Sequence[int],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    captions_per_video: int = 0,
    unique_videos: bool = False,
) -> np.ndarray:
    """Draws the global batches of one epoch.

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

    Returns:
        (steps, batch_size, 2) int64: video and caption of each pair.

    Raises:
        DataError: if the pairs do not fill one batch.
    """
    rng = np.random.default_rng([seed, epoch])
    pairs = []
    for video, count in enumerate(num_captions):
        chosen = np.arange(count)
        if 0 < captions_per_video < count:
            chosen = rng.choice(count, captions_per_video, replace=False)
        pairs += [(video, caption) for caption in chosen]
    num_steps = len(pairs) // batch_size
    if unique_videos and batch_size > len(num_captions):
        raise DataError(
            f"{len(num_captions)} videos do not fill a batch of {batch_size} without repeating one",
            where="train split",
            accepted=f"train.batch_size of at most {len(num_captions)}, or train.unique_videos=false",
        )
    if num_steps == 0:
        raise DataError(
            f"{len(pairs)} text-video pairs do not fill a batch of {batch_size}",
            where="train split",
            accepted=f"train.batch_size of at most {len(pairs)}, or more videos",
        )
    shuffled = np.array(pairs, dtype=np.int64)[rng.permutation(len(pairs))]
    if unique_videos:
        return _without_repeats(shuffled, batch_size)
    return shuffled[: num_steps * batch_size].reshape(num_steps, batch_size, 2)


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


def _without_repeats(pairs: np.ndarray, batch_size: int) -> np.ndarray:
    """Fills batches in the order of the pairs; a pair whose video is in the batch already waits for the next.

    A last batch that cannot be filled is left out.
    """
    batches: list[list[np.ndarray]] = []
    waiting: deque[np.ndarray] = deque()
    coming = iter(pairs)
    while True:
        batch: list[np.ndarray] = []
        seen: set[int] = set()
        again: deque[np.ndarray] = deque()
        while len(batch) < batch_size:
            pair = waiting.popleft() if waiting else next(coming, None)
            if pair is None:
                return np.array(batches, dtype=np.int64).reshape(-1, batch_size, 2)
            if int(pair[0]) in seen:
                again.append(pair)
            else:
                seen.add(int(pair[0]))
                batch.append(pair)
        batches.append(batch)
        waiting = again + waiting
