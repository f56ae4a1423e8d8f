"""The Ray Train worker: it builds its learner, restores it and runs its share of the plan."""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.layout import Layout, layout
from cluster.logs import set_up_logging
from cluster.runtime.batches import Asked, stream
from cluster.runtime.devices import device_of_worker, explained_memory
from cluster.tracking import RunHandle
from gare.config import Config
from gare.data.splits import StoredSplits, read_splits
from gare.errors import DataError, DivergedError, GareError, LockLostError, StoppedError
from gare.storage.files import exists, read_json
from gare.storage.run_folder import RunFolder
from gare.train.checkpoint.history import History
from gare.train.input.loader import WorkerBatches
from gare.train.input.plan import Plan, plan_run
from pipelines.training.checkpointing import Saver
from pipelines.training.monitoring import Watch

if TYPE_CHECKING:
    import torch

    from gare.model.gare import GARE
    from gare.train.input.feed import Feed
    from gare.train.input.inputs import TrainInput

logger = logging.getLogger(__name__)

#: Number of steps whose metrics are sent to MLflow together.
LOG_EVERY = 10


def input_of_run(config: Config, places: Layout, settings: dict[str, Any] | None = None) -> TrainInput:
    """Returns the input of the run, from its own stores."""
    from gare.train.input.inputs import input_of  # here, because --help must not import torch, which is slow

    return input_of(config, places.frames, places.features, settings)


def splits_of(config: Config, places: Layout, source: TrainInput, *, begun: bool) -> StoredSplits:
    """Reads the store's clips; if the run has begun, only those that it began with."""
    splits = read_splits(places.manifest, source.store, config.extract, source.store_settings)
    clips = RunFolder(places.run(config.train.run)).clips
    return splits.restricted_to(read_json(clips)) if begun and exists(clips) else splits


def plan_of(config: Config, splits: StoredSplits, *, rank: int = 0, world_size: int = 1) -> Plan:
    """Plans a worker's batches; the plan is the same for all workers except for the share."""
    captions = [len(row.captions) for row in splits.train]
    return plan_run(captions, len(splits.val), config.train, rank=rank, world_size=world_size)


