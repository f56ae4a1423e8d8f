"""Plans of extraction: for each store that a run brings up to date, what is missing and how it is made."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

from cluster.layout import Layout
from cluster.status.progress import Progress
from gare import __version__
from gare.config import Config
from gare.data.manifest import Manifest
from gare.data.store.contents import Store, fingerprint, frame_settings
from gare.extract.comparison import Comparison
from gare.extract.feature_update import FeatureStoreUpdate, has_frames_or_features, without_frames
from gare.extract.update import FrameStoreUpdate, Stat, StoreUpdate
from gare.storage.files import delete_tree, join
from gare.storage.lock import StoreLock
from pipelines.extracting.pools import Decoders, Encoders

logger = logging.getLogger(__name__)

#: Seconds after which newly decoded clips are handed to the encoders.
TAKE_EVERY_S = 5.0


class StorePlan(ABC):
    """Plan that brings one store up to date.

    Attributes:
        step: name of the step in MLflow.
        update: comparison of the store with its collection, and what is recorded in it.
    """

    step: str
    update: StoreUpdate

    @abstractmethod
    def has_work(self, comparison: Comparison) -> bool:
        """Returns True if there is something to do on Ray."""

    @abstractmethod
    def work(self, comparison: Comparison, lock: StoreLock) -> dict[str, Any]:
        """Makes what is missing, on Ray, and calls the lock's ``raise_if_lost`` after each part.

        Returns:
            Counts, rates and seconds by stage, and those of the slowest clips.
        """


class FramePlan(StorePlan):
    """Plan of a frame store: videos are decoded into it.

    Args:
        update: of the store.
        decoders: read the videos.
    """

    step = "extract"

    def __init__(self, update: FrameStoreUpdate, decoders: Decoders) -> None:
        self.update, self._decoders = update, decoders
        #: Called after each part beside the lock's check.
        self.after_part: Callable[[], None] = lambda: None

    def has_work(self, comparison: Comparison) -> bool:
        """Returns True if there are videos to decode."""
        return bool(comparison.pending)

    def work(self, comparison: Comparison, lock: StoreLock) -> dict[str, Any]:
        """Decodes the pending videos."""

        def after_part() -> None:
            lock.raise_if_lost()
            self.after_part()

        progress = Progress(len(comparison.pending), "extracted")
        self._decoders.extract(self.update.uri, comparison.pending, progress, lock.held, after_part)
        return _log_and_report(progress)


class FeaturePlan(StorePlan):
    """Plan of a feature store that is made from a frame store, which may be growing.

    Args:
        update: of the feature store.
        encoders: encode the clips.
    """

    step = "extract-features"

    def __init__(self, update: FeatureStoreUpdate, encoders: Encoders) -> None:
        self.update: FeatureStoreUpdate = update
        self.encoders = encoders
        self._submitted_at = time.monotonic()

    def has_work(self, comparison: Comparison) -> bool:
        """Returns True: clips that were submitted earlier are waited for."""
        return True

    @cached_property
    def progress(self) -> Progress:
        """Progress since the first clips were handed to the encoders, by whose time rates are computed."""
        return Progress(0, "encoded")

    def submit_ready(self) -> None:
        """Submits full parts of the frame store's current clips to the encoders, at intervals."""
        if time.monotonic() - self._submitted_at > TAKE_EVERY_S:
            self._submit(whole=True, anew=False)
            self._submitted_at = time.monotonic()

    def _submit(self, *, whole: bool, anew: bool) -> None:
        parts = self.update.parts(self.encoders.count, whole=whole, anew=anew)
        self.progress.total += sum(map(len, parts))
        self.encoders.submit(parts, self.update.held.generation)

    def encode_all(self, check: Callable[[], None], *, anew: bool = True) -> None:
        """Encodes all clips of the frame store and waits for the results.

        Args:
            check: called after each part.
            anew: False if only frames that have appeared since the last call are to be looked at.
        """
        self._submit(whole=False, anew=anew)
        for done in self.encoders.finish():
            self.progress.add(done)
            check()
        self.update.mark_handed_out_done()

    def work(self, comparison: Comparison, lock: StoreLock) -> dict[str, Any]:
        """Encodes the remaining clips."""
        with self.encoders:
            self.encode_all(lock.raise_if_lost)
        return _log_and_report(self.progress) | {"attempted": self.progress.total}


