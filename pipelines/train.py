"""train: frame store → checkpoint, on Ray Train workers that gather each other's negatives."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys
    from pathlib import Path

    # Before other folders of PYTHONPATH, which may have a module of the same name.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from cluster.runtime.signals import take_signals

    take_signals()

import logging
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.command import main
from cluster.layout import Layout, absolute, layout
from cluster.runtime.devices import require_usable_gpus
from cluster.runtime.resources import (
    require_train_resources,
    resolve_resources,
    resources_of_worker,
    warn_while_short_of_nodes,
)
from cluster.runtime.session import ray_session, unwrap_gare_error, watches_preemption
from cluster.runtime.signals import workers_asked_to_end
from cluster.tracking import (
    RunHandle,
    Tracker,
    connect,
    git_revision,
    run_tags,
    split_tags,
    status_after,
    system_metrics,
)
from gare.config import ClipConfig, Config, differences
from gare.config.run_settings import completed_settings
from gare.data.manifest import require_captions
from gare.data.splits import StoredSplits, split_hash_of
from gare.errors import ConfigError, DivergedError, GareError
from gare.retrieval.results.evaluation import model_label
from gare.storage.files import delete_tree, exists, list_files, open_fs, write_json
from gare.storage.lock import StoreLock
from gare.storage.run_folder import RunFolder
from gare.storage.uris import is_uri
from gare.train.checkpoint.history import History
from gare.train.checkpoint.index import Checkpoints, Entry
from gare.train.input.randaugment import POLICY
from pipelines.evaluating.subject import require_name_of_a_run
from pipelines.locks import run_lock
from pipelines.sizes import sizes_of_weights
from pipelines.stored_outbox import pending_of
from pipelines.training.best import copy_best, mend_best
from pipelines.training.checkpointing import SELECTION, StopRequest, checkpoints_of
from pipelines.training.outputs import log_outputs
from pipelines.training.precision import warn_of_towers_that_stay, with_precision, with_saved_precision
from pipelines.training.worker import input_of_run, plan_of, splits_of, train_worker

if TYPE_CHECKING:
    from gare.train.input.inputs import TrainInput

logger = logging.getLogger(__name__)


def run(config: Config) -> dict[str, Any]:
    """Trains the configured run, resumes it, or returns its result if it is done.

    Raises:
        ConfigError: for a run of that name with other settings, a reserved name, or workers that the cluster
            cannot hold.
        DataError: for videos without captions, and a store that is missing, incomplete or made with other
            settings.
        GareError: if MLflow cannot be reached at the start, or training fails.
    """
    require_name_of_a_run(config)
    config = _with_absolute_paths(config)
    places = layout(config)
    require_captions(places.manifest)
    with _lock(config, places) as lock:
        return _run(config, places, lock)


def _lock(config: Config, places: Layout) -> AbstractContextManager[StoreLock | None]:
    """Takes the run's lock if there are data to train on; else ``_run`` reports that, and no file is left."""
    return run_lock(config, places) if exists(places.manifest) else nullcontext()


