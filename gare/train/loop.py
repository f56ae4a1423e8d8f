"""The training loop of one worker, from a feed of batches to reports of steps and epochs."""

from __future__ import annotations

import time
from collections.abc import Callable

from gare.train.input.feed import Feed
from gare.train.input.inputs import TrainInput
from gare.train.input.loader import PARTS, WorkerBatches
from gare.train.step import Learner, train_step
from gare.train.validation import Validation

#: Called after each optimiser step: step (from 1), values by metric name.
OnStep = Callable[[int, dict[str, float]], None]
#: Called after each epoch: epochs done, metrics on val (empty without val).
OnEpoch = Callable[[int, dict[str, float]], None]


def run_loop(
    learner: Learner,
    worker_batches: WorkerBatches,
    first: int,
    source: TrainInput,
    feed: Feed,
    validation: Validation,
    on_step: OnStep,
    on_epoch: OnEpoch,
) -> None:
    """Trains from a given batch to the end of the plan.

    Args:
        learner: model and optimiser, in their state before that batch.
        worker_batches: batches of this worker.
        first: number of the first batch, from ``Plan.position``.
        source: input of the run.
        feed: of the plan's batches from the first on.
        validation: of the learner's model.
        on_step: reports a step. Its values include ``time/step_s``; ``time/data_wait_s``, the time that the
            step waited for its batch on the host or on the device; and the loading time of the batch by part:
            ``time/data_fetch_s``, ``time/data_jpeg_s``, ``time/data_augment_s``, ``time/data_transfer_s``.
        on_epoch: reports an epoch.

    Raises:
        GareError: if the loaders end before the plan does.
    """
    plan = worker_batches.plan
    ends = {*plan.epoch_starts[1:], len(plan.batches)}
    for position, planned in enumerate(plan.batches[first:], start=first + 1):
        asked = time.perf_counter()
        arrived = next(feed)
        if planned.kind == "train":
            started = time.perf_counter()
            batch = source.batch(arrived.tensors)
            values = train_step(
                learner, batch, [worker_batches.ids["train"][video] for video in planned.videos]
            )
            seconds = feed.seconds(arrived)
            on_device = seconds["device_wait"]
            values |= {f"time/data_{part}_s": seconds[part] for part in (*PARTS, "transfer")}
            values["time/data_wait_s"] = started - asked + on_device
            values["time/step_s"] = time.perf_counter() - started - on_device
            on_step(learner.step, values)
        else:
            source.validate(validation, planned, arrived.tensors)
        if position in ends:
            on_epoch(planned.epoch + 1, validation.metrics())