def within_memory(config: Config, world_size: int) -> Config:
    """Limits the micro-batch so that the towers hold no more pairs than with all workers present.

    After nodes are lost, fewer workers share the same pairs, so their towers run more micro-batches. Frames,
    scores and validation also grow, but are small compared with the towers' activations.
    """
    most, train = config.cluster.train_workers, config.train
    if world_size >= most:
        return config
    share = -(-train.batch_size // most)
    train = train.model_copy(update={"micro_batch": min(train.micro_batch or share, share)})
    return config.model_copy(update={"train": train})


def _pairs_at_once(config: Config, world_size: int) -> tuple[int, int]:
    """Returns the pairs that a worker's towers encode in one pass, and all of its pairs."""
    share = -(-config.train.batch_size // world_size)
    return within_memory(config, world_size).train.micro_batch or share, share


def train_worker(task: dict[str, Any]) -> GareError | None:
    """Runs one Ray Train worker: builds its learner, restores it, runs its share of the plan.

    Returns:
        The error that ended training on all workers together: it diverged, was stopped, could not be saved,
        or another job has taken the run over. It is returned because Ray would retry in vain if it were
        raised.
    """
    import ray.train

    from gare.train.loop import run_loop
    from gare.train.step import build_learner
    from gare.train.validation import Validation

    config: Config = task["config"]
    places = layout(config)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    name = f"{config.name}/{config.train.run}"
    set_up_logging(replace=True, log_format=config.tracking.log_format, run=name, rank=rank)
    device = device_of_worker(config.cluster)
    source = input_of_run(config, places, task["settings"])
    listed = _listed(config, places, source, task["clips"], rank, world_size)
    model = source.worker_model(places.run(config.train.run))
    with explained_memory(*_pairs_at_once(config, world_size)):
        learner = build_learner(model, within_memory(config, world_size), listed.plan.num_steps, device)
        learner = replace(learner, config=config)
        validated, watches = bool(listed.ids["val"]), task["watch_preemption"]
        saver = Saver(
            config, places, learner, rank, device, validated=validated, watch=watches, owned=task["owned"]
        )
        try:
            start_epoch = saver.restore()
        except LockLostError as fault:
            return fault
    first = listed.plan.position(start_epoch, learner.step)
    watch = Watch(config, learner, listed.plan, rank, device)
    report = Reporter(config, places, task["handle"], saver, start_epoch, watch, world_size)
    validation = Validation(learner.model, device)
    try:
        with (
            explained_memory(*_pairs_at_once(config, world_size)),
            _feed(config, source, listed, task["shared"], first, device, learner.model) as feed,
        ):
            run_loop(learner, listed, first, source, feed, validation, report.step, report.epoch)
        saver.close()
    except (DivergedError, StoppedError, LockLostError) as fault:
        return fault
    except GareError as fault:
        if fault is saver.writer.fault:
            return fault
        raise
    watch.finish(task["handle"])
    return None


def _listed(
    config: Config, places: Layout, source: TrainInput, clips: dict[str, str], rank: int, world_size: int
) -> WorkerBatches:
    """Returns this worker's batches of the clips that the training began with.

    Raises:
        DataError: if the store lacks some of them, or has other captions for them.
    """
    splits = splits_of(config, places, source, begun=True)
    if splits.hashes() != clips:
        # The order of samples, perhaps even the number of steps, would differ between workers.
        raise DataError(
            "lacks clips that this training began with, or has other captions of them",
            where=source.store,
            accepted="the clips of the run's clips.json; train.overwrite=true starts anew",
        )
    most = max((len(row.captions) for row in splits.val), default=1)
    return WorkerBatches(plan_of(config, splits, rank=rank, world_size=world_size), splits.ids(), most)


def _feed(
    config: Config,
    source: TrainInput,
    listed: WorkerBatches,
    shared: Any,
    first: int,
    device: torch.device,
    model: GARE,
) -> Feed:
    """Returns the feed of the plan's batches, from ``first`` on, on the device."""
    import ray.train

    from gare.train.input.feed import Feed

    batches, loaders = listed.plan.batches, config.cluster.loaders_per_worker
    sizes = [len(batch.videos) for batch in batches]
    make = source.loader(listed, shared, device, model)
    chunks: Iterator[Any]
    if here := source.local_loader(make):
        loaders = 1
        chunks = (here(number, 0, sizes[number]) for number in range(first, len(sizes)))
    else:
        kinds = {"train": source.row_bytes(), "val": source.row_bytes(listed.most_captions)}
        asked = [
            Asked(number, sizes[number], kinds[batches[number].kind]) for number in range(first, len(sizes))
        ]
        chunks = stream(
            make,
            asked,
            loaders=loaders,
            config=config.cluster,
            workers=ray.train.get_context().get_local_world_size(),
        )
    return Feed(
        chunks,
        sizes[first:],
        device,
        finish=lambda place, tensors: source.finish_batch(batches[first + place], tensors),
        loaders=loaders,
    )


class Reporter:
    """Reports the loop's results to the log, MLflow and the record, and triggers checkpoints."""

    def __init__(
        self,
        config: Config,
        places: Layout,
        handle: RunHandle,
        saver: Saver,
        start_epoch: int,
        watch: Watch,
        world_size: int,
    ) -> None:
        self.config, self.handle, self.saver = config, handle, saver
        self.learner, self.rank, self.epochs = saver.learner, saver.rank, start_epoch
        record = RunFolder(places.run(config.train.run)).history
        self.history = History.read(record, step=self.learner.step, epoch=start_epoch)
        self.watch, self.world_size = watch, world_size
        watch.validated_before(self.history.epochs)
        if self.learner.step and not self.rank:
            self.history.resumed = sorted({*self.history.resumed, self.learner.step})
            steps = ", ".join(map(str, self.history.resumed))
            handle.set_tags({"resumed.after_steps": steps})
        if config.cluster.min_workers and not self.rank:
            logger.info(
                "%s: %d of %d workers share its batches",
                config.train.run,
                world_size,
                config.cluster.train_workers,
            )

    def step(self, step: int, values: dict[str, float]) -> None:
        """Reports an optimiser step; all workers must call it."""
        if self.config.cluster.min_workers:
            values |= {"train/workers": float(self.world_size)}
        self.watch.step(step, values)
        if not self.rank:
            self.history.add_step(step, values)
            if step % LOG_EVERY == 0 or step == self.learner.num_steps:
                self.handle.log_metrics(values, step, once=True)
        self.saver.step(self.epochs, self.history)

    def epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        """Reports an epoch; all workers must call it."""
        named = {f"val/{name}": value for name, value in metrics.items()}
        self.epochs = epoch
        self.watch.status.validated(epoch, named)
        if self.rank:
            self.saver.epoch(epoch, named, self.history)
            return
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        measured = named | {"memory/worker_peak_bytes": memory}
        self.history.add_epoch(epoch, measured)
        self.handle.log_metrics(measured | {"epoch": epoch}, self.learner.step, once=True)
        self.saver.epoch(epoch, named, self.history)
        if named:
            logger.info(
                "%s: epoch %d of %d, val R@1 %.1f t2v, %.1f v2t",
                self.config.train.run,
                epoch,
                self.config.train.epochs,
                named["val/t2v/R1"],
                named["val/v2t/R1"],
            )
