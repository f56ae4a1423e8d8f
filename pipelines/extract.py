"""extract: manifest → frame or feature store, in parallel by Ray Data, resumed by id, over bad videos."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import Any

from cluster.beside import Beside
from cluster.command import main
from cluster.pool import run_parts
from cluster.remote import RemoteVideos
from cluster.session import num_cpus, num_gpus, ray_session
from cluster.storage import Layout, absolute, layout
from gare import __version__
from gare.config import Config
from gare.data.extraction import Extractor, part_size, pending_rows
from gare.data.files import delete_tree, exists, join, read_json, write_json
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
#: Between two looks for new frames to encode, each of which reads the ids of all parts.
TAKE_EVERY_S = 10.0


def run(config: Config) -> dict[str, Any]:
    """Brings the stores that ``extract.store`` names up to the manifest; a second run does what is left.

    Raises:
        DataError: for a missing manifest, a store made with other settings, or more failed videos than
            ``extract.max_failed_fraction``; what was extracted stays.
    """
    started = time.monotonic()
    places = layout(config)
    manifest = read_manifest(places.manifest)
    kind, store = config.extract.store, places.frames
    if kind == "frames":
        return _frames(config, places, manifest, started)
    kept = exists(join(store, META)) and read_meta(store).complete
    with ray_session(config.cluster):
        if kind == "features" and not kept:
            result = _features_alone(config, manifest, places)
        else:
            encoding = _Encoding(config, manifest, store, places.features, beside=not kept)
            result = _frames(config, places, manifest, started, encoding)
            result |= {"features": encoding.finish()}
    return result | {"seconds": round(time.monotonic() - started, 2)}


def _frames(
    config: Config,
    places: Layout,
    manifest: Manifest,
    started: float,
    encoding: _Encoding | None = None,
) -> dict[str, Any]:
    """The frame store alone; what it gets is handed to ``encoding`` as it appears."""
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
            _extract(config, store, pending, encoding)
    result = _summary(config, manifest, settings, len(pending), time.monotonic() - started)
    record = join(store, "result.json")
    if not pending and exists(record):
        earlier: dict[str, Any] = read_json(record)
        if all(earlier.get(key) == result[key] for key in result.keys() - {"attempted", "seconds"}):
            return earlier  # nothing was done, so nothing changes
    write_json(record, result)
    return result


def _extract(
    config: Config, store: str, pending: list[dict[str, Any]], encoding: _Encoding | None = None
) -> None:
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
        if encoding:
            encoding.take_some()
    progress.show()


class _Encoding:
    """Brings the feature store up to a frame store, also while that grows."""

    def __init__(
        self, config: Config, manifest: Manifest, frames: str, features: str, *, beside: bool
    ) -> None:
        from gare.model.clip import towers_sha256
        from gare.retrieval.feature_maker import FeatureMaker
        from gare.retrieval.feature_pass import FeaturePass
        from gare.train.start import feature_model

        weights = absolute(config.features.weights or config.train.clip_weights)
        section = config.features.model_copy(update={"weights": weights})
        config = config.model_copy(update={"features": section})
        device = "cuda" if config.cluster.use_gpu else "cpu"
        towers = towers_sha256(feature_model(config).towers)
        self.job = FeaturePass(config, manifest, frames, features, towers, __version__)
        gpus = num_gpus() if config.cluster.use_gpu else 0
        self.workers = section.workers or gpus or (1 if beside else num_cpus())
        self.pool = Beside(
            lambda: FeatureMaker(frames, features, section, feature_model(config).to(device)).write,
            workers=self.workers,
            # Beside decoding, which has all CPUs, an encoder without GPU takes what is over.
            num_cpus=0 if beside or gpus else 1,
            num_gpus=min(1.0, gpus / self.workers),
        )
        self.taken = time.monotonic()

    def take_some(self) -> None:
        """Hands whole parts of what the frame store holds by now to the encoders, every now and then."""
        if time.monotonic() - self.taken > TAKE_EVERY_S:
            self.pool.submit(self.job.parts(self.workers, whole=True))
            self.taken = time.monotonic()

    def take(self) -> None:
        """Encodes all that the frame store holds, and waits for it."""
        self.pool.submit(self.job.parts(self.workers))
        counts: Counter[str] = Counter()
        for part in self.pool.finish():
            counts.update(part)
        if counts:
            logger.info("encoded %d clips, %d failed", counts["written"], counts["failed"])

    def finish(self) -> dict[str, Any]:
        """Encodes what is left; the result."""
        try:
            self.take()
        finally:
            self.pool.close()
        return self.job.finish()


def _features_alone(config: Config, manifest: Manifest, places: Layout) -> dict[str, Any]:
    """Features of videos whose frames are not kept: they pass through a store that is emptied as it goes."""
    passing = join(places.features, "passing")
    settings = frame_settings(config.extract)
    if exists(join(passing, META)) and read_meta(passing).fingerprint != fingerprint(settings):
        delete_tree(passing)
    encoding = _Encoding(config, manifest, passing, places.features, beside=True)
    retry = config.extract.retry_failed

    def encode() -> None:
        encoding.take()
        encoding.job.take_failures()
        delete_tree(passing)

    if exists(join(passing, META)):
        encode()  # what an interrupted run has left there
    pending = pending_rows(manifest, places.features, retry_failed=retry)
    logger.info("%s: %d videos, %d to do", places.features, len(manifest.rows), len(pending))
    size = config.features.videos_per_part * encoding.workers
    for first in range(0, len(pending), size):
        _describe(config, settings, {}, complete=False, store=passing)
        _extract(config, passing, pending[first : first + size])
        encode()
    return encoding.finish() | {"attempted": len(pending)}


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


def _describe(
    config: Config, settings: dict[str, Any], counts: dict[str, int], *, complete: bool, store: str = ""
) -> None:
    store = store or layout(config).frames
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
