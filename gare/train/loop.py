"""The training loop of one worker, from a stream of clips to reports of steps and epochs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from gare.data.batch import Batch, FeatureBatch
from gare.data.images import normalise
from gare.data.manifest import ManifestRow
from gare.errors import GareError
from gare.model.tokenizer import tokenize
from gare.train.input.augment_cpu import augment_clip
from gare.train.input.plan import Plan, PlannedBatch
from gare.train.stages import stage
from gare.train.step import Learner, step_seed, train_step
from gare.train.validation import Validation

#: Called after each optimiser step: step (from 1), values by metric name.
OnStep = Callable[[int, dict[str, float]], None]
#: Called after each epoch: epochs done, metrics on val (empty without val).
OnEpoch = Callable[[int, dict[str, float]], None]


def run_loop(
    learner: Learner,
    plan: Plan,
    first: int,
    rows: Mapping[str, Sequence[ManifestRow]],
    clips: Iterator[Mapping[str, np.ndarray]],
    device: torch.device,
    on_step: OnStep,
    on_epoch: OnEpoch,
) -> None:
    """Trains from a batch to the end of the plan.

    Args:
        learner: model and optimiser, as they are before that batch.
        plan: of this worker.
        first: number of the batch, from ``Plan.position``.
        rows: clips of ``train`` and ``val`` in the order that the plan numbers.
        clips: ``frames`` and ``frame_mask`` of the plan's batches from the first on; from a
            feature store also ``text`` and what else ``FeatureReader.read`` gives.
        device: where to compute.
        on_step: reports a step; ``time/step_s`` and ``time/data_wait_s`` are among its values.
        on_epoch: reports an epoch.
    """
    validation = Validation(learner.model, device)
    ends = {*plan.epoch_starts[1:], len(plan.batches)}
    asked = time.perf_counter()
    for position, planned in enumerate(plan.batches[first:], start=first + 1):
        arrays = next(clips, None)
        if arrays is None:
            raise GareError(
                f"ended before batch {position - first} of {len(plan.batches) - first}", where="loader"
            )
        arrived = time.perf_counter()
        if planned.kind == "train":
            with stage("prepare"):
                batch = _batch(learner, planned, rows["train"], arrays)
            with stage("to_device"):
                batch = batch.to(device)
            values = train_step(learner, batch, [rows["train"][video].video_id for video in planned.videos])
            values |= {"time/step_s": time.perf_counter() - arrived, "time/data_wait_s": arrived - asked}
            on_step(learner.step, values)
        elif "text" in arrays:
            validation.add_features(planned.videos.tolist(), arrays)
        else:
            validation.add(
                planned.videos.tolist(),
                [rows["val"][video].captions for video in planned.videos],
                torch.from_numpy(arrays["frames"]),
                torch.from_numpy(arrays["frame_mask"]),
            )
        if position in ends:
            on_epoch(planned.epoch + 1, validation.metrics())
        asked = time.perf_counter()


def _batch(
    learner: Learner,
    planned: PlannedBatch,
    rows: Sequence[ManifestRow],
    arrays: Mapping[str, np.ndarray],
) -> Batch | FeatureBatch:
    pairs = list(zip(planned.videos, planned.captions, strict=True))
    if len(arrays["frames"]) != len(pairs):
        raise GareError(f"{len(arrays['frames'])} clips arrived for {len(pairs)} pairs", where="loader")
    if "text" in arrays:
        return _feature_batch(planned, arrays)
    captions = [rows[video].captions[caption] for video, caption in pairs]
    token_ids, token_mask = tokenize(captions, learner.config.model.max_words)
    config = learner.config
    # Of the pair and not of its place, so that the number of workers changes nothing.
    seeds = [step_seed(config.train.seed, planned.epoch, video, caption) for video, caption in pairs]
    augmented = np.stack(
        [augment_clip(clip, config.augment, one) for clip, one in zip(arrays["frames"], seeds, strict=True)]
    )
    return Batch(
        token_ids,
        token_mask,
        normalise(torch.from_numpy(augmented)),
        torch.from_numpy(arrays["frame_mask"]),
        torch.as_tensor(planned.videos),
    )


def _feature_batch(planned: PlannedBatch, arrays: Mapping[str, np.ndarray]) -> FeatureBatch:
    words = arrays.get("words")
    return FeatureBatch(
        torch.from_numpy(arrays["text"][:, 0]),
        None if words is None else torch.from_numpy(words[:, 0]),
        torch.from_numpy(arrays["token_mask"][:, 0]),
        torch.from_numpy(arrays["frames"]),
        torch.from_numpy(arrays["frame_mask"]),
        torch.as_tensor(planned.videos),
    )
