"""Extraction on Ray: decodes clips into a frame store and encodes them into a feature store."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from cluster.layout import Layout, absolute
from cluster.runtime.actors import ActorPool, Work
from cluster.runtime.parts import run_parts
from cluster.runtime.resources import extraction_cpus, usable_gpus, wants_gpus
from cluster.runtime.session import ray_session
from cluster.sources.fetch import RemoteVideos
from cluster.status.progress import Progress
from cluster.tracking.extraction import ExtractionRun
from gare import __version__
from gare.config import Config
from gare.data.manifest import Manifest
from gare.data.store.contents import META, fingerprint, frame_settings, read_meta
from gare.data.videos import LocalVideos
from gare.extract.comparison import Comparison
from gare.extract.feature_update import FeatureStoreUpdate, has_frames_or_features
from gare.extract.frame_writer import Extractor, OutdatedFrameFinder, cut_into_parts
from gare.extract.update import FrameStoreUpdate, StoreUpdate
from gare.storage.files import delete_tree, exists, join
from gare.storage.generations import HeldStore
from gare.storage.lock import StoreLock

logger = logging.getLogger(__name__)

#: Heap of a decoding actor and its child process, which Ray cannot see.
ACTOR_MEMORY_BYTES = 600 * 1024**2
#: Seconds after which newly decoded clips are handed to the encoders.
TAKE_EVERY_S = 5.0


def videos_of(config: Config) -> RemoteVideos:
    """Returns the source of the videos, local or remote."""
    return RemoteVideos(config.sources, LocalVideos())


def frame_update(config: Config, manifest: Manifest, store: str) -> FrameStoreUpdate:
    """Returns the update that brings a frame store up to date with the videos."""
    return FrameStoreUpdate(config, manifest, store, videos_of(config).stat, __version__)


def format_counts(counts: Mapping[str, int]) -> str:
    """Formats counts for the log; names retried videos only if there are some."""
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count or name != "retried")


def decode_rows(
    config: Config,
    store: str,
    rows: Sequence[Mapping[str, Any]],
    progress: Progress,
    held: HeldStore,
) -> None:
    """Decodes pending rows of a comparison into a frame store.

    Args:
        config: configuration of the run.
        store: location of the frame store.
        rows: rows to decode.
        progress: gets the result of each part.
        held: held lock of the store; its ``raise_if_lost`` is called after each part, and ends the work.
    """
    extract, sources, name = config.extract, config.sources, uuid.uuid4().hex
    generation = held.generation
    results = _run_decoders(
        lambda: Extractor(store, extract, RemoteVideos(sources, LocalVideos()), name, generation).write,
        rows,
        config,
    )
    with contextlib.closing(results):
        for done in results:
            progress.add(done)
            held.raise_if_lost()


def _run_decoders(
    load: Callable[[], Work], rows: Sequence[Mapping[str, Any]], config: Config
) -> Generator[Any, None, None]:
    """Runs work that reads videos on as many actors as there are CPUs, and yields the result of each part.

    Args:
        load: as of ``run_parts``.
        rows: rows with ``source_bytes``, of which parts are cut.
        config: configuration of the run.
    """
    extract = config.extract
    workers = min(extract.workers or extraction_cpus(config.cluster), len(rows))
    parts = cut_into_parts(rows, workers, extract.videos_per_part)
    return run_parts(load, parts, workers=workers, memory_bytes=ACTOR_MEMORY_BYTES)


def find_outdated(config: Config, job: StoreUpdate) -> dict[str, str]:
    """Finds unchanged clips that an earlier version may have decoded wrongly.

    Returns:
        The trait of each file that gave it away, by clip id.
    """
    rows = job.decoded_before()
    if not rows:
        return {}
    extract, sources = config.extract, config.sources
    logger.info("%s: %d of its clips were decoded by an earlier version", job.uri, len(rows))
    progress, traits = Progress(len(rows), "checked"), dict[str, str]()
    with ray_session(config.cluster):
        results = _run_decoders(
            lambda: OutdatedFrameFinder(extract, RemoteVideos(sources, LocalVideos())).find, rows, config
        )
        with contextlib.closing(results):
            for found in results:
                progress.add(found)
                traits |= found["traits"]
                for video_id, reason in found["unknown"].items():
                    logger.warning("%s: cannot check its file: %s", video_id, reason)
    progress.show()
    return traits


def log_and_report(progress: Progress) -> dict[str, Any]:
    """Logs progress and the slowest videos; returns these with counts, rates and seconds by stage."""
    progress.show()
    for video_id, seconds in progress.slowest:
        logger.info("slowest: %6.2f s %s", seconds, video_id)
    return progress.report()


class Encoding:
    """Update of a feature store from a frame store, which may be growing, or from frames that are not kept.

    Args:
        config: configuration of the run.
        manifest: what the store should hold.
        places: locations of the stores.
        is_kept: True if there is a frame store; else frames pass through one that is emptied on the way.
        is_beside: True if other frames are decoded at the same time.
    """

    def __init__(
        self, config: Config, manifest: Manifest, places: Layout, *, is_kept: bool, is_beside: bool
    ) -> None:
        from gare.model.encoders.clip import towers_sha256
        from gare.train.checkpoint.initial_model import feature_model

        weights = absolute(config.features.weights or config.train.clip_weights)
        section = config.features.model_copy(update={"weights": weights})
        self.config = config.model_copy(update={"features": section})
        self.manifest, self.is_kept, self.shares_cpus = manifest, is_kept, is_beside or not is_kept
        self.frames_uri = places.frames if is_kept else join(places.features, "passing")
        stat = None if is_kept else videos_of(config).stat
        towers = towers_sha256(feature_model(self.config).towers)
        self.job = FeatureStoreUpdate(
            self.config, manifest, self.frames_uri, places.features, towers, __version__, stat
        )
        self.progress: Progress | None = None
        self.taken = time.monotonic()

    def _start(self) -> Progress:
        """Starts the pool with the first clips."""
        if self.progress:
            return self.progress
        from gare.extract.feature_writer import FeatureMaker
        from gare.train.checkpoint.initial_model import feature_model

        config, frames, features = self.config, self.frames_uri, self.job.uri
        device, name = "cuda" if wants_gpus(config.cluster) else "cpu", uuid.uuid4().hex
        generation = self.job.held.generation
        gpus = usable_gpus(config.cluster)
        alone = 1 if self.shares_cpus else extraction_cpus(config.cluster)
        self.workers = config.features.workers or gpus or alone
        self.pool = ActorPool(
            lambda: (
                FeatureMaker(
                    frames, features, config.features, feature_model(config).to(device), name, generation
                ).write
            ),
            count=self.workers,
            # During decoding, which uses all CPUs, an encoder without GPU takes what is left.
            num_cpus=0 if self.shares_cpus or gpus else 1,
            num_gpus=min(1.0, gpus / self.workers),
        )
        self.progress = Progress(0, "encoded")
        return self.progress

    def submit_ready(self) -> None:
        """Submits full parts of the frame store's current clips to the encoders, at intervals."""
        if time.monotonic() - self.taken > TAKE_EVERY_S:
            self._submit(whole=True)
            self.taken = time.monotonic()

    def _submit(self, *, whole: bool = False) -> Progress:
        progress = self._start()
        parts = self.job.parts(self.workers, whole=whole)
        progress.total += sum(map(len, parts))
        self.pool.submit((part,) for part in parts)
        return progress

    def take(self, check: Callable[[], None]) -> Progress:
        """Encodes all clips of the frame store and waits for the results."""
        progress = self._submit()
        for done in self.pool.finish():
            progress.add(done)
            check()
        self.job.mark_handed_out_done()
        return progress

    def work(self, comparison: Comparison, lock: StoreLock, tracked: ExtractionRun) -> dict[str, Any]:
        """Encodes the remaining clips."""
        logger.info(
            "%s: %s, %d to do", self.job.uri, format_counts(comparison.counts), len(comparison.pending)
        )
        with ray_session(self.config.cluster), tracked.system_metrics(), contextlib.closing(self):
            if not self.is_kept:
                return self._work_alone(lock)
            progress = self.take(lock.raise_if_lost)
            return log_and_report(progress) | {"attempted": progress.total}

    def _work_alone(self, lock: StoreLock) -> dict[str, Any]:
        passing = self.frames_uri

        def encode() -> None:
            self.take(lock.raise_if_lost)
            self.job.take_failures()
            lock.raise_if_lost()
            delete_tree(passing)

        frames = frame_settings(self.config.extract)
        if exists(join(passing, META)) and read_meta(passing).fingerprint != fingerprint(frames):
            delete_tree(passing)
        encode()  # changed captions, and clips that an interrupted run left there
        pending = [
            row for row in self.job.compare_with_collection().pending if not has_frames_or_features(row)
        ]
        progress = Progress(len(pending), "extracted")
        size = self.config.features.videos_per_part * self.workers
        for first in range(0, len(pending), size):
            frame_update(self.config, self.manifest, passing).mark_incomplete(Comparison((), {}, {}, ()))
            decode_rows(self.config, passing, pending[first : first + size], progress, lock.held)
            encode()
        return log_and_report(progress)

    def close(self) -> None:
        """Ends the encoding actors."""
        if self.progress:
            self.pool.close()
