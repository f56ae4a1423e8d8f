"""extract: manifest → frame store, decoded in parallel by Ray Data, resumed by id, over bad videos.

A run does what is new or changed in the collection, and marks what is gone. ``--verify`` checks a store,
``--compact`` merges its small parts.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any

from cluster.command import main
from cluster.pool import run_parts
from cluster.progress import Progress
from cluster.remote import RemoteVideos
from cluster.session import num_cpus, ray_session
from cluster.storage import Layout, layout
from cluster.tracking.extraction import ExtractionRun
from gare import __version__
from gare.config import Config
from gare.data.collection import Comparison, compare
from gare.data.compact import compact
from gare.data.extraction import Extractor, cut_into_parts
from gare.data.files import exists, join, write_atomically, write_json
from gare.data.inventory import Inventory, take_inventory
from gare.data.lock import StoreLock
from gare.data.manifest import Manifest, read_manifest
from gare.data.sources import LocalVideos
from gare.data.store import (
    META,
    StoreMeta,
    check_settings,
    fingerprint,
    frame_schema,
    frame_settings,
    read_meta,
    read_retired,
    write_meta,
    write_retired,
)
from gare.data.verify import verify_or_raise
from gare.errors import DataError

logger = logging.getLogger(__name__)

#: Heap of a decoding actor and its child process; Ray does not see it otherwise.
ACTOR_MEMORY_BYTES = 600 * 1024**2

FLAGS = {
    "--verify": ("upkeep.task", "check all that is in the store", "verify"),
    "--compact": ("upkeep.task", "merge small parts of the store", "compact"),
    "--retry-failed": ("extract.retry_failed", "try failed videos again", "true"),
    "--preview": ("upkeep.preview", "clips on a contact sheet, preview.png in the store"),
}


def run(config: Config) -> dict[str, Any]:
    """Brings the frame store up to the manifest, or checks or compacts it, as ``upkeep.task`` says.

    Raises:
        DataError: for a missing manifest, a store made with other settings, faults that a check finds, or
            more failed or vanished videos than ``extract.max_failed_fraction``; what was extracted stays.
        GareError: where MLflow cannot be reached, before anything is extracted.
    """
    started = time.monotonic()
    places = layout(config)
    store = places.frames
    settings = frame_settings(config.extract)
    if exists(join(store, META)) or config.upkeep.task != "write":
        check_settings(store, read_meta(store), settings)
    manifest = read_manifest(places.manifest)
    if config.upkeep.task == "verify":
        wanted = {row.video_id for row in manifest.rows}
        return verify_or_raise(store, frame_schema(config.extract), wanted)
    if config.upkeep.task == "compact":
        with _lock(config, store) as lock:
            merged = compact(store, config.upkeep.part_mb * 10**6, lock.check)
        return {"store": store, **merged, "seconds": round(time.monotonic() - started, 2)}
    result, is_new = _write(config, places, manifest)
    result["seconds"] = round(time.monotonic() - started, 2)
    if is_new:
        write_json(join(store, "result.json"), result)
    if config.upkeep.preview:
        result["preview"] = _preview(config, store, manifest)
    return result


def _write(config: Config, places: Layout, manifest: Manifest) -> tuple[dict[str, Any], bool]:
    """The result, and whether anything in the store has changed."""
    store, source = places.frames, RemoteVideos(config.sources, LocalVideos())

    def look() -> Comparison:
        versions = source.stat([row.uri for row in manifest.rows])
        return compare(store, manifest.rows, versions, retry_failed=config.extract.retry_failed)

    def count() -> Inventory:
        return take_inventory(store, manifest.rows, config.extract.max_failed_fraction)

    comparison = look()
    if not comparison.pending and comparison.retired == read_retired(store) and exists(join(store, META)):
        meta, inventory = read_meta(store), count()
        if (meta.counts, meta.complete) == (inventory.counts, inventory.is_complete):
            logger.info("%s: %s, nothing to do", store, _words(comparison.counts))
            inventory.raise_if_too_many()
            return _result(config, store, comparison, inventory), False
    with _lock(config, store) as lock:
        comparison = look()  # another job may have written while this one waited
        _refuse_lost(config, store, comparison, len(manifest.rows))
        if not comparison.pending and comparison.retired == read_retired(store):
            return _finish(config, store, comparison, count(), {}), True
        _describe(config, {}, complete=False)
        with ExtractionRun(config, places, "extract") as tracked:
            write_retired(store, comparison.retired)
            done = _extract(config, store, comparison, lock) if comparison.pending else {}
            # Of what a job wrote that took itself for the only one, too, each clip counts once.
            write_retired(store, look().retired)
            inventory = count()
            tracked.log(comparison.counts, done, inventory.failures)
            result = _finish(config, store, comparison, inventory, done)
            return result | tracked.log_result(result), True


def _lock(config: Config, store: str) -> StoreLock:
    return StoreLock(store, when_locked=config.upkeep.when_locked, stale_s=config.upkeep.stale_s)


def _refuse_lost(config: Config, store: str, comparison: Comparison, total: int) -> None:
    if len(comparison.lost) > config.extract.max_failed_fraction * total:
        raise DataError(
            f"{len(comparison.lost)} videos of the manifest that were there are gone, "
            f"{comparison.lost[0]!r} the first of them; nothing was changed",
            where=store,
            accepted="is their folder mounted? extract.max_failed_fraction="
            f"{config.extract.max_failed_fraction:g} of them may be gone",
        )


def _extract(config: Config, store: str, comparison: Comparison, lock: StoreLock) -> dict[str, Any]:
    """Extracts what is pending; returns counts, rates, seconds by stage and the slowest videos."""
    pending, extract, sources = comparison.pending, config.extract, config.sources
    name = uuid.uuid4().hex
    logger.info("%s: %s, %d to do", store, _words(comparison.counts), len(pending))
    with ray_session(config.cluster):
        workers = min(extract.workers or num_cpus(), len(pending))
        parts = cut_into_parts(pending, workers, extract.videos_per_part)
        progress = Progress(len(pending), "extracted")
        for done in run_parts(
            lambda: Extractor(store, extract, RemoteVideos(sources, LocalVideos()), name).write,
            parts,
            workers=workers,
            memory_bytes=ACTOR_MEMORY_BYTES,
        ):
            progress.add(done)
            lock.check()
        progress.show()
    for video_id, seconds in progress.slowest:
        logger.info("slowest: %6.2f s %s", seconds, video_id)
    return progress.report()


def _words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _describe(config: Config, counts: dict[str, int], *, complete: bool) -> None:
    store = layout(config).frames
    settings = frame_settings(config.extract)
    meta = StoreMeta(
        kind="frames",
        fingerprint=fingerprint(settings),
        settings=settings,
        counts=counts,
        complete=complete,
        config=config.to_yaml(),
        code_version=__version__,
    )
    write_meta(store, meta)


def _finish(
    config: Config, store: str, comparison: Comparison, inventory: Inventory, done: Mapping[str, Any]
) -> dict[str, Any]:
    _describe(config, inventory.counts, complete=inventory.is_complete)
    for reason, count in inventory.reasons.most_common():
        logger.warning("failed: %d × %s", count, reason)
    inventory.raise_if_too_many()
    return _result(config, store, comparison, inventory) | dict(done)


def _result(config: Config, store: str, comparison: Comparison, inventory: Inventory) -> dict[str, Any]:
    return {
        "store": store,
        "fingerprint": fingerprint(frame_settings(config.extract)),
        "videos": inventory.num_wanted_stored,
        "attempted": len(comparison.pending),
        **comparison.counts,
        "failed": {key: row["message"] for key, row in sorted(inventory.failures.items())},
    }


def _preview(config: Config, store: str, manifest: Manifest) -> str:
    from gare.retrieval.preview import draw_preview

    location = join(store, "preview.png")
    write_atomically(location, draw_preview(store, manifest.rows, config.upkeep.preview))
    logger.info("preview: %s", location)
    return location


if __name__ == "__main__":
    main(run, __doc__, FLAGS)