class PassingFramesPlan(FeaturePlan):
    """Plan of a feature store whose frames are not kept: they pass through a frame store that is emptied.

    Args:
        update: of the feature store.
        encoders: encode the clips.
        decoders: read the videos.
    """

    def __init__(self, update: FeatureStoreUpdate, encoders: Encoders, decoders: Decoders) -> None:
        super().__init__(update, encoders)
        self._passing, self._decoders = update.frames.uri, decoders

    def work(self, comparison: Comparison, lock: StoreLock) -> dict[str, Any]:
        """Decodes and encodes the pending videos in turns, as many as the encoders take at once."""
        update, passing = self.update, self._passing
        left = Store(passing)  # of an interrupted run, perhaps with other settings
        wanted = fingerprint(frame_settings(update.config.extract))
        if left.exists and left.read_meta().fingerprint != wanted:
            delete_tree(passing)
        with self.encoders:
            self._encode_and_empty(lock)  # changed captions, and clips that an interrupted run left there
            # No file is asked for its version again.
            found = update.compare_again().pending
            pending = [row for row in found if not has_frames_or_features(row)]
            progress = Progress(len(pending), "extracted")
            size = update.clips_per_part * self.encoders.count
            for first in range(0, len(pending), size):
                begun = FrameStoreUpdate(
                    update.config, update.manifest, passing, self._decoders.videos.stat, __version__
                )
                begun.mark_incomplete(Comparison((), {}, {}, ()))
                group = pending[first : first + size]
                self._decoders.extract(passing, group, progress, lock.held, lock.raise_if_lost)
                self._encode_and_empty(lock, anew=False)
        return _log_and_report(progress)

    def _encode_and_empty(self, lock: StoreLock, *, anew: bool = True) -> None:
        self.encode_all(lock.raise_if_lost, anew=anew)
        self.update.take_failures()
        lock.raise_if_lost()
        delete_tree(self._passing)


def plan_stores(config: Config, manifest: Manifest, places: Layout, decoders: Decoders) -> list[StorePlan]:
    """Plans the stores of ``extract.store``, in the order in which they are made.

    Raises:
        DataError: for a store made with other settings.
    """
    kind, stat = config.extract.store, decoders.videos.stat
    if kind == "features" and not _is_complete(Store(places.frames)):
        passing = join(places.features, "passing")
        encoders = Encoders(config, passing, places.features, shares_cpus=True)
        return [PassingFramesPlan(_feature_update(manifest, encoders, stat), encoders, decoders)]
    # Also where only features are made, it refuses frames that were made with other settings.
    frames = FramePlan(FrameStoreUpdate(config, manifest, places.frames, stat, __version__), decoders)
    if kind == "frames":
        return [frames]
    encoders = Encoders(config, places.frames, places.features, shares_cpus=kind == "both")
    features = FeaturePlan(_feature_update(manifest, encoders, None), encoders)
    return [frames, features] if kind == "both" else [features]


def _feature_update(manifest: Manifest, encoders: Encoders, stat: Stat | None) -> FeatureStoreUpdate:
    """Returns the update of the feature store that the encoders write."""
    stores, towers = (encoders.frames, encoders.features), encoders.towers_sha256
    return FeatureStoreUpdate(encoders.config, manifest, *stores, towers, __version__, stat)


def _is_complete(store: Store) -> bool:
    """Returns True if there is a store whose last run went through."""
    return store.exists and store.read_meta().complete


def warn_of_missing_frames(plan: StorePlan, frames: str) -> None:
    """Logs what happens to clips that the frame store lacks, if only features are made.

    Args:
        plan: of the feature store.
        frames: location of the frame store.
    """
    manifest = plan.update.manifest
    if not Store(frames).exists or not (missing := without_frames(frames, manifest)):
        return
    effect = (
        "its run did not go through, so all are decoded again for the features alone; "
        "extract.store=both finishes it instead"
        if isinstance(plan, PassingFramesPlan)
        else "no features are made of these; extract.store=both decodes them too"
    )
    counts = len(missing), len(manifest.rows)
    logger.warning("%s lacks %d of %d videos, %r the first of them: %s", frames, *counts, missing[0], effect)


def _log_and_report(progress: Progress) -> dict[str, Any]:
    """Logs progress and the slowest videos; returns these with counts, rates and seconds by stage."""
    progress.show()
    for video_id, seconds in progress.slowest:
        logger.info("slowest: %6.2f s %s", seconds, video_id)
    return progress.report()
