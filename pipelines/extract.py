"""extract: manifest → frame store, feature store or both, on Ray, resumed by id, over bad videos.

A run does what is new or changed in the collection, and marks what is gone. Features are made of a frame
store that is there, beside its making, or of frames that are not kept. ``--verify`` checks a store,
``--compact`` merges its small parts.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from cluster.runtime.signals import take_signals

    take_signals()

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cluster.command import Flags, main
from cluster.layout import Layout, layout
from cluster.runtime.session import ray_session
from cluster.status.progress import Progress
from cluster.tracking.extraction import ExtractionRun
from gare.config import Config
from gare.data.manifest import Manifest, read_manifest
from gare.data.store.compact import compact
from gare.data.store.contents import META, read_meta
from gare.data.store.verify import verify_or_raise
from gare.extract.comparison import Comparison
from gare.extract.feature_update import without_frames
from gare.extract.inventory import Inventory
from gare.extract.update import StoreUpdate
from gare.storage.files import exists, join, write_atomically, write_json
from gare.storage.lock import StoreLock
from gare.storage.run_folder import RESULT
from pipelines.extracting.stores import (
    Encoding,
    decode_rows,
    find_outdated,
    format_counts,
    frame_update,
    log_and_report,
)
from pipelines.locks import store_lock
from pipelines.sizes import sizes_of_weights
from pipelines.stored_outbox import pending_of

logger = logging.getLogger(__name__)

FLAGS: Flags = {
    "--verify": ("upkeep.task", "check all that is in the store", "verify"),
    "--compact": ("upkeep.task", "merge small parts of the store", "compact"),
    "--retry-failed": (
        "extract.retry_failed",
        "try all failed videos again, also those whose file is at fault",
        "true",
    ),
    "--retry-traits": (
        "extract.retry_traits",
        "decode videos again that an earlier version may have read wrongly, see --verify",
        "true",
    ),
    "--preview": ("upkeep.preview", "clips on a contact sheet, preview.png in the store"),
}
#: Does the work of a comparison and reports on it; calls the lock's ``raise_if_lost`` after each part.
Work = Callable[[Comparison, StoreLock, ExtractionRun], dict[str, Any]]


def run(config: Config) -> dict[str, Any]:
    """Brings the stores up to date with the manifest, or checks or compacts them, by ``upkeep.task``.

    Raises:
        DataError: for a missing manifest, a store made with other settings, faults found by a check, or more
            failed or vanished videos than ``extract.max_failed_fraction``; extracted clips stay.
        GareError: if MLflow cannot be reached, before anything is extracted.
    """
    places, kind = layout(config), config.extract.store
    manifest = read_manifest(places.manifest)
    is_kept = kind != "features" or _is_complete(places.frames)
    jobs: list[StoreUpdate] = []
    if is_kept:
        jobs = [frame_update(config, manifest, places.frames)]
    if kind == "frames":
        encoding = None
    else:
        encoding = Encoding(config, manifest, places, is_kept=is_kept, is_beside=kind == "both")
        jobs = [*(jobs if kind == "both" else []), encoding.job]
    if config.extract.retry_traits and config.upkeep.task == "write":
        for job in jobs:
            job.again = find_outdated(config, job).keys()
    if config.upkeep.task != "write":
        results = [_look_after(config, job) for job in jobs]
    elif encoding is None:
        results = [_write(config, places, jobs[0], "extract", _decoding(config, places.frames))]
    elif kind == "both":
        results = _write_both(config, places, jobs[0], encoding)
    else:
        _warn_of_missing_frames(places.frames, manifest, is_kept=is_kept)
        results = [_write(config, places, encoding.job, "extract-features", encoding.work)]
    result = results[0] | ({"features": results[1]} if len(results) > 1 else {})
    if config.upkeep.preview and config.upkeep.task == "write":
        result["preview"] = _preview(config, places.frames, manifest)
    return result


def _is_complete(store: str) -> bool:
    return exists(join(store, META)) and read_meta(store).complete


def _warn_of_missing_frames(frames: str, manifest: Manifest, *, is_kept: bool) -> None:
    """Logs what happens to clips that the frame store lacks."""
    if not exists(join(frames, META)) or not (missing := without_frames(frames, manifest)):
        return
    effect = (
        "no features are made of these; extract.store=both decodes them too"
        if is_kept
        else "its run did not go through, so all are decoded again for the features alone; "
        "extract.store=both finishes it instead"
    )
    counts = len(missing), len(manifest.rows)
    logger.warning("%s lacks %d of %d videos, %r the first of them: %s", frames, *counts, missing[0], effect)


def _look_after(config: Config, job: StoreUpdate) -> dict[str, Any]:
    """Checks or compacts a store."""
    started, store = time.monotonic(), job.uri
    read_meta(store)  # fails if there is no store
    if config.upkeep.task == "verify":
        found = verify_or_raise(store, job.schema, {row.video_id for row in job.manifest.rows})
        return found | {"mended": _named(find_outdated(config, job))}
    with store_lock(config, store) as lock:
        merged = compact(store, config.upkeep.part_mb * 10**6, lock.held)
    return {"store": store, **merged, "seconds": round(time.monotonic() - started, 2)}


def _named(traits: dict[str, str]) -> dict[str, str]:
    """Logs the clips with their traits, and returns them."""
    for video_id, trait in sorted(traits.items()):
        logger.warning("%s: an earlier version may have taken other frames: %s", video_id, trait)
    if traits:
        logger.warning(
            "%d such clips; --retry-traits (extract.retry_traits=true) makes them again", len(traits)
        )
    return traits


def _write_both(
    config: Config, places: Layout, frames: StoreUpdate, encoding: Encoding
) -> list[dict[str, Any]]:
    """Brings both stores up to date; clips are encoded while others are decoded."""
    jobs = (frames, encoding.job)
    comparisons = [job.compare_with_collection() for job in jobs]
    done = [job.inventory_if_done(comparison) for job, comparison in zip(jobs, comparisons, strict=True)]
    whole = [inventory for inventory in done if inventory]
    if len(whole) == len(jobs):
        return [_unchanged(*one) for one in zip(jobs, comparisons, whole, strict=True)]
    with (
        store_lock(config, encoding.job.uri) as lock,
        ray_session(config.cluster),
        contextlib.closing(encoding),
    ):
        encoding.job.hold(lock.held)

        def between_parts() -> None:
            lock.raise_if_lost()
            encoding.submit_ready()

        decoding = _decoding(config, frames.uri, between_parts)
        first = _write(config, places, frames, "extract", decoding)
        return [first, _write(config, places, encoding.job, "extract-features", encoding.work, lock)]


def _write(
    config: Config, places: Layout, job: StoreUpdate, step: str, work: Work, held: StoreLock | None = None
) -> dict[str, Any]:
    """Brings a store up to date, under a lock that may be held already; writes nothing if nothing changed."""
    started = time.monotonic()
    comparison = job.compare_with_collection()
    inventory = job.inventory_if_done(comparison)
    if inventory and not held:
        return _unchanged(job, comparison, inventory)
    with contextlib.nullcontext(held) if held else store_lock(config, job.uri) as lock:
        job.hold(lock.held)
        comparison = job.compare_with_collection()  # again: another job may have written during the wait
        job.refuse_lost(comparison)
        if job.has_nothing_left(comparison) and not held:
            result = job.finish(comparison, job.count(), {})
        else:
            with ExtractionRun(config, step, places.root, pending_of(places)) as tracked:
                job.mark_incomplete(comparison)
                done = work(comparison, lock, tracked)
                inventory = job.retire_and_count()
                tracked.log(comparison.counts, done, inventory.failures)
                result = job.finish(comparison, inventory, done)
                result |= tracked.log_result(result)
        result["seconds"] = round(time.monotonic() - started, 2)
        write_json(join(job.uri, RESULT), result)
    return result


def _unchanged(job: StoreUpdate, comparison: Comparison, inventory: Inventory) -> dict[str, Any]:
    logger.info("%s: %s, nothing to do", job.uri, format_counts(comparison.counts))
    inventory.raise_if_too_many()
    return job.result(comparison, inventory) | {"seconds": 0.0}


def _decoding(config: Config, store: str, between_parts: Callable[[], None] = lambda: None) -> Work:
    """Returns the work that extracts pending clips into a frame store."""

    def work(comparison: Comparison, lock: StoreLock, tracked: ExtractionRun) -> dict[str, Any]:
        if not comparison.pending:
            return {}

        def check() -> None:
            lock.raise_if_lost()
            between_parts()

        logger.info("%s: %s, %d to do", store, format_counts(comparison.counts), len(comparison.pending))
        with ray_session(config.cluster), tracked.system_metrics():
            progress = Progress(len(comparison.pending), "extracted")
            decode_rows(config, store, comparison.pending, progress, replace(lock.held, raise_if_lost=check))
            return log_and_report(progress)

    return work


def _preview(config: Config, store: str, manifest: Manifest) -> str:
    from gare.report.contact_sheet import draw_preview

    location = join(store, "preview.png")
    write_atomically(location, draw_preview(store, manifest.rows, config.upkeep.preview))
    logger.info("preview: %s", location)
    return location


if __name__ == "__main__":
    main(run, __doc__, FLAGS, sizes_of_weights)
