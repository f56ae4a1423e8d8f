"""Loading of rows of planned batches as arrays, in any process.

m clips of a batch, F frames, S×S pixels, W words.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gare.config import AugmentConfig
from gare.data.images import crop_centre
from gare.data.store.feature_reader import FeatureReader
from gare.data.store.frame_reader import FrameReader
from gare.train.input.augment_cpu import augment_clip
from gare.train.input.plan import Plan, PlannedBatch
from gare.train.input.sampler import step_seed
from gare.train.input.tokens import CaptionTokens

#: Arrays by name, each with one row per clip or per caption.
Arrays: TypeAlias = dict[str, npt.NDArray[Any]]
#: Loads the rows of a batch: number of the batch, first row, row after the last.
Load: TypeAlias = Callable[[int, int, int], Arrays]

#: Parts of a loader's time, in the order of the array ``seconds`` that it returns.
PARTS = ("fetch", "jpeg", "augment")
#: Arrays that say how to read others; they stay on the host.
ON_HOST = frozenset({"sizes", "caption_counts"})


@dataclass(frozen=True)
class WorkerBatches:
    """The batches of a worker, and the video ids that their numbers stand for.

    Attributes:
        plan: of the worker.
        ids: video ids of each split, in the order that the plan numbers.
        most_captions: largest number of captions of a validation clip.
    """

    plan: Plan
    ids: Mapping[str, Sequence[str]]
    most_captions: int = 1

    def rows(self, number: int, first: int, stop: int) -> tuple[PlannedBatch, list[str]]:
        """Returns some rows of a batch, and the ids of their videos."""
        batch = self.plan.batches[number]
        some = PlannedBatch(batch.kind, batch.epoch, batch.videos[first:stop], batch.captions[first:stop])
        return some, [self.ids[batch.kind][video] for video in some.videos]


class FrameLoader:
    """Loader of clips and their captions' tokens from a frame store.

    Args:
        store: the frame store.
        worker_batches: batches to load from.
        tokens: of the captions of each split.
        augment: augmentation of training clips by this loader; None if it is done elsewhere or not at all.
        seed: of the run, for the augmentation.
        whole: whether to return whole frames of training clips, to be cropped after augmentation elsewhere.
    """

    def __init__(
        self,
        store: str,
        worker_batches: WorkerBatches,
        tokens: Mapping[str, CaptionTokens],
        *,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        whole: bool = False,
    ) -> None:
        self.reader = FrameReader(store)
        self.worker_batches, self.tokens = worker_batches, tokens
        self.augment, self.seed, self.whole = augment, seed, whole

    def __call__(self, number: int, first: int, stop: int) -> Arrays:
        """Loads the rows from ``first`` to ``stop`` of a batch.

        Returns:
            ``frames`` (m, F, S, S, 3) uint8, or with ``whole`` the ``pixels`` of all clips (P,) uint8 and
            their ``sizes`` (m, 2) int32, height and width; ``frame_mask`` (m, F) bool; ``token_ids`` and
            ``token_mask`` of each pair's caption, or in validation of all captions, with ``caption_counts``
            (m,); ``video_ids`` (m,) int64, except in validation; ``seconds`` (1, 3), the time that each of
            ``PARTS`` took.

        Raises:
            DataError: for a clip that the store does not hold or that cannot be read.
        """
        some, ids = self.worker_batches.rows(number, first, stop)
        before = self.reader.fetch_s, self.reader.jpeg_s
        augmented_s = 0.0
        if some.kind == "val":
            frames, mask = self.reader.read(ids)
            arrays: Arrays = {"frames": frames, "frame_mask": mask}
            arrays |= self.tokens["val"].of_videos(some.videos)
        else:
            arrays, augmented_s = self._training_clips(some, ids)
            arrays |= self.tokens["train"].of_pairs(some.videos, some.captions)
            arrays["video_ids"] = some.videos
        spent = [self.reader.fetch_s - before[0], self.reader.jpeg_s - before[1], augmented_s]
        return arrays | {"seconds": np.array([spent])}

    def _training_clips(self, some: PlannedBatch, ids: Sequence[str]) -> tuple[Arrays, float]:
        if self.augment is None and not self.whole:
            frames, mask = self.reader.read(ids)
            return {"frames": frames, "frame_mask": mask}, 0.0
        clips, masks, spent = [], [], 0.0
        seeds = clip_seeds(self.seed, some)
        for video_id, seed in zip(ids, seeds, strict=True):
            clip, mask = self.reader.read_whole(video_id)
            if self.augment is not None:
                started = time.perf_counter()
                clip = self._squares(augment_clip(clip[mask], self.augment, seed))
                spent += time.perf_counter() - started
            clips.append(clip)
            masks.append(mask)
        if self.augment is not None:
            return {"frames": np.stack(clips), "frame_mask": np.stack(masks)}, spent
        sizes = np.array([clip.shape[1:3] for clip in clips], np.int32)
        pixels = np.concatenate([clip.reshape(-1) for clip in clips])
        return {"pixels": pixels, "sizes": sizes, "frame_mask": np.stack(masks)}, spent

    def _squares(self, frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Crops the centres of real frames; padded frames are zeros."""
        size = self.reader.size
        squares = np.zeros((self.reader.num_frames, size, size, 3), np.uint8)
        squares[: len(frames)] = crop_centre(frames, size)
        return squares


def clip_seeds(seed: int, batch: PlannedBatch) -> list[int]:
    """Derives augmentation seeds from pairs, not from places: the number of workers changes nothing."""
    pairs = zip(batch.videos, batch.captions, strict=True)
    return [step_seed(seed, batch.epoch, video, caption) for video, caption in pairs]


class FeatureLoader:
    """Loader of clips and captions from a feature store.

    Args:
        reader: of the store.
        worker_batches: batches to load from.
    """

    def __init__(self, reader: FeatureReader, worker_batches: WorkerBatches) -> None:
        self.reader, self.worker_batches = reader, worker_batches

    def __call__(self, number: int, first: int, stop: int) -> Arrays:
        """Loads the rows from ``first`` to ``stop`` of a batch.

        Returns:
            The arrays of ``FeatureReader.read``, with one caption per clip or in validation all, and
            ``video_ids`` and ``seconds`` like ``FrameLoader``.

        Raises:
            DataError: for a clip that the store does not hold or that cannot be read.
        """
        started = time.perf_counter()
        some, ids = self.worker_batches.rows(number, first, stop)
        if some.kind == "val":
            arrays = self.reader.read(ids)
        else:
            arrays = self.reader.read(ids, some.captions.tolist()) | {"video_ids": some.videos}
        return arrays | {"seconds": np.array([[time.perf_counter() - started, 0.0, 0.0]])}
