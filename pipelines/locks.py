"""Locks of commands on a store, a training run or an evaluation: one job at a time."""

from __future__ import annotations

from cluster.layout import Layout
from gare.config import Config
from gare.retrieval.results.evaluation import ZERO_SHOT
from gare.storage.files import join
from gare.storage.lock import StoreLock


def store_lock(config: Config, uri: str) -> StoreLock:
    """Returns the lock of a folder, which waits or refuses as the configuration says."""
    return StoreLock(uri, when_locked=config.upkeep.when_locked, stale_s=config.upkeep.stale_s)


def run_lock(config: Config, places: Layout) -> StoreLock:
    """Returns a run's lock: a scheduler may resubmit a job it believes dead while that job is alive."""
    # Not in the run's folder, which train.overwrite deletes.
    return store_lock(config, join(places.data, "run-locks", config.train.run))


def evaluation_lock(config: Config, places: Layout, run: str, what: str) -> StoreLock:
    """Returns the lock of an evaluation, whose files only one job at a time may write.

    The run's training may go on: it writes ``best/``, the only part that evaluation reads, at its end.

    Args:
        config: says whether to wait or to refuse if another job has the lock.
        places: locations of the data set.
        run: name of the run.
        what: the split, or another name for the outputs.
    """
    # Zero-shot evaluations of all splits share a record of their MLflow run.
    names = (run,) if run == ZERO_SHOT else (run, what)
    return store_lock(config, join(places.data, "evaluation-locks", *names))
