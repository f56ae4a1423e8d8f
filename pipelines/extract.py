"""extract: manifest → frame store, feature store or both, on Ray, resumed by id, over bad videos.

A run does what is new or changed in the collection, and marks what is gone. Features are made of a frame
store that is there, beside its making, or of frames that are not kept. ``--verify`` checks a store,
``--compact`` merges its small parts.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys
    from pathlib import Path

    # Before other folders of PYTHONPATH, which may have a module of the same name.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from cluster.runtime.signals import take_signals

    take_signals()

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.command import Flag, main
from cluster.layout import Layout, layout
from cluster.runtime.session import ray_session
from cluster.tracking.extraction import ExtractionRun
from gare.config import Config
from gare.data.manifest import Manifest, read_manifest
from gare.data.store.compact import compact
from gare.data.store.contents import Store
from gare.data.store.verify import verify_or_raise
from gare.errors import ConfigError
from gare.extract.comparison import Comparison
from gare.extract.inventory import Inventory
from gare.extract.update import StoreUpdate
from gare.storage.files import join, write_atomically, write_json
from gare.storage.lock import StoreLock
from gare.storage.run_folder import RESULT
from pipelines.extracting.plans import (
    FeaturePlan,
    FramePlan,
    StorePlan,
    plan_stores,
    warn_of_missing_frames,
)
from pipelines.extracting.pools import Decoders
from pipelines.locks import store_lock
from pipelines.sizes import sizes_of_weights
from pipelines.stored_outbox import pending_of

logger = logging.getLogger(__name__)

FLAGS = {
    "--verify": Flag("upkeep.task", "check all that is in the store", "verify"),
    "--compact": Flag("upkeep.task", "merge small parts of the store", "compact"),
    "--retry-failed": Flag(
        "extract.retry_failed",
        "try all failed videos again, also those whose file is at fault",
        "true",
    ),
    "--retry-traits": Flag(
        "extract.retry_traits",
        "decode videos again that an earlier version may have read wrongly, see --verify",
        "true",
    ),
    "--preview": Flag("upkeep.preview", "clips on a contact sheet, preview.png in the store"),
}


def run(config: Config) -> dict[str, Any]:
    """Brings the stores up to date with the manifest, or checks or compacts them, by ``upkeep.task``.

    Raises:
        ConfigError: for imported features, which are not extracted.
        DataError: for a missing manifest, a store made with other settings, faults found by a check, or more
            failed or vanished videos than ``extract.max_failed_fraction``; extracted clips stay.
        GareError: if MLflow cannot be reached, before anything is extracted.
    """
    if config.data.is_imported:
        raise ConfigError(
            "is features, and there is nothing to extract",
            where="data.benchmark",
            accepted="pipelines/import_features.py, which makes the feature store",
        )
    places, task = layout(config), config.upkeep.task
    manifest = read_manifest(places.manifest)
    decoders = Decoders(config)
    plans = plan_stores(config, manifest, places, decoders)
    updates = [plan.update for plan in plans]
    if task == "verify":
        results = [_verify(update, decoders) for update in updates]
    elif task == "compact":
        results = [_compact(config, update.uri) for update in updates]
    else:
        if config.extract.retry_traits:
            for update in updates:
                update.again = decoders.find_outdated(update).keys()
        if config.extract.store == "features":
            warn_of_missing_frames(plans[0], places.frames)
        results = _Writer(config, places).write(plans)
    result = results[0] | ({"features": results[1]} if len(results) > 1 else {})
    if config.upkeep.preview and task == "write":
        result["preview"] = _preview(config, places.frames, manifest)
    return result


def _verify(update: StoreUpdate, decoders: Decoders) -> dict[str, Any]:
    """Checks a store, and lists the clips that an earlier version may have decoded wrongly."""
    found = verify_or_raise(update.uri, update.schema, {row.video_id for row in update.manifest.rows})
    traits = decoders.find_outdated(update)
    for video_id, trait in sorted(traits.items()):
        logger.warning("%s: an earlier version may have taken other frames: %s", video_id, trait)
    if traits:
        logger.warning(
            "%d such clips; --retry-traits (extract.retry_traits=true) makes them again", len(traits)
        )
    return found | {"mended": traits}


def _compact(config: Config, store: str) -> dict[str, Any]:
    """Merges small parts of a store."""
    started = time.monotonic()
    Store(store).read_meta()  # fails if there is no store
    with store_lock(config, store) as lock:
        merged = compact(store, config.upkeep.part_mb * 10**6, lock.held)
    return {"store": store, **merged, "seconds": round(time.monotonic() - started, 2)}


class _Writer:
    """Carries out plans: each under its store's lock, on Ray, as a run in MLflow."""

    def __init__(self, config: Config, places: Layout) -> None:
        self._config, self._root, self._pending = config, places.root, pending_of(places)

    def write(self, plans: Sequence[StorePlan]) -> list[dict[str, Any]]:
        """Brings the stores of one plan or two up to date, and returns the result of each."""
        match plans:
            case [FramePlan() as frames, FeaturePlan() as features]:
                return self._write_both(frames, features)
            case _:
                return [self._write(plan) for plan in plans]

    def _write_both(self, frames: FramePlan, features: FeaturePlan) -> list[dict[str, Any]]:
        """Brings both stores up to date; clips are encoded while others are decoded."""
        updates = (frames.update, features.update)
        found = [(update, update.compare_with_collection()) for update in updates]
        done = [
            (update, comparison, inventory)
            for update, comparison in found
            if (inventory := update.inventory_if_done(comparison))
        ]
        if len(done) == len(updates):
            return [_unchanged(*one) for one in done]
        with (
            store_lock(self._config, features.update.uri) as lock,
            ray_session(self._config.cluster),
            features.encoders,
        ):
            features.update.hold(lock.held)

            def between_parts() -> None:
                lock.raise_if_lost()
                features.submit_ready()

            frames.after_part = between_parts
            return [self._write(frames), self._write(features, lock)]

    def _write(self, plan: StorePlan, held: StoreLock | None = None) -> dict[str, Any]:
        """Brings a store up to date under its lock, held already or taken here, if anything is new."""
        started, update = time.monotonic(), plan.update
        before = update.quiet_generation()
        comparison = update.compare_with_collection()
        inventory = update.inventory_if_done(comparison)
        if inventory and not held:
            return _unchanged(update, comparison, inventory)
        with contextlib.nullcontext(held) if held else store_lock(self._config, update.uri) as lock:
            update.hold(lock.held)
            if held or before is None or lock.held.generation != before + 1:
                comparison = update.compare_with_collection()  # another job may have written meanwhile
            update.refuse_lost(comparison)
            if update.has_nothing_left(comparison) and not held:
                result = update.finish(comparison, update.count(), {})
            else:
                with ExtractionRun(self._config, plan.step, self._root, self._pending) as tracked:
                    update.mark_incomplete(comparison)
                    done = self._work(plan, comparison, lock, tracked) if plan.has_work(comparison) else {}
                    inventory = update.retire_and_count()
                    tracked.log(comparison.counts, done, inventory.failures)
                    result = update.finish(comparison, inventory, done)
                    result |= tracked.log_result(result)
            result["seconds"] = round(time.monotonic() - started, 2)
            write_json(join(update.uri, RESULT), result)
        return result

    def _work(
        self, plan: StorePlan, comparison: Comparison, lock: StoreLock, tracked: ExtractionRun
    ) -> dict[str, Any]:
        counts = format_counts(comparison.counts)
        logger.info("%s: %s, %d to do", plan.update.uri, counts, len(comparison.pending))
        with ray_session(self._config.cluster), tracked.system_metrics():
            return plan.work(comparison, lock)


def _unchanged(update: StoreUpdate, comparison: Comparison, inventory: Inventory) -> dict[str, Any]:
    logger.info("%s: %s, nothing to do", update.uri, format_counts(comparison.counts))
    inventory.raise_if_too_many()
    return update.result(comparison, inventory) | {"seconds": 0.0}


def format_counts(counts: Mapping[str, int]) -> str:
    """Formats counts for the log; names retried videos only if there are some."""
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count or name != "retried")


def _preview(config: Config, store: str, manifest: Manifest) -> str:
    from gare.report.contact_sheet import draw_preview

    location = join(store, "preview.png")
    write_atomically(location, draw_preview(store, manifest.rows, config.upkeep.preview))
    logger.info("preview: %s", location)
    return location


if __name__ == "__main__":
    main(run, __doc__, FLAGS, sizes_of_weights)
