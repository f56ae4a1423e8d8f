"""extract: manifest → frame store, decoded in parallel by Ray Data, resumed by id, over bad videos."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import Any

from cluster.command import main
from cluster.pool import run_parts
from cluster.remote import RemoteVideos
from cluster.session import num_cpus, ray_session
from cluster.storage import layout
from gare import __version__
from gare.config import Config
from gare.data.extraction import Extractor, part_size, pending_rows
from gare.data.files import exists, join, read_json, write_json
from gare.data.manifest import Manifest, read_manifest
from gare.data.sources import LocalVideos
from gare.data.store import (
    META,
    StoreMeta,
    check_settings,
    fingerprint,
    frame_settings,
    ids_in_parts,
    part_files,
    read_failures,
    read_meta,
    write_meta,
)
from gare.errors import DataError

logger = logging.getLogger(__name__)

#: Heap of a decoding actor and its child process; Ray does not see it otherwise.
ACTOR_MEMORY_BYTES = 600 * 1024**2
PROGRESS_EVERY_S = 5.0


def run(config: Config) -> dict[str, Any]:
    """Brings the frame store up to the manifest; a second run does only what is left.

    Raises:
        DataError: for a missing manifest, a store made with other settings, or more failed videos than
            ``extract.max_failed_fraction``; what was extracted stays.
    """
    started = time.monotonic()
    places = layout(config)
    manifest = read_manifest(places.manifest)
    store = places.frames
    settings = frame_settings(config.extract)
    if exists(join(store, META)):
        check_settings(store, read_meta(store), settings)
    pending = pending_rows(manifest, store, retry_failed=config.extract.retry_failed)
    done = len(manifest.rows) - len(pending)
    logger.info("%s: %d videos, %d done before, %d to do", store, len(manifest.rows), done, len(pending))
    if pending or not exists(join(store, META)):
        _describe(config, settings, {}, complete=False)
    if pending:
        with ray_session(config.cluster):
            _extract(config, store, pending)
    result = _summary(config, manifest, settings, len(pending), time.monotonic() - started)
    record = join(store, "result.json")
    if not pending and exists(record):
        earlier: dict[str, Any] = read_json(record)
        if all(earlier.get(key) == result[key] for key in result.keys() - {"attempted", "seconds"}):
            return earlier  # nothing was done, so nothing changes
    write_json(record, result)
    return result


def _extract(config: Config, store: str, pending: list[dict[str, Any]]) -> None:
    workers = min(config.extract.workers or num_cpus(), len(pending))
    size = part_size(len(pending), workers, config.extract.videos_per_part)
    extract, sources = config.extract, config.sources
    parts = [pending[first : first + size] for first in range(0, len(pending), size)]
    progress = _Progress(len(pending))
    for counts in run_parts(
        lambda: Extractor(store, extract, RemoteVideos(sources, LocalVideos())).write,
        parts,
        workers=workers,
        memory_bytes=ACTOR_MEMORY_BYTES,
    ):
        progress.add(counts)
    progress.show()


class _Progress:
    """One line every few seconds: done, failed, left, rates, time left."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.counts: Counter[str] = Counter()
        self.started = self.shown = time.monotonic()

    def add(self, counts: dict[str, int]) -> None:
        self.counts.update(counts)
        if time.monotonic() - self.shown > PROGRESS_EVERY_S:
            self.show()

    def show(self) -> None:
        self.shown = time.monotonic()
        seconds = max(self.shown - self.started, 1e-3)
        finished = self.counts["written"] + self.counts["failed"]
        left = self.total - finished
        logger.info(
            "extracted %d, failed %d, left %d; %.1f videos/s, %.0f frames/s, %.0f s left",
            self.counts["written"],
            self.counts["failed"],
            left,
            finished / seconds,
            self.counts["frames"] / seconds,
            left * seconds / max(finished, 1),
        )


def _describe(config: Config, settings: dict[str, Any], counts: dict[str, int], *, complete: bool) -> None:
    store = layout(config).frames
    if exists(join(store, META)):
        known = read_meta(store)
        if (known.fingerprint, known.counts, known.complete) == (fingerprint(settings), counts, complete):
            return  # as it stands; the same job again changes nothing
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


def _summary(
    config: Config, manifest: Manifest, settings: dict[str, Any], attempted: int, seconds: float
) -> dict[str, Any]:
    store = layout(config).frames
    wanted = {row.video_id for row in manifest.rows}
    stored = ids_in_parts(store, "data")
    failures = {key: row for key, row in read_failures(store, stored).items() if key in wanted}
    missing = wanted - stored.keys() - failures.keys()
    reasons = Counter(row["message"].split(":")[0] for row in failures.values())
    for reason, count in reasons.most_common():
        logger.warning("failed: %d × %s", count, reason)
    too_many = len(failures) > config.extract.max_failed_fraction * len(wanted)
    counts = {"videos": len(stored), "failures": len(failures), "parts": len(part_files(store, "data"))}
    _describe(config, settings, counts, complete=not missing and not too_many)
    if too_many:
        worst = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(5))
        raise DataError(
            f"{len(failures)} of {len(wanted)} videos failed: {worst}",
            where=join(store, "failures"),
            accepted=f"at most extract.max_failed_fraction={config.extract.max_failed_fraction:g} of them; "
            "extract.retry_failed=true tries them again",
        )
    return {
        "store": store,
        "fingerprint": fingerprint(settings),
        "videos": len(wanted & stored.keys()),
        "attempted": attempted,
        "failed": {key: row["message"] for key, row in sorted(failures.items())},
        "seconds": round(seconds, 2),
    }


if __name__ == "__main__":
    main(run, __doc__)
