"""The batches of one worker from first step to last: a pure function of configuration and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gare.config import TrainConfig
from gare.errors import ConfigError
from gare.train.input.sampler import epoch_batches, share_of


@dataclass(frozen=True)
class PlannedBatch:
    """One batch of one worker.

    Attributes:
        kind: train, or val for clips of the validation after the epoch's last step.
        epoch: 0 for the first.
        videos: (b,) positions in the split's rows.
        captions: (b,) caption of each video; empty for val, which uses all captions of a video.
    """

    kind: Literal["train", "val"]
    epoch: int
    videos: np.ndarray
    captions: np.ndarray


@dataclass(frozen=True)
class Plan:
    """All batches of one worker in order, with the starts of the epochs.

    Attributes:
        batches: in the order in which they are consumed.
        epoch_starts: position of each epoch's first batch.
        num_steps: optimiser steps of the whole run.
    """

    batches: tuple[PlannedBatch, ...]
    epoch_starts: tuple[int, ...]
    num_steps: int

    def position(self, epoch: int, step: int) -> int:
        """Returns the position of the batch that follows ``epoch`` epochs and ``step`` steps in all.

        It also holds for a run that continues on another number of workers, with other validation batches.
        """
        if epoch >= len(self.epoch_starts):
            return len(self.batches)
        start = self.epoch_starts[epoch]
        done = sum(batch.kind == "train" for batch in self.batches[:start])
        return start + step - done


def plan_run(
    num_captions: Sequence[int], num_val: int, config: TrainConfig, *, rank: int, world_size: int
) -> Plan:
    """Plans a run for worker ``rank`` of ``world_size``.

    The global batches do not depend on the number of workers. Each worker takes its own pairs of a batch, one
    more or less than others if they cannot be shared equally. Val clips are dealt out one by one, each to
    exactly one worker.

    Args:
        num_captions: captions of each training video.
        num_val: videos to validate on after each epoch.
        config: seed, epochs, batch and the limit of steps.
        rank: of this worker.
        world_size: number of workers.

    Raises:
        ConfigError: for a global batch with fewer pairs than workers.
        DataError: for fewer pairs than one batch.
    """
    if config.batch_size < world_size:
        raise ConfigError(
            f"{config.batch_size} pairs cannot be shared by {world_size} workers",
            where="train.batch_size",
            accepted=f"{world_size} or more, or fewer workers (cluster.train_workers)",
        )
    mine = share_of(config.batch_size, rank, world_size)
    share = mine.stop - mine.start
    val = np.arange(rank, num_val, world_size)
    batches: list[PlannedBatch] = []
    starts: list[int] = []
    steps = 0
    for epoch in range(config.epochs):
        pairs = epoch_batches(
            num_captions,
            batch_size=config.batch_size,
            seed=config.seed,
            epoch=epoch,
            captions_per_video=config.captions_per_video,
            unique_videos=config.unique_videos,
        )
        if config.max_steps:
            pairs = pairs[: config.max_steps - steps]
        if not len(pairs):
            break
        starts.append(len(batches))
        steps += len(pairs)
        batches += [PlannedBatch("train", epoch, batch[mine, 0], batch[mine, 1]) for batch in pairs]
        batches += [
            PlannedBatch("val", epoch, val[first : first + share], np.empty(0, dtype=np.int64))
            for first in range(0, len(val), share)
        ]
    return Plan(tuple(batches), tuple(starts), steps)
