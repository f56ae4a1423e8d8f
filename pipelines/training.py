"""What a Ray Train worker does: it builds its learner, restores it and runs its share of the plan."""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from cluster.logs import set_up_logging
from cluster.storage import Layout, layout
from cluster.stream import stream
from cluster.tracking import RunHandle
from gare.config import Config
from gare.data.files import exists, join, read_json
from gare.errors import DataError, DivergedError, GareError, StoppedError
from gare.train.data import StoredSplits, read_splits
from gare.train.from_features import loader_of
from gare.train.history import History
from gare.train.input.loader import ClipLoader, FeatureLoader
from gare.train.input.plan import Plan, plan_run
from pipelines.saving import Saver
from pipelines.watching import Watch

logger = logging.getLogger(__name__)

#: Steps whose metrics go to MLflow together.
LOG_EVERY = 10


def store_of(config: Config, places: Layout) -> str:
    """The store that a run reads: of frames or of features."""
    return places.features if config.train.input == "features" else places.frames


def splits_of(
    config: Config, places: Layout, settings: dict[str, Any] | None, *, begun: bool
) -> StoredSplits:
    """What the store holds; where the run has begun, of the clips that it began with."""
    splits = read_splits(places.manifest, store_of(config, places), config.extract, settings)
    clips = clips_file(config, places)
    return splits.only(read_json(clips)) if begun and exists(clips) else splits


def clips_file(config: Config, places: Layout) -> str:
    """Where the ids of the clips that a run began with are."""
    return join(places.run(config.train.run), "clips.json")


def plan_of(config: Config, splits: StoredSplits, *, rank: int = 0, world_size: int = 1) -> Plan:
    """What a worker reads, batch by batch; the same for every worker but for its share."""
    captions = [len(row.captions) for row in splits.train]
    return plan_run(captions, len(splits.val), config.train, rank=rank, world_size=world_size)


def within_memory(config: Config, world_size: int) -> Config:
    """The configuration with which the towers hold no more pairs at once than where all workers are there.

    The same pairs are shared by fewer where nodes are lost: their towers run in as many micro-batches more.
    Frames, scores and validation are a larger share as well, and small beside what the towers keep.
    """
    most, train = config.cluster.train_workers, config.train
    if world_size >= most:
        return config
    share = -(-train.batch_size // most)
    train = train.model_copy(update={"micro_batch": min(train.micro_batch or share, share)})
    return config.model_copy(update={"train": train})


def train_worker(task: dict[str, Any]) -> GareError | None:
    """One Ray Train worker: builds its learner, restores it, runs its share of the plan.

    Returns:
        What ended training on all workers together: that it diverged, was stopped, or could not be saved.
        Raised, it would have Ray try again in vain.
    """
    import ray.train
    from ray.train.torch import get_device

    from gare.train.loop import run_loop
    from gare.train.start import initial_model, read_start
    from gare.train.step import build_learner

    config: Config = task["config"]
    places = layout(config)
    device = get_device()
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    name = f"{config.name}/{config.train.run}"
    set_up_logging(replace=True, log_format=config.tracking.log_format, run=name, rank=rank)
    splits = splits_of(config, places, task["settings"], begun=True)
    if splits.hashes() != task["clips"]:
        # Another order of samples, perhaps another number of steps than the other workers'.
        raise DataError(
            "lacks clips that this training began with, or has other captions of them",
            where=store_of(config, places),
            accepted="the clips of the run's clips.json; train.overwrite=true starts anew",
        )
    rows = {"train": splits.train, "val": splits.val}
    plan = plan_of(config, splits, rank=rank, world_size=world_size)
    from_features = config.train.input == "features"
    model = read_start(join(places.run(config.train.run), "start"), config.model) if from_features else None
    learner = replace(
        build_learner(
            model or initial_model(config), within_memory(config, world_size), plan.num_steps, device
        ),
        config=config,
    )
    saver = Saver(
        config, places, learner, rank, device, validated=bool(splits.val), watch=task["watch_preemption"]
    )
    start_epoch = saver.restore()
    ids = [[rows[batch.kind][video].video_id for video in batch.videos] for batch in plan.batches]
    first = plan.position(start_epoch, learner.step)
    load = loader_of(config, store_of(config, places), ids, plan, words=learner.model.needs_words)
    clips = _clips(config, load, range(first, len(ids)))
    watch = Watch(config, learner, plan, rank, device)
    report = Reporter(config, places, task["handle"], saver, start_epoch, watch, world_size)
    try:
        run_loop(learner, plan, first, rows, clips, device, report.step, report.epoch)
        saver.close()
    except (DivergedError, StoppedError) as fault:
        return fault
    except GareError as fault:
        if fault is saver.writer.fault:
            return fault
        raise
    watch.finish(task["handle"])
    return None


def _clips(
    config: Config, load: Callable[[], ClipLoader | FeatureLoader], numbers: range
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the plan, in order."""
    if config.train.input == "features":
        loader = load()
        # What fits into memory is read in this process, where it costs next to nothing.
        if isinstance(loader, FeatureLoader) and loader.reader.whole:
            return map(loader, numbers)
    return stream(
        load, numbers, actors=config.cluster.loaders_per_worker, reserved=bool(config.cluster.min_workers)
    )


class Reporter:
    """Writes what the loop reports: progress, MLflow, the record; and has the saver write checkpoints."""

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
        record = join(places.run(config.train.run), "history.json")
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
        """After an optimiser step; all workers must call it."""
        if self.config.cluster.min_workers:
            values |= {"train/workers": float(self.world_size)}
        self.watch.step(step, values)
        if not self.rank:
            self.history.add_step(step, values)
            if step % LOG_EVERY == 0 or step == self.learner.num_steps:
                self.handle.log_metrics(values, step, once=True)
        self.saver.step(self.epochs, self.history)

    def epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        """After an epoch; all workers must call it."""
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
