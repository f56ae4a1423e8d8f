"""The Ray Train worker: it builds its learner, restores it and runs its share of the plan."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.layout import Layout, layout
from cluster.logs import set_up_logging
from cluster.runtime.batches import BatchRequest, stream_chunks
from cluster.runtime.devices import device_of_worker, explain_out_of_memory
from cluster.tracking import RunHandle
from gare.config import Config, TrainConfig
from gare.data.splits import StoredSplits, read_splits
from gare.data.store.clip_places import Ids
from gare.errors import DataError, DivergedError, GareError, LockLostError, StoppedError
from gare.storage.files import exists, read_json
from gare.storage.run_folder import RunFolder
from gare.train.callback import Callback
from gare.train.input.loader import WorkerBatches
from gare.train.input.plan import Plan, plan_run
from pipelines.training.callbacks import (
    ElasticWorkers,
    MetricHistory,
    MetricLog,
    PeakMemory,
    Profiling,
    StatusLine,
)
from pipelines.training.checkpointing import Checkpointing

if TYPE_CHECKING:
    import torch

    from gare.model.gare import GARE
    from gare.train.input.feed import Feed
    from gare.train.input.inputs import TrainInput
    from gare.train.step import Learner

logger = logging.getLogger(__name__)

#: Errors that end a run on all its workers, which starting them again would not change.
ENDS_THE_RUN = (DivergedError, StoppedError, LockLostError)


def input_of_run(config: Config, places: Layout, settings: dict[str, Any] | None = None) -> TrainInput:
    """Returns the input of the run, from its own stores."""
    from gare.train.input.inputs import input_of  # here, because --help must not import torch, which is slow

    return input_of(config, places.frames, places.features, settings)


def splits_of(source: TrainInput, manifest: str, folder: RunFolder, *, begun: bool) -> StoredSplits:
    """Reads the store's clips; if the run has begun, only those that it began with."""
    splits = read_splits(manifest, source.store, source.config.extract, source.store_settings)
    return splits.restricted_to(read_json(folder.clips)) if begun and exists(folder.clips) else splits


def plan_of(train: TrainConfig, splits: StoredSplits, *, rank: int = 0, world_size: int = 1) -> Plan:
    """Plans a worker's batches; the plan is the same for all workers except for the share."""
    captions = [len(row.captions) for row in splits.train]
    return plan_run(captions, len(splits.val), train, rank=rank, world_size=world_size)


def within_memory(config: Config, world_size: int) -> Config:
    """Limits the micro-batch so that the towers hold no more pairs than with all workers present.

    After nodes are lost, fewer workers share the same pairs, so their towers run more micro-batches. Frames,
    scores and validation also grow, but are small compared with the towers' activations.
    """
    most, train = config.cluster.resolved.train_workers, config.train
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
    from gare.train.validation import Validation

    config: Config = task["config"]
    places, context = layout(config), ray.train.get_context()
    folder = RunFolder(places.run(config.train.run))
    rank, world_size = context.get_world_rank(), context.get_world_size()
    name = f"{config.name}/{config.train.run}"
    set_up_logging(replace=True, log_format=config.tracking.log_format, run=name, rank=rank)
    device = device_of_worker(config.cluster.resolved)
    source = input_of_run(config, places, task["settings"])
    splits = _begun_splits(source, places.manifest, folder, task["clips"])
    worker_batches = _batches_of_worker(config.train, splits, rank, world_size)
    validated = bool(splits.val)
    del splits  # its rows take more memory than all else that is kept of the data
    model = source.worker_model(folder.uri)
    pairs = _pairs_at_once(config, world_size)
    with explain_out_of_memory(*pairs):
        learner = _learner(model, config, world_size, worker_batches.plan.num_steps, device)
    watch, owned = task["watch_preemption"], task["owned"]
    checkpointing = Checkpointing(
        learner, folder, rank, device, validated=validated, watch=watch, owned=owned
    )
    try:
        with explain_out_of_memory(*pairs):
            epoch = checkpointing.restore()
            first = worker_batches.plan.position(epoch, learner.step)
            callbacks = callbacks_of(checkpointing, worker_batches.plan, task["handle"], world_size)
            feed = _feed(source, worker_batches, task["shared"], first, device, model)
            run_loop(learner, worker_batches, first, source, feed, Validation(model, device), callbacks)
    except GareError as fault:
        if isinstance(fault, ENDS_THE_RUN) or fault is checkpointing.writer.fault:
            return fault
        raise
    return None


