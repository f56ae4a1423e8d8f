"""The batches of one worker from first step to last: a pure function of configuration and data."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gare.config import TrainConfig
from gare.errors import ConfigError
from gare.train.input.sampler import EpochOrder, epoch_order, epoch_steps, share_of


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


class DrawnBatches(Sequence[PlannedBatch]):
    """The batches of one worker, drawn epoch by epoch as they are asked for.

    Args:
        num_captions: captions of each training video.
        val: videos that this worker validates.
        config: seed and batch.
        share: the worker's rows of a batch.
        steps: steps of each epoch.
    """

    def __init__(
        self,
        num_captions: npt.NDArray[np.int32],
        val: npt.NDArray[np.int64],
        config: TrainConfig,
        share: slice,
        steps: Sequence[int],
    ) -> None:
        self._num_captions, self._val, self._config = num_captions, val, config
        self._share, self._size = share, int(share.stop) - int(share.start)
        self._steps = tuple(steps)
        self._num_val = -(-len(val) // self._size)
        self._starts = [0, *itertools.accumulate(count + self._num_val for count in steps)]
        self._drawn: tuple[int, EpochOrder] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_drawn": None}  # other processes draw it anew, which is less than to send it

    @property
    def epoch_starts(self) -> tuple[int, ...]:
        """Position of each epoch's first batch."""
        return tuple(self._starts[:-1])

    @property
    def epoch_steps(self) -> tuple[int, ...]:
        """Steps of each epoch."""
        return self._steps

    def __len__(self) -> int:
        return self._starts[-1]

    def _place(self, number: int) -> tuple[int, int]:
        """Returns epoch and position in the epoch."""
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        epoch = bisect.bisect_right(self._starts, number) - 1
        return epoch, number - self._starts[epoch]

    def size(self, number: int) -> int:
        """Returns the rows of a batch, without drawing it."""
        epoch, place = self._place(number)
        done = (place - self._steps[epoch]) * self._size
        return self._size if done < 0 else min(self._size, len(self._val) - done)

    def kind(self, number: int) -> Literal["train", "val"]:
        """Returns the kind of a batch, without drawing it."""
        epoch, place = self._place(number)
        return "train" if place < self._steps[epoch] else "val"

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        epoch, place = self._place(number)
        if place < self._steps[epoch]:
            pairs = self._order(epoch).batch(place, self._share)
            return PlannedBatch("train", epoch, pairs[:, 0], pairs[:, 1])
        first = (place - self._steps[epoch]) * self._size
        return PlannedBatch("val", epoch, self._val[first : first + self._size], np.empty(0, dtype=np.int64))

    def _order(self, epoch: int) -> EpochOrder:
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = None  # two epochs at once would take twice the memory
            self._drawn = (epoch, draw_epoch(self._num_captions, self._config, epoch))
        return self._drawn[1]


def draw_epoch(num_captions: npt.NDArray[np.int32], config: TrainConfig, epoch: int) -> EpochOrder:
    """Draws the order of an epoch as the configuration says.

    Raises:
        DataError: for fewer pairs than one batch.
    """
    return epoch_order(
        num_captions,
        batch_size=config.batch_size,
        seed=config.seed,
        epoch=epoch,
        captions_per_video=config.captions_per_video,
        unique_videos=config.unique_videos,
    )


@dataclass(frozen=True)
class Plan:
    """All batches of one worker in order, with the starts of the epochs.

    Attributes:
        batches: in the order in which they are consumed.
        epoch_starts: position of each epoch's first batch.
        num_steps: optimiser steps of the whole run.
    """

    batches: Sequence[PlannedBatch]
    epoch_starts: tuple[int, ...]
    num_steps: int

    def position(self, epoch: int, step: int) -> int:
        """Returns the position of the batch that follows ``epoch`` epochs and ``step`` steps in all.

        It also holds for a run that continues on another number of workers, with other validation batches.
        """
        if epoch >= len(self.epoch_starts):
            return len(self.batches)
        start = self.epoch_starts[epoch]
        done = sum(self.kind(number) == "train" for number in range(start))
        return start + step - done

    def size(self, number: int) -> int:
        """Returns the rows of a batch."""
        batches = self.batches
        return batches.size(number) if isinstance(batches, DrawnBatches) else len(batches[number].videos)

    def kind(self, number: int) -> Literal["train", "val"]:
        """Returns the kind of a batch."""
        batches = self.batches
        return batches.kind(number) if isinstance(batches, DrawnBatches) else batches[number].kind

    def epoch_steps(self) -> list[int]:
        """Returns the steps of each epoch."""
        ends = [*self.epoch_starts[1:], len(self.batches)]
        return [
            sum(self.kind(number) == "train" for number in range(start, end))
            for start, end in zip(self.epoch_starts, ends, strict=True)
        ]


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
    val = np.arange(rank, num_val, world_size)
    counts = np.array(num_captions, np.int32)
    left = config.max_steps or np.iinfo(np.int64).max
    steps: list[int] = []
    for epoch in range(config.epochs):
        if config.unique_videos or not epoch:  # the first is drawn for its errors alone
            count = len(draw_epoch(counts, config, epoch))
        else:
            count = epoch_steps(counts, config.batch_size, config.captions_per_video)
        if not (count := min(count, left)):
            break
        steps.append(count)
        left -= count
    batches = DrawnBatches(counts, val, config, mine, steps)
    return Plan(batches, batches.epoch_starts, sum(steps))