def _run(config: Config, places: Layout, lock: StoreLock | None) -> dict[str, Any]:
    started = time.monotonic()
    folder = RunFolder(places.run(config.train.run))
    source = input_of_run(config, places)
    begun = folder.has_begun and not config.train.overwrite
    if exists(places.manifest):  # else the missing manifest is reported later
        source.check_store()
    splits = splits_of(source, places.manifest, folder, begun=begun)
    vocabulary = ClipConfig().vocab_size
    if config.model.clip.vocab_size < vocabulary:
        raise ConfigError(
            f"is {config.model.clip.vocab_size}",
            where="model.clip.vocab_size",
            accepted=f"{vocabulary}, the tokens of CLIP, or more",
        )
    plan = plan_of(config.train, splits)
    config = with_saved_precision(config, folder) if begun else config
    earlier = _earlier_run(config, folder, splits) if begun else {}
    if finished := folder.read_result() if earlier else {}:
        logger.info("%s is done; train.overwrite=true trains it again", folder.uri)
        checkpoints = checkpoints_of(config.train, folder, validated=bool(splits.val))
        mend_best(checkpoints, folder.best, source, finished)
        return finished
    # Validate everything that can fail before deleting or writing.
    if (config.train.clip_weights or config.train.start_from) and not earlier:
        source.check_weights()
    tracker = connect(config.tracking, places.root)
    with ray_session(config.cluster):
        cluster = resolve_resources(config, config.train.batch_size * source.row_bytes())
        require_train_resources(cluster)
        config = config.model_copy(update={"cluster": cluster})
        config = with_precision(config, have_bf16=require_usable_gpus(cluster))
        warn_of_towers_that_stay(config, plan.num_steps)
        if lock:
            lock.raise_if_lost()
        if config.train.overwrite:
            delete_tree(folder.uri)
        source.write_for_workers(folder.uri)
        handle = _start_run(tracker, config, places, splits, earlier.get("mlflow_run_id"))
        try:
            write_json(folder.clips, splits.ids())
            folder.write_record(_identity(config, splits) | {"mlflow_run_id": handle.run_id})
            with system_metrics(handle, config.tracking):
                checkpoints = _fit(config, folder, handle, source, splits, lock)
            if lock:
                lock.raise_if_lost()
            best = copy_best(checkpoints, folder.best, source)
            result = _finish(config, folder, handle, best, started)
            folder.write_result(result)
        except BaseException as error:
            handle.finish(status_after(error))
            raise
    handle.finish()
    return result


def _with_absolute_paths(config: Config) -> Config:
    named = {key: absolute(getattr(config.train, key)) for key in ("clip_weights", "start_from")}
    train = config.train.model_copy(update=named)
    features = config.features.model_copy(update={"weights": absolute(config.features.weights)})
    return config.model_copy(update={"train": train, "features": features})


def _identity(config: Config, splits: StoredSplits) -> dict[str, Any]:
    """Returns the settings and data that identify a run."""
    settings = config.identity()
    # Sampling or not is part of the identity, whichever key decides it: in earlier versions auto depended on
    # a memory setting.
    sampled = config.loss.samples_texts(config.train.batch_size, config.model.clip.embed_dim)
    del settings["loss"]["direction_over"]
    settings["loss"]["direction_is_sampled"] = sampled
    if config.augment.is_on:
        # Earlier versions used another library's policy under the same settings.
        settings["augment"]["policy"] = POLICY
    return {"settings": settings, **splits.identity()}


def _earlier_run(config: Config, folder: RunFolder, splits: StoredSplits) -> dict[str, Any]:
    earlier = folder.read_record()
    now = _identity(config, splits)
    earlier["settings"] = completed_settings(earlier.get("settings", {}))
    if isinstance(loss := earlier["settings"].get("loss"), dict):
        loss.pop("direction_over", None)
    differing = [
        line.removeprefix("settings.") for line in differences({key: earlier.get(key) for key in now}, now)
    ]
    if differing or not config.train.resume:
        reason = (
            f"a run of this name has other settings or clips: {'; '.join(differing[:8])}"
            if differing
            else "a run of this name exists and train.resume is false"
        )
        raise ConfigError(reason, where=folder.uri, accepted="another train.run, or train.overwrite=true")
    return earlier


def _start_run(
    tracker: Tracker, config: Config, places: Layout, splits: StoredSplits, run_id: str | None
) -> RunHandle:
    train = config.train
    handle = tracker.start_run(
        f"{config.name}/{train.run}",
        run_id=run_id,
        params=config.logged(),
        tags={
            **run_tags(config, splits.benchmark, splits.protocol),
            "model": model_label(config.model.identity()),
            "manifest.fingerprint": splits.manifest_fingerprint,
            "store.fingerprint": splits.store_fingerprint,
            "git.revision": git_revision(Path(__file__).parent),
        },
        pending=pending_of(places),
    )
    for split in ("train", "val"):
        rows = splits.of_split(split)
        counts = {"videos": len(rows), "captions": sum(len(row.captions) for row in rows)}
        if rows:
            digest = split_hash_of(rows)
            handle.log_dataset(f"{splits.benchmark}-{split}", digest, places.manifest, split, counts)
            handle.set_tags(split_tags(split, digest, counts["captions"], counts["videos"]))
    return handle


