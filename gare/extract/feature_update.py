"""The update of a feature store from a frame store, or from the files if frames are not kept.

``gare.extract.feature_writer`` makes the parts, from frames that exist already or appear meanwhile. If only
the captions of a clip have changed, the features of its frames are kept, and the frames need not be in the
frame store any more. If its frames were made again from another file, it is encoded again.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from gare.config import Config
from gare.data.manifest import Manifest, ManifestRow
from gare.data.store.clip_places import ClipPlaces
from gare.data.store.contents import FAILURE_SCHEMA, IDENTITY, Store, part_files, rules_of, write_part
from gare.data.store.feature_schema import feature_schema, feature_settings
from gare.data.store.parts import read_these_parts
from gare.data.videos import FileVersion
from gare.errors import DataError
from gare.extract.comparison import Comparison, StoreState, WantedClip, compare_clips
from gare.extract.held import Identity
from gare.extract.inventory import Inventory
from gare.extract.update import Stat, StoreUpdate

logger = logging.getLogger(__name__)

#: Bytes of features, about, that a part holds at most, since its writer has it in memory.
PART_BYTES = 512 * 10**6
#: Rows that are looked up at once.
_AT_ONCE = 100_000

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
        #: Versions of the files as they were found last; None if frames are kept.
        self._versions: Mapping[str, FileVersion | DataError] | None = None
        #: State of both stores when clips were first handed out in this pass, kept up to date since.
        self._growth: _Growth | None = None

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
        if self._stat:
            self._versions = self._stat([row.uri for row in self.manifest.rows])
        return self.compare_again()

    def compare_again(self) -> Comparison:
        """Compares as ``compare_with_collection``, with the versions of the files that it found last."""
        return self._compare(StoreState.read(self.uri, captions=True), self.frames.clips(IDENTITY, ["rules"]))

    def _compare(self, state: StoreState, frames: ClipPlaces) -> Comparison:
        if self._stat and self._versions is None:
            self._versions = self._stat([row.uri for row in self.manifest.rows])
        versions = self._versions
        failed = {} if versions is not None else self.frames.read_failures(frames)
        found = self._compare_clips(state, self._wanted(self.manifest.rows, frames, versions, failed))
        pending = _with_places(found.pending, frames)
        counts = self._with_handed_out(found.counts, {row["video_id"] for row in pending})
        if versions is not None:
            return dataclasses.replace(found, pending=pending, counts=counts)
        # The frame store's update refuses videos that are gone.
        pending = tuple(filter(has_frames_or_features, pending))
        return dataclasses.replace(found, pending=pending, counts=counts, lost=())

    def _compare_clips(
        self, state: StoreState, wanted: Iterable[WantedClip], *, is_all: bool = True
    ) -> Comparison:
        extract = self.config.extract
        return compare_clips(
            self.uri,
            wanted,
            retry_failed=extract.retry_failed,
            max_attempts=extract.max_attempts,
            captions=True,
            again=self.again,
            state=state,
            is_all=is_all,
        )

    def _wanted(
        self,
        rows: Sequence[ManifestRow],
        frames: ClipPlaces,
        versions: Mapping[str, FileVersion | DataError] | None,
        failed: Container[str],
    ) -> Iterator[WantedClip]:
        """Yields the clip of each row as the store should hold it."""
        for row, decoded in zip(rows, _decoded(rows, frames), strict=True):
            if decoded and decoded[0][:2] == (row.start_s, row.end_s):
                yield WantedClip(row, decoded[0], is_decoded=True, rules=decoded[1])
            elif versions is not None:
                yield WantedClip.of(row, versions[row.uri])
            else:
                yield dataclasses.replace(WantedClip.of(row), is_gone=row.video_id in failed)

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

    def parts(self, workers: int, *, whole: bool = False, anew: bool = True) -> list[Part]:
        """Hands out clips that can be made now, once each; retires the rows that they replace.

        Args:
            workers: number of workers that will share the parts.
            whole: True for parts of the full size only, since more clips will come.
            anew: False to look only at frames that have appeared since the last call of this pass.
        """
        if anew or not self._growth:
            self._growth = _Growth.begin(self)
        else:
            self._growth.follow(self)
        ready = self._growth.ready
        rows = [
            row
            for row in ready.values()
            if has_frames_or_features(row) and row["video_id"] not in self._in_work
        ]
        rows.sort(key=lambda row: row["made"] or row["place"])  # so that a new part is made from few others
        limit = self.clips_per_part
        size = limit if whole else max(1, min(limit, math.ceil(len(rows) / (2 * workers))))
        parts = [rows[first : first + size] for first in range(0, len(rows), size)]
        if whole:
            parts = [part for part in parts if len(part) == size]
        if parts:
            self.mark_incomplete(Comparison((), self._growth.retired, {}, ()))
        handed_out = {row["video_id"]: row["counted"] for part in parts for row in part}
        for video_id in handed_out:
            del ready[video_id]
        self._in_work |= handed_out.keys()
        self._handed_out = handed_out | self._handed_out
        return parts

    @cached_property
    def clips_per_part(self) -> int:
        """Most clips of a part, by their number and by the bytes of their features."""
        model, features = self.config.model, self.config.features
        captions = sum(len(row.captions) for row in self.manifest.rows) / len(self.manifest.rows)
        texts = captions * (1 + (model.max_words if features.words else 0))
        clip = 2 * model.clip.embed_dim * (model.max_frames + texts)
        return max(1, min(features.videos_per_part, int(PART_BYTES // clip)))

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
        theirs = self.frames.read_failures(self.frames.ids())
        if not theirs:
            return []
        wanted = theirs.keys() & {row.video_id for row in self.manifest.rows}
        found = self.store.clips((), ["rules"])
        keys = sorted(wanted)
        stored = {
            key: rules or 1
            for key, place, rules in zip(
                keys, found.find(pa.array(keys, pa.string())), found.taken("rules", keys), strict=True
            )
            if place >= 0
        }
        # All failures, not only the last of each clip: that may be a failure to encode, which only this store
        # has.
        ours = self.store.failures_by_clip()
        return [
            row
            for key, row in sorted(theirs.items())
            if key in wanted
            and row not in ours.get(key, ())
            # A stored clip counts, unless later rules have refused its file.
            and (key not in stored or stored[key] < rules_of(row))
        ]


def without_frames(frames_uri: str, manifest: Manifest) -> list[str]:
    """Returns ids of the manifest that a frame store neither holds nor has recorded as failed."""
    frames = Store(frames_uri)
    stored = frames.ids()
    failed = frames.read_failures(stored)
    return [
        row.video_id for row in manifest.rows if row.video_id not in failed and row.video_id not in stored
    ]


@dataclass
class _Growth:
    """The clips that can be made, while the frame store grows.

    A look at it costs as much as has appeared since the last one.

    Attributes:
        state: of the feature store at the beginning; what is made since is handed out once.
        rows: the manifest's rows by id.
        seen: parts of the frame store that were looked at.
        ready: pending rows that are not handed out, by id.
        retired: rows that no longer count, as of ``Comparison``.
    """

    state: StoreState
    rows: Mapping[str, ManifestRow]
    seen: set[str]
    ready: dict[str, dict[str, Any]]
    retired: dict[str, dict[str, str]]

    @classmethod
    def begin(cls, update: FeatureStoreUpdate) -> _Growth:
        """Compares the whole store."""
        seen = set(part_files(update.frames.uri, "data"))
        state = StoreState.read(update.uri, captions=True)
        found = update._compare(state, update.frames.clips(IDENTITY, ["rules"]))
        rows = {row.video_id: row for row in update.manifest.rows}
        ready = {row["video_id"]: row for row in found.pending if has_frames_or_features(row)}
        return cls(state, rows, seen, ready, found.retired)

    def follow(self, update: FeatureStoreUpdate) -> None:
        """Compares the clips whose frames have appeared since."""
        new = [part for part in part_files(update.frames.uri, "data") if part not in self.seen]
        if not new:
            return
        frames = ClipPlaces.of(
            update.frames.uri, read_these_parts(new, ["video_id", *IDENTITY], ["rules"]), {}
        )
        rows = [self.rows[key] for key in frames if key in self.rows]
        wanted = [clip for clip in update._wanted(rows, frames, None, ()) if clip.is_decoded]
        found = update._compare_clips(self.state, wanted, is_all=False)
        ids = {clip.row.video_id for clip in wanted}
        for place in self.state.held.places(sorted(ids)).tolist():
            for held in self.state.held.rows(place):
                self.retired.get(held.part.checksum, {}).pop(self.state.held.ids[place], None)
        for checksum, gone in found.retired.items():
            self.retired.setdefault(checksum, {}).update(gone)
        self.retired = {checksum: gone for checksum, gone in self.retired.items() if gone}
        self.ready |= {row["video_id"]: row for row in _with_places(found.pending, frames)}
        self.seen.update(new)


def _decoded(rows: Sequence[ManifestRow], frames: ClipPlaces) -> Iterator[tuple[Identity, int] | None]:
    """Yields the identity and the rules of each row's frames; None for those without frames."""
    for first in range(0, len(rows), _AT_ONCE):
        some = [row.video_id for row in rows[first : first + _AT_ONCE]]
        columns = [frames.taken(name, some) for name in (*IDENTITY, "rules")]
        there = frames.find(pa.array(some, pa.string())) >= 0
        for is_there, *identity, rules in zip(there.tolist(), *columns, strict=True):
            yield (tuple(identity), rules or 1) if is_there else None


def _with_places(pending: Sequence[dict[str, Any]], frames: ClipPlaces) -> tuple[dict[str, Any], ...]:
    """Adds ``place``, the part with the frames of each row's clip, to those that have them."""
    found = []
    identities = frames.columns.select(["start_s", "end_s"])
    for row in pending:
        place = frames.ids.find(row["video_id"])
        part = None
        if place >= 0:
            times = (identities["start_s"][place].as_py(), identities["end_s"][place].as_py())
            part = frames.parts[frames.part[place]] if times == (row["start_s"], row["end_s"]) else None
        found.append(row | {"place": part})
    return tuple(found)


def has_frames_or_features(row: dict[str, Any]) -> bool:
    """Returns True if the frames of a pending row, or features of them, are stored."""
    return row["place"] is not None or row["made"] is not None
