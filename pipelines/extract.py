"""extract: manifest → frame store, feature store or both, on Ray, resumed by id, over bad videos.

A run does what is new or changed in the collection, and marks what is gone. Features are made of a frame
store that is there, beside its making, or of frames that are not kept. ``--verify`` checks a store,
``--compact`` merges its small parts.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.beside import Beside
from cluster.command import main
from cluster.pool import run_parts
from cluster.progress import Progress
from cluster.remote import RemoteVideos
from cluster.session import num_cpus, num_gpus, ray_session
from cluster.storage import Layout, absolute, layout
from cluster.tracking.extraction import ExtractionRun
from gare import __version__
from gare.config import Config
from gare.data.collection import Comparison
from gare.data.compact import compact
from gare.data.extraction import Extractor, cut_into_parts
from gare.data.feature_pass import FeaturePass, can_be_made
from gare.data.files import delete_tree, exists, join, write_atomically, write_json
from gare.data.frame_pass import FramePass
from gare.data.lock import StoreLock
from gare.data.manifest import Manifest, read_manifest
from gare.data.sources import LocalVideos
from gare.data.store import META, fingerprint, frame_settings, read_meta
from gare.data.store_pass import StorePass
from gare.data.verify import verify_or_raise

logger = logging.getLogger(__name__)

#: Heap of a decoding actor and its child process; Ray does not see it otherwise.
ACTOR_MEMORY_BYTES = 600 * 1024**2
#: Seconds after which clips that were decoded meanwhile are handed to the encoders.
TAKE_EVERY_S = 5.0

FLAGS = {
    "--verify": ("upkeep.task", "check all that is in the store", "verify"),
    "--compact": ("upkeep.task", "merge small parts of the store", "compact"),
    "--retry-failed": ("extract.retry_failed", "try failed videos again", "true"),
    "--preview": ("upkeep.preview", "clips on a contact sheet, preview.png in the store"),
}
#: Does what a comparison found and says how it went; calls the lock's ``check`` after each part.
Work = Callable[[Comparison, StoreLock], dict[str, Any]]


def run(config: Config) -> dict[str, Any]:
    """Brings the stores up to the manifest, or checks or compacts them, as ``upkeep.task`` says.

    Raises:
        DataError: for a missing manifest, a store made with other settings, faults that a check finds, or
            more failed or vanished videos than ``extract.max_failed_fraction``; what was extracted stays.
        GareError: where MLflow cannot be reached, before anything is extracted.
    """
    places, kind = layout(config), config.extract.store
    manifest = read_manifest(places.manifest)
    is_kept = kind != "features" or _is_complete(places.frames)
    jobs: list[StorePass] = []
    if is_kept:
        jobs = [_frame_pass(config, manifest, places.frames)]
    if kind == "frames":
        encoding = None
    else:
        encoding = _Encoding(config, manifest, places, is_kept=is_kept, is_beside=kind == "both")
        jobs = [*(jobs if kind == "both" else []), encoding.job]
    if config.upkeep.task != "write":
        results = [_look_after(config, job) for job in jobs]
    elif encoding is None:
        results = [_write(config, places, jobs[0], "extract", _decoding(config, places.frames))]
    elif kind == "both":
        results = _write_both(config, places, jobs[0], encoding)
    else:
        results = [_write(config, places, encoding.job, "extract-features", encoding.work)]
    result = results[0] | ({"features": results[1]} if len(results) > 1 else {})
    if config.upkeep.preview and config.upkeep.task == "write":
        result["preview"] = _preview(config, places.frames, manifest)
    return result


def _is_complete(store: str) -> bool:
    return exists(join(store, META)) and read_meta(store).complete


def _videos(config: Config) -> RemoteVideos:
    return RemoteVideos(config.sources, LocalVideos())


def _frame_pass(config: Config, manifest: Manifest, store: str) -> FramePass:
    return FramePass(config, manifest, store, _videos(config).stat, __version__)


def _look_after(config: Config, job: StorePass) -> dict[str, Any]:
    """Checks or compacts a store."""
    started, store = time.monotonic(), job.uri
    read_meta(store)  # there is one
    if config.upkeep.task == "verify":
        return verify_or_raise(store, job.schema, {row.video_id for row in job.manifest.rows})
    with _lock(config, store) as lock:
        merged = compact(store, config.upkeep.part_mb * 10**6, lock.check)
    return {"store": store, **merged, "seconds": round(time.monotonic() - started, 2)}


def _write_both(
    config: Config, places: Layout, frames: StorePass, encoding: _Encoding
) -> list[dict[str, Any]]:
    """Brings both stores up to the collection; clips are encoded while others are decoded."""
    jobs = (frames, encoding.job)
    looks = [job.look() for job in jobs]
    done = [job.inventory_if_done(look) for job, look in zip(jobs, looks, strict=True)]
    if all(done):
        return [_unchanged(*one) for one in zip(jobs, looks, done, strict=True)]
    with (
        _lock(config, encoding.job.uri) as lock,
        ray_session(config.cluster),
        contextlib.closing(encoding),
    ):

        def between_parts() -> None:
            lock.check()
            encoding.take_some()

        decoding = _decoding(config, frames.uri, between_parts)
        first = _write(config, places, frames, "extract", decoding)
        return [first, _write(config, places, encoding.job, "extract-features", encoding.work, lock)]


def _write(
    config: Config, places: Layout, job: StorePass, step: str, work: Work, held: StoreLock | None = None
) -> dict[str, Any]:
    """Brings a store up to the collection, whose lock may be held; nothing changes where nothing is to do."""
    started = time.monotonic()
    comparison = job.look()
    inventory = job.inventory_if_done(comparison)
    if inventory and not held:
        return _unchanged(job, comparison, inventory)
    with contextlib.nullcontext(held) if held else _lock(config, job.uri) as lock:
        comparison = job.look()  # another job may have written while this one waited
        job.refuse_lost(comparison)
        if job.is_settled(comparison) and not held:
            result = job.finish(comparison, job.count(), {})
        else:
            with ExtractionRun(config, places, step) as tracked:
                job.begin(comparison)
                done = work(comparison, lock)
                inventory = job.settle()
                tracked.log(comparison.counts, done, inventory.failures)
                result = job.finish(comparison, inventory, done)
                result |= tracked.log_result(result)
        result["seconds"] = round(time.monotonic() - started, 2)
        write_json(join(job.uri, "result.json"), result)
    return result


def _unchanged(job: StorePass, comparison: Comparison, inventory: Any) -> dict[str, Any]:
    logger.info("%s: %s, nothing to do", job.uri, _words(comparison.counts))
    inventory.raise_if_too_many()
    return job.result(comparison, inventory) | {"seconds": 0.0}


def _lock(config: Config, store: str) -> StoreLock:
    return StoreLock(store, when_locked=config.upkeep.when_locked, stale_s=config.upkeep.stale_s)


def _words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _decoding(config: Config, store: str, between_parts: Callable[[], None] = lambda: None) -> Work:
    """Extracts what is pending into a frame store."""

    def work(comparison: Comparison, lock: StoreLock) -> dict[str, Any]:
        if not comparison.pending:
            return {}

        def check() -> None:
            lock.check()
            between_parts()

        logger.info("%s: %s, %d to do", store, _words(comparison.counts), len(comparison.pending))
        with ray_session(config.cluster):
            progress = Progress(len(comparison.pending), "extracted")
            _extract(config, store, comparison.pending, progress, check)
            return _told(progress)

    return work


def _extract(
    config: Config,
    store: str,
    rows: Sequence[Mapping[str, Any]],
    progress: Progress,
    check: Callable[[], None],
) -> None:
    extract, sources, name = config.extract, config.sources, uuid.uuid4().hex
    workers = min(extract.workers or num_cpus(), len(rows))
    parts = cut_into_parts(rows, workers, extract.videos_per_part)
    for done in run_parts(
        lambda: Extractor(store, extract, RemoteVideos(sources, LocalVideos()), name).write,
        parts,
        workers=workers,
        memory_bytes=ACTOR_MEMORY_BYTES,
    ):
        progress.add(done)
        check()


def _told(progress: Progress) -> dict[str, Any]:
    """Counts, rates, seconds by stage and the slowest videos."""
    progress.show()
    for video_id, seconds in progress.slowest:
        logger.info("slowest: %6.2f s %s", seconds, video_id)
    return progress.report()


class _Encoding:
    """Brings the feature store up to a frame store, also while that grows, or to frames that are not kept.

    Args:
        config: of the run.
        manifest: what the store should hold.
        places: where the stores are.
        is_kept: whether there is a frame store; else the frames pass through one that is emptied as it goes.
        is_beside: whether other frames are decoded at the same time.
    """

    def __init__(
        self, config: Config, manifest: Manifest, places: Layout, *, is_kept: bool, is_beside: bool
    ) -> None:
        from gare.model.clip import towers_sha256
        from gare.train.start import feature_model

        weights = absolute(config.features.weights or config.train.clip_weights)
        section = config.features.model_copy(update={"weights": weights})
        self.config = config.model_copy(update={"features": section})
        self.manifest, self.is_kept, self.shares_cpus = manifest, is_kept, is_beside or not is_kept
        self.frames_uri = places.frames if is_kept else join(places.features, "passing")
        stat = None if is_kept else _videos(config).stat
        towers = towers_sha256(feature_model(self.config).towers)
        self.job = FeaturePass(
            self.config, manifest, self.frames_uri, places.features, towers, __version__, stat
        )
        self.progress: Progress | None = None
        self.taken = time.monotonic()

    def _start(self) -> Progress:
        """The pool, with the first clips."""
        if self.progress:
            return self.progress
        from gare.retrieval.feature_maker import FeatureMaker
        from gare.train.start import feature_model

        config, frames, features = self.config, self.frames_uri, self.job.uri
        device, name = "cuda" if config.cluster.use_gpu else "cpu", uuid.uuid4().hex
        gpus = num_gpus() if config.cluster.use_gpu else 0
        self.workers = config.features.workers or gpus or (1 if self.shares_cpus else num_cpus())
        self.pool = Beside(
            lambda: (
                FeatureMaker(frames, features, config.features, feature_model(config).to(device), name).write
            ),
            workers=self.workers,
            # Beside decoding, which has all CPUs, an encoder without GPU takes what is over.
            num_cpus=0 if self.shares_cpus or gpus else 1,
            num_gpus=min(1.0, gpus / self.workers),
        )
        self.progress = Progress(0, "encoded")
        return self.progress

    def take_some(self) -> None:
        """Hands whole parts of what the frame store holds by now to the encoders, every now and then."""
        if time.monotonic() - self.taken > TAKE_EVERY_S:
            self._submit(whole=True)
            self.taken = time.monotonic()

    def _submit(self, *, whole: bool = False) -> Progress:
        progress = self._start()
        parts = self.job.parts(self.workers, whole=whole)
        progress.total += sum(map(len, parts))
        self.pool.submit(parts)
        return progress

    def take(self, check: Callable[[], None]) -> Progress:
        """Encodes all that the frame store holds, and waits for it."""
        progress = self._submit()
        for done in self.pool.finish():
            progress.add(done)
            check()
        self.job.all_made()
        return progress

    def work(self, comparison: Comparison, lock: StoreLock) -> dict[str, Any]:
        """Encodes what is left."""
        logger.info("%s: %s, %d to do", self.job.uri, _words(comparison.counts), len(comparison.pending))
        with ray_session(self.config.cluster), contextlib.closing(self):
            if not self.is_kept:
                return self._work_alone(lock)
            progress = self.take(lock.check)
            return _told(progress) | {"attempted": progress.total}

    def _work_alone(self, lock: StoreLock) -> dict[str, Any]:
        passing = self.frames_uri

        def encode() -> None:
            self.take(lock.check)
            self.job.take_failures()
            delete_tree(passing)

        frames = frame_settings(self.config.extract)
        if exists(join(passing, META)) and read_meta(passing).fingerprint != fingerprint(frames):
            delete_tree(passing)
        encode()  # captions that have changed, and what an interrupted run has left there
        pending = [row for row in self.job.look().pending if not can_be_made(row)]
        progress = Progress(len(pending), "extracted")
        size = self.config.features.videos_per_part * self.workers
        for first in range(0, len(pending), size):
            _frame_pass(self.config, self.manifest, passing).begin(Comparison((), {}, {}, ()))
            _extract(self.config, passing, pending[first : first + size], progress, lock.check)
            encode()
        return _told(progress)

    def close(self) -> None:
        """Ends the encoders."""
        if self.progress:
            self.pool.close()


def _preview(config: Config, store: str, manifest: Manifest) -> str:
    from gare.retrieval.preview import draw_preview

    location = join(store, "preview.png")
    write_atomically(location, draw_preview(store, manifest.rows, config.upkeep.preview))
    logger.info("preview: %s", location)
    return location


if __name__ == "__main__":
    main(run, __doc__, FLAGS)