def callbacks_of(
    checkpointing: Checkpointing, plan: Plan, handle: RunHandle, world_size: int
) -> list[Callback]:
    """Builds the callbacks of a worker, in the order in which they must see steps and epochs.

    1. Callbacks that add values come first, so that record and MLflow have them.
    2. The profile takes its measurements before the checkpoint's communication, which is no part of the step.
    3. The record has a step before the checkpoint that is saved with it.
    4. Checkpointing comes last, since it may end the run. At the end, where the order is reversed, it is
       first: nothing else is finished before the last checkpoint is safe.

    Workers communicate in ``Profiling`` and ``Checkpointing``, so all have both in the same order; rank 0
    alone has record and MLflow.
    """
    learner, rank, device = checkpointing.learner, checkpointing.rank, checkpointing.device
    history, cluster = checkpointing.history, learner.config.cluster.resolved
    callbacks: list[Callback] = []
    if cluster.min_workers:
        callbacks.append(ElasticWorkers(world_size))
        if not rank:
            name, most = learner.config.train.run, cluster.train_workers
            logger.info("%s: %d of %d workers share its batches", name, world_size, most)
    callbacks += [PeakMemory(), StatusLine(learner, plan, rank, device, history.epochs)]
    if learner.config.train.profile:
        callbacks.append(Profiling(learner, rank, device, handle))
    if not rank:
        callbacks += [MetricHistory(history), MetricLog(handle, learner, history.resumed)]
    return [*callbacks, checkpointing]


def _begun_splits(
    source: TrainInput, manifest: str, folder: RunFolder, clips: dict[str, str]
) -> StoredSplits:
    """Returns the clips that the training began with.

    Raises:
        DataError: if the store lacks some of them, or has other captions for them.
    """
    splits = splits_of(source, manifest, folder, begun=True)
    if splits.hashes() != clips:
        # The order of samples, perhaps even the number of steps, would differ between workers.
        raise DataError(
            "lacks clips that this training began with, or has other captions of them",
            where=source.store,
            accepted="the clips of the run's clips.json; train.overwrite=true starts anew",
        )
    return splits


def _batches_of_worker(train: TrainConfig, splits: StoredSplits, rank: int, world_size: int) -> WorkerBatches:
    """Returns the batches of a worker, with the ids of their clips."""
    most = max((len(row.captions) for row in splits.val), default=1)
    ids = {split: Ids.of(of_split) for split, of_split in splits.ids().items()}
    return WorkerBatches(plan_of(train, splits, rank=rank, world_size=world_size), ids, most)


def _learner(model: GARE, config: Config, world_size: int, num_steps: int, device: torch.device) -> Learner:
    """Builds the learner; its configuration is that of the run, whatever limits this worker's memory."""
    from gare.train.step import build_learner

    return replace(build_learner(model, within_memory(config, world_size), num_steps, device), config=config)


def _feed(
    source: TrainInput,
    worker_batches: WorkerBatches,
    shared: Any,
    first: int,
    device: torch.device,
    model: GARE,
) -> Feed:
    """Returns the feed of the plan's batches, from ``first`` on, on the device."""
    import ray.train

    from gare.train.input.feed import Feed

    plan, cluster = worker_batches.plan, source.config.cluster.resolved
    loaders = cluster.loaders_per_worker
    sizes = [plan.size(number) for number in range(len(plan.batches))]
    make = source.loader(worker_batches, shared, device, model)
    chunks: Iterator[Any]
    if here := source.local_loader(make):
        loaders = 1
        chunks = (here(number, 0, sizes[number]) for number in range(first, len(sizes)))
    else:
        kinds = {"train": source.row_bytes(), "val": source.row_bytes(worker_batches.most_captions)}
        asked = [
            BatchRequest(number, sizes[number], kinds[plan.kind(number)])
            for number in range(first, len(sizes))
        ]
        chunks = stream_chunks(
            make,
            asked,
            loaders=loaders,
            config=cluster,
            workers=ray.train.get_context().get_local_world_size(),
        )
    return Feed(
        chunks,
        sizes[first:],
        device,
        finish=lambda place, tensors: source.finish_batch(plan.batches[first + place], tensors),
        loaders=loaders,
    )