def _fit(
    config: Config,
    folder: RunFolder,
    handle: RunHandle,
    source: TrainInput,
    splits: StoredSplits,
    lock: StoreLock | None,
) -> Checkpoints:
    """Runs the workers and returns the run's checkpoints."""
    import ray.train.torch

    v2: Any = ray.train  # its type stubs are those of Ray Train V1

    cluster = config.cluster.resolved
    # Ray would open the URI by itself, without our endpoint and retries.
    filesystem, storage_path = open_fs(folder.uri)
    # Ray writes its own record of checkpoints in place: a kill or a full disk at that moment would lose the
    # run. We do not use it: Ray only restarts workers and knows nothing of checkpoints.
    trainer = v2.torch.TorchTrainer(
        train_worker,
        train_loop_config={
            "config": config,
            "handle": handle,
            "settings": source.store_settings,
            "shared": source.shared_data(splits),
            "clips": splits.hashes(),
            "watch_preemption": watches_preemption(),
            # Workers check the lock themselves: they go on while their driver is suspended.
            "owned": lock.owned if lock else None,
        },
        scaling_config=v2.ScalingConfig(
            num_workers=(cluster.min_workers, cluster.train_workers)
            if cluster.min_workers
            else cluster.train_workers,
            elastic_resize_monitor_interval_s=cluster.resize_every_s,
            use_gpu=cluster.use_gpu,
            resources_per_worker=resources_of_worker(cluster),
            placement_strategy=cluster.placement.upper(),
        ),
        run_config=v2.RunConfig(
            name="ray",
            storage_path=storage_path,
            storage_filesystem=filesystem if is_uri(folder.uri) else None,
            failure_config=v2.FailureConfig(max_failures=config.train.max_failures),
            logging_config=v2.LoggingConfig(log_level="WARNING"),
        ),
    )
    request = StopRequest(folder)
    request.withdraw()
    try:
        with workers_asked_to_end(request.make), warn_while_short_of_nodes(cluster):
            fault = trainer.fit().return_value
    except Exception as error:
        raise _cause(error) from error
    checkpoints = checkpoints_of(config.train, folder, validated=bool(splits.val))
    request.withdraw()
    if isinstance(fault, DivergedError):
        held = [checkpoints.location(entry) for entry in checkpoints.entries()]
        kept = f"; checkpoints of this run: {', '.join(held)}" if held else "; it had no checkpoint yet"
        raise DivergedError(fault.what + kept, where=fault.where, accepted=fault.accepted)
    if isinstance(fault, GareError):
        raise fault
    return checkpoints


def _cause(error: Exception) -> GareError:
    """Returns the worker's ``GareError`` if there is one, else an error with Ray's message."""
    if fault := unwrap_gare_error(error):
        return fault
    failures = list(getattr(error, "worker_failures", {}).values())
    first = failures[0] if failures else error
    lines = str(first).strip().splitlines() or ["no more is known"]
    return GareError(f"training failed: {type(first).__name__}: {lines[-1]}")


def _finish(
    config: Config, folder: RunFolder, handle: RunHandle, best: Entry, started: float
) -> dict[str, Any]:
    """Sends pictures and model to MLflow and returns the result."""
    history = History.read(folder.history)
    history.save()  # into one file, for people and other programs
    model = log_outputs(folder, handle, config.model.clip.embed_dim)
    step_seconds = [value for _, value in history.steps["time/step_s"]]
    return {
        "run": config.train.run,
        "checkpoint": folder.best,
        "checkpoint_files": [file.rsplit("/", 1)[-1] for file in list_files(folder.best)],
        "steps": len(step_seconds),
        "best_epoch": best.epoch,
        SELECTION: best.metrics.get(SELECTION),
        "loss": history.steps["loss/total"][-1][1],
        "seconds_per_step": round(statistics.median(step_seconds), 4),
        "worker_peak_bytes": int(max(value for _, value in history.epochs["memory/worker_peak_bytes"])),
        "mlflow_run_id": handle.run_id,
        "mlflow_model": model,
        "seconds": round(time.monotonic() - started, 2),
    }


if __name__ == "__main__":
    main(run, __doc__, sizes_of=sizes_of_weights)
