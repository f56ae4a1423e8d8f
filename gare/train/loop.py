"""The training loop of one worker, from a feed of batches to callbacks after steps and epochs."""

from __future__ import annotations

import time
from collections.abc import Sequence

from gare.train.callback import Callback
from gare.train.input.feed import Feed
from gare.train.input.inputs import TrainInput
from gare.train.input.loader import PARTS, WorkerBatches
from gare.train.step import Learner, train_step
from gare.train.validation import Validation


def run_loop(
    learner: Learner,
    worker_batches: WorkerBatches,
    first: int,
    source: TrainInput,
    feed: Feed,
    validation: Validation,
    callbacks: Sequence[Callback],
) -> None:
    """Trains from a given batch to the end of the plan, closes the feed, and finishes the callbacks.

    Args:
        learner: model and optimiser, in their state before that batch.
        worker_batches: batches of this worker.
        first: number of the first batch, from ``Plan.position``.
        source: input of the run.
        feed: of the plan's batches from the first on.
        validation: of the learner's model.
        callbacks: in the order in which steps and epochs reach them. A step's values include
            ``time/step_s``; ``time/data_wait_s``, the time that the step waited for its batch on the host or
            on the device; and the loading time of the batch by part: ``time/data_fetch_s``,
            ``time/data_jpeg_s``, ``time/data_augment_s``, ``time/data_transfer_s``.

    Raises:
        GareError: if the loaders end before the plan does, or from a callback.
    """
    plan = worker_batches.plan
    ends = {*plan.epoch_starts[1:], len(plan.batches)}
    with feed:
        for position in range(first + 1, len(plan.batches) + 1):
            planned = plan.batches[position - 1]
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
                for callback in callbacks:
                    callback.on_step(learner.step, values)
            else:
                source.validate(validation, planned, arrived.tensors)
            if position in ends:
                metrics = {f"val/{name}": value for name, value in validation.metrics().items()}
                for callback in callbacks:
                    callback.on_epoch(planned.epoch + 1, metrics)
    for callback in reversed(callbacks):
        callback.on_finish()
