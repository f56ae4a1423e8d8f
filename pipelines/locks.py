"""Locks that commands take: of a store, a training run or an evaluation, one job at a time."""

from __future__ import annotations

from cluster.layout import Layout
from gare.config import Config
from gare.retrieval.results.evaluation import ZERO_SHOT
from gare.storage.files import join
from gare.storage.lock import StoreLock


def store_lock(config: Config, uri: str) -> StoreLock:
    """The lock of a folder, which waits or refuses as the configuration says."""
    return StoreLock(uri, when_locked=config.upkeep.when_locked, stale_s=config.upkeep.stale_s)


def run_lock(config: Config, places: Layout) -> StoreLock:
    """Lets one driver at a time train a run: schedulers submit again what they take for lost."""
    # Not in the run's folder, which train.overwrite deletes.
    return store_lock(config, join(places.data, "run-locks", config.train.run))


def evaluation_lock(config: Config, places: Layout, run: str, what: str) -> StoreLock:
    """Lets one job at a time write an evaluation: the files of two would be mixed.

    The run's training may go on meanwhile: it writes ``best/``, all that evaluation reads of it, at its end.

    Args:
        config: says what to do where another job has it.
        places: of the data set.
        run: name of the run.
        what: the split, or another name of what is written.
    """
    # Zero-shot evaluations of all splits share a record of their MLflow run.
    names = (run,) if run == ZERO_SHOT else (run, what)
    return store_lock(config, join(places.data, "evaluation-locks", *names))
