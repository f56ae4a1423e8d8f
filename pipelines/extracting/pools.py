"""The actors of extraction on Ray: decoders, which read videos, and encoders of their frames."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from cluster.layout import absolute
from cluster.runtime.actors import ActorPool, Work
from cluster.runtime.parts import run_parts
from cluster.runtime.resources import extraction_cpus, usable_gpus, wants_gpus
from cluster.runtime.session import ray_session
from cluster.sources.fetch import RemoteVideos
from cluster.status.progress import Progress
from gare.config import Config
from gare.data.videos import LocalVideos
from gare.extract.feature_update import Part
from gare.extract.frame_writer import Extractor, OutdatedFrameFinder, clips_per_part, cut_into_parts
from gare.extract.update import StoreUpdate
from gare.storage.generations import HeldStore

logger = logging.getLogger(__name__)

#: Heap of a decoding actor, with a whole part, and its child process, which Ray cannot see.
ACTOR_MEMORY_BYTES = 800 * 1024**2


class Decoders:
    """Actors that read videos, one for each CPU that extraction may use.

    Args:
        config: its sections ``extract``, ``sources`` and ``cluster``.
    """

    def __init__(self, config: Config) -> None:
        self._extract, self._sources, self._cluster = config.extract, config.sources, config.cluster
        self.videos = RemoteVideos(config.sources, LocalVideos())

    def extract(
        self,
        store: str,
        rows: Sequence[Mapping[str, Any]],
        progress: Progress,
        held: HeldStore,
        after_part: Callable[[], None],
    ) -> None:
        """Decodes pending rows of a comparison into a frame store.

        Args:
            store: location of the frame store.
            rows: rows to decode.
            progress: gets the result of each part.
            held: held lock of the store.
            after_part: called after each part; an error that it raises ends the work.
        """
        extract, sources, name = self._extract, self._sources, uuid.uuid4().hex
        generation = held.generation
        results = self._run(
            lambda: Extractor(store, extract, RemoteVideos(sources, LocalVideos()), name, generation).write,
            rows,
        )
        with contextlib.closing(results):
            for done in results:
                progress.add(done)
                after_part()

    def find_outdated(self, update: StoreUpdate) -> dict[str, str]:
        """Finds unchanged clips that an earlier version may have decoded wrongly.

        Returns:
            The trait of each file that gave it away, by clip id.
        """
        rows = update.decoded_before()
        if not rows:
            return {}
        extract, sources = self._extract, self._sources
        logger.info("%s: %d of its clips were decoded by an earlier version", update.uri, len(rows))
        progress, traits = Progress(len(rows), "checked"), dict[str, str]()
        with ray_session(self._cluster):
            results = self._run(
                lambda: OutdatedFrameFinder(extract, RemoteVideos(sources, LocalVideos())).find, rows
            )
            with contextlib.closing(results):
                for found in results:
                    progress.add(found)
                    traits |= found["traits"]
                    for video_id, reason in found["unknown"].items():
                        logger.warning("%s: cannot check its file: %s", video_id, reason)
        progress.show()
        return traits

    def _run(self, load: Callable[[], Work], rows: Sequence[Mapping[str, Any]]) -> Generator[Any, None, None]:
        """Runs work on parts of rows, and yields the result of each part.

        Args:
            load: as of ``run_parts``.
            rows: rows with ``source_bytes``, of which parts are cut.
        """
        extract = self._extract
        workers = extraction_cpus(self._cluster) if extract.workers == "auto" else extract.workers
        workers = min(workers, len(rows))
        parts = cut_into_parts(rows, workers, clips_per_part(extract))
        return run_parts(load, parts, workers=workers, memory_bytes=ACTOR_MEMORY_BYTES)


class Encoders:
    """Actors that encode clips of a frame store, one for each GPU, without GPUs one for each CPU.

    They start with the first clips. Use it as a context manager, which ends them on exit.

    Args:
        config: configuration of the run.
        frames: location of the frame store.
        features: location of the feature store.
        shares_cpus: True if videos are decoded at the same time.
    """

    def __init__(self, config: Config, frames: str, features: str, *, shares_cpus: bool) -> None:
        from gare.model.encoders.clip import towers_sha256
        from gare.train.checkpoint.initial_model import feature_model

        weights = absolute(config.features.weights or config.train.clip_weights)
        section = config.features.model_copy(update={"weights": weights})
        #: The configuration with the weights' absolute place, since actors run in other folders.
        self.config = config.model_copy(update={"features": section})
        self.towers_sha256 = towers_sha256(feature_model(self.config).towers)
        self.frames, self.features, self._shares_cpus = frames, features, shares_cpus
        self._pool: ActorPool | None = None

    def __enter__(self) -> Encoders:
        """Returns the actors."""
        return self

    def __exit__(self, *error: object) -> None:
        """Ends them."""
        if self._pool:
            self._pool.close()

    @cached_property
    def _gpus(self) -> int:
        # Once, since GPUs that the actors hold are not free any more.
        return usable_gpus(self.config.cluster)

    @property
    def count(self) -> int:
        """Number of actors, at most; needs Ray."""
        count = self.config.features.workers
        if count != "auto":
            return count
        return self._gpus or (1 if self._shares_cpus else extraction_cpus(self.config.cluster))

    def submit(self, parts: Sequence[Part], generation: int) -> None:
        """Submits parts of ``FeatureStoreUpdate.parts``.

        Args:
            parts: clips to encode together.
            generation: of the feature store's lock.
        """
        if not parts:
            return
        if not self._pool:
            self._pool = self._start(generation)
        self._pool.submit((part,) for part in parts)

    def finish(self) -> Iterator[Any]:
        """Waits for all submitted parts and yields their results."""
        return self._pool.finish() if self._pool else iter(())

    def _start(self, generation: int) -> ActorPool:
        from gare.extract.feature_writer import FeatureMaker
        from gare.train.checkpoint.initial_model import feature_model

        config, frames, features = self.config, self.frames, self.features
        device, name = "cuda" if wants_gpus(config.cluster) else "cpu", uuid.uuid4().hex
        gpus, count = self._gpus, self.count
        return ActorPool(
            lambda: (
                FeatureMaker(
                    frames, features, config.features, feature_model(config).to(device), name, generation
                ).write
            ),
            count=count,
            # During decoding, which uses all CPUs, an encoder without GPU takes what is left.
            num_cpus=0 if self._shares_cpus or gpus else 1,
            num_gpus=min(1.0, gpus / count),
        )
