"""The update of a feature store from a frame store, or from the files if frames are not kept.

``gare.extract.feature_writer`` makes the parts, from frames that exist already or appear meanwhile. If only
the captions of a clip have changed, the features of its frames are kept, and the frames need not be in the
frame store any more. If its frames were made again from another file, it is encoded again.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import pyarrow as pa

from gare.config import Config
from gare.data.manifest import Manifest
from gare.data.store.contents import FAILURE_SCHEMA, IDENTITY, Store, rules_of, write_part
from gare.data.store.feature_schema import feature_schema, feature_settings
from gare.extract.comparison import Comparison, WantedClip, compare_clips
from gare.extract.inventory import Inventory
from gare.extract.update import Stat, StoreUpdate

logger = logging.getLogger(__name__)

#: A part to be made: rows of ``Comparison.pending`` with ``place``, the part that has their frames, and
#: ``made``, the part that has features of them already; one may be None, and ``made`` takes precedence.
Part = list[dict[str, Any]]


class FeatureStoreUpdate(StoreUpdate):
    """The update of a feature store to a manifest's clips.

    Args:
        config: of the run.
        manifest: the clips that the store should hold.
        frames_uri: the frame store that features are made from.
        uri: the feature store.
        towers_sha256: SHA-256 of the towers' weights.
        code_version: of this package.
        stat: reads the present versions of files; None if the frame store is kept, which alone counts then.

    Raises:
        DataError: for a store that was made with other settings, with each that differs.
    """

    kind = "features"

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        frames_uri: str,
        uri: str,
        towers_sha256: str,
        code_version: str,
        stat: Stat | None = None,
    ) -> None:
        super().__init__(config, manifest, uri, feature_settings(config, towers_sha256), code_version)
        self.frames = Store(frames_uri)
        self._stat = stat
        #: Ids of clips that are being made; and id → count that it is in, for all clips handed out in this
        #: pass.
        self._in_work: set[str] = set()
        self._handed_out: dict[str, str] = {}

    @property
    def schema(self) -> pa.Schema:
        """Columns of the store's data parts."""
        model = self.config.model
        words = model.max_words if self.config.features.words else 0
        return feature_schema(model.max_frames, model.clip.embed_dim, words)

    @property
    def decodes(self) -> bool:
        """True if frames are not kept."""
        return self._stat is not None

    def compare_with_collection(self) -> Comparison:
        """Compares the store with its sources in their present state.

        If the frame store is kept, clips that it lacks are not pending here.
        """
        frames = self.frames.rows(IDENTITY, ["rules"])
        versions = self._stat([row.uri for row in self.manifest.rows]) if self._stat else None
        failed = {} if versions is not None else self.frames.read_failures(frames)
        wanted, places = [], {}
        for row in self.manifest.rows:
            place, _, stored = frames.get(row.video_id, (None, 0, {}))
            if place and (stored["start_s"], stored["end_s"]) == (row.start_s, row.end_s):
                places[row.video_id] = place
                identity = tuple(stored[key] for key in IDENTITY)
                wanted.append(WantedClip(row, identity, is_decoded=True, rules=rules_of(stored)))
            elif versions is not None:
                wanted.append(WantedClip.of(row, versions[row.uri]))
            else:
                is_gone = row.video_id in failed
                wanted.append(dataclasses.replace(WantedClip.of(row), is_gone=is_gone))
        extract = self.config.extract
        found = compare_clips(
            self.uri,
            wanted,
            retry_failed=extract.retry_failed,
            max_attempts=extract.max_attempts,
            captions=True,
            again=self.again,
        )
        pending = tuple(row | {"place": places.get(row["video_id"])} for row in found.pending)
        counts = self._with_handed_out(found.counts, {row["video_id"] for row in pending})
        if versions is not None:
            return dataclasses.replace(found, pending=pending, counts=counts)
        # The frame store's update refuses videos that are gone.
        pending = tuple(filter(has_frames_or_features, pending))
        return dataclasses.replace(found, pending=pending, counts=counts, lost=())

    def _with_handed_out(self, counts: dict[str, int], pending: set[str]) -> dict[str, int]:
        """Counts clips by their state before this pass began, though it may have made some since."""
        counts = dict(counts)
        for video_id, counted in self._handed_out.items():
            if video_id not in pending:
                counts["unchanged"] -= 1
                counts[counted] += 1
        return counts

    def has_nothing_left(self, comparison: Comparison) -> bool:
        """Returns True if nothing is left to do, including failures to record."""
        return super().has_nothing_left(comparison) and not self._new_failures()

    def retire_and_count(self) -> Inventory:
        """Retires rows that were replaced, takes over the frame store's failures, and counts."""
        self.store.write_retired(self.compare_with_collection().retired, self.held)
        self.take_failures()
        return self.count()

    def parts(self, workers: int, *, whole: bool = False) -> list[Part]:
        """Hands out clips that can be made now, once each; retires the rows that they replace.

        Args:
            workers: number of workers that will share the parts.
            whole: True for parts of the full size only, since more clips will come.
        """
        comparison = self.compare_with_collection()
        rows = [
            row
            for row in comparison.pending
            if has_frames_or_features(row) and row["video_id"] not in self._in_work
        ]
        rows.sort(key=lambda row: row["made"] or row["place"])  # so that a new part is made from few others
        limit = self.config.features.videos_per_part
        size = limit if whole else max(1, min(limit, math.ceil(len(rows) / (2 * workers))))
        parts = [rows[first : first + size] for first in range(0, len(rows), size)]
        if whole:
            parts = [part for part in parts if len(part) == size]
        if parts:
            self.mark_incomplete(comparison)
        handed_out = {row["video_id"]: row["counted"] for part in parts for row in part}
        self._in_work |= handed_out.keys()
        self._handed_out = handed_out | self._handed_out
        return parts

    def mark_handed_out_done(self) -> None:
        """Records that all clips handed out are made or have failed."""
        self._in_work.clear()

    def take_failures(self) -> None:
        """Copies the failures that the frame store has recorded.

        Raises:
            DataError: if they cannot be read or written.
        """
        if rows := self._new_failures():
            self.held.raise_if_lost()
            write_part(self.uri, "failures", rows, FAILURE_SCHEMA, generation=self.held.generation)

    def _new_failures(self) -> list[dict[str, Any]]:
        if not self.frames.exists:
            return []
        stored = self.store.rows((), ["rules"])
        wanted = {row.video_id for row in self.manifest.rows}
        theirs = self.frames.read_failures(self.frames.ids())
        # All failures, not only the last of each clip: that may be a failure to encode, which only this store
        # has.
        ours = self.store.failures_by_clip()
        return [
            row
            for key, row in sorted(theirs.items())
            if key in wanted
            and row not in ours.get(key, ())
            # A stored clip counts, unless later rules have refused its file.
            and (key not in stored or rules_of(stored[key][2]) < rules_of(row))
        ]


def without_frames(frames_uri: str, manifest: Manifest) -> list[str]:
    """Returns ids of the manifest that a frame store neither holds nor has recorded as failed."""
    frames = Store(frames_uri)
    stored = frames.ids()
    known = stored.keys() | frames.read_failures(stored).keys()
    return [row.video_id for row in manifest.rows if row.video_id not in known]


def has_frames_or_features(row: dict[str, Any]) -> bool:
    """Returns True if the frames of a pending row, or features of them, are stored."""
    return row["place"] is not None or row["made"] is not None
