"""The update of a store of any kind to its collection: what is left to do, and the result.

The caller holds the store's lock and decides where the work is done.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gare.config import Config
from gare.data.manifest import Manifest
from gare.data.store.contents import (
    IDENTITY,
    NO_LOCK,
    RULES,
    Store,
    StoreMeta,
    fingerprint,
    frame_schema,
    frame_settings,
    rules_of,
)
from gare.data.videos import FileVersion
from gare.errors import DataError
from gare.extract.comparison import Comparison, compare
from gare.extract.inventory import SUMMARISED, Inventory, take_inventory
from gare.storage.generations import HeldStore, newest_generation

logger = logging.getLogger(__name__)

#: Type of a source's ``stat``: reads the version of each uri.
Stat = Callable[[Sequence[str]], Mapping[str, FileVersion | DataError]]


class StoreUpdate(ABC):
    """Base class of the update of a store to a manifest's clips.

    Args:
        config: of the run.
        manifest: the clips that the store should hold.
        uri: the store.
        settings: settings that change its values.
        code_version: of this package.

    Attributes:
        kind: frames or features.
        store: the store.
        held: the store's lock, from ``hold`` on; every write checks it.
        again: ids of clips to be made again that were decoded by earlier rules, see ``decoded_before``.

    Raises:
        DataError: for a store that was made with other settings, with each that differs.
    """

    kind: str

    def __init__(
        self, config: Config, manifest: Manifest, uri: str, settings: dict[str, Any], code_version: str
    ) -> None:
        self.config, self.manifest, self.uri, self.settings = config, manifest, uri, settings
        self.code_version = code_version
        self.held = NO_LOCK
        self.again: Container[str] = ()
        self.store = Store(uri)
        if self.store.exists:
            self.store.read_meta_of(settings)

    def hold(self, held: HeldStore) -> None:
        """Takes over the lock of the store, which all writes check from here on."""
        self.held = held
        # From here on, no earlier job can replace the record, if the storage has conditional writes.
        self.store.write_retired(self.store.read_retired(), held)

    @property
    @abstractmethod
    def schema(self) -> pa.Schema:
        """Columns of the store's data parts."""

    @abstractmethod
    def compare_with_collection(self) -> Comparison:
        """Compares the store with its collection in their present state."""

    @property
    @abstractmethod
    def decodes(self) -> bool:
        """True if the store is made from the files themselves, False if from another store."""

    def decoded_before(self) -> list[dict[str, Any]]:
        """Lists stored clips of the manifest that were decoded by earlier rules, perhaps wrongly.

        Returns:
            ``video_id``, ``uri``, identity and ``complete`` of each, the last None if unknown.
        """
        if not self.decodes:
            return []
        known = ["rules", *({"complete"} & set(self.schema.names))]
        stored = self.store.clips(IDENTITY, known)
        rules: Any = stored.columns["rules"]
        if (pc.min(pc.coalesce(rules, pa.scalar(1, rules.type))).as_py() or RULES) >= RULES:
            return []
        found = []
        for row in self.manifest.rows:
            if (place := stored.ids.find(row.video_id)) < 0:
                continue
            about = stored.columns.slice(place, 1).to_pylist()[0]
            if rules_of(about) < RULES:
                about |= {"video_id": row.video_id, "uri": row.uri, "complete": about.get("complete")}
                found.append(about)
        return found

    def quiet_generation(self) -> int | None:
        """Returns the generation of the last job that wrote the store; None if it may still be writing."""
        newest = newest_generation(self.uri)
        return newest.number if newest.released or not newest.number else None

    def count(self) -> Inventory:
        """Counts the store's clips as they are now."""
        return take_inventory(self.uri, self.manifest.rows, self.config.extract.max_failed_fraction)

    def has_nothing_left(self, comparison: Comparison) -> bool:
        """Returns True if no clip is left to make or retire; the description may still be out of date."""
        return not comparison.pending and comparison.retired == self.store.read_retired()

    def inventory_if_done(self, comparison: Comparison) -> Inventory | None:
        """Counts the store if it is as this pass would leave it; returns None otherwise."""
        if not self.has_nothing_left(comparison) or not self.store.exists:
            return None
        meta, inventory = self.store.read_meta(), self.count()
        is_done = (meta.counts, meta.complete) == (inventory.counts, inventory.is_complete)
        return inventory if is_done else None

    def refuse_lost(self, comparison: Comparison) -> None:
        """Raises an error if too much of the collection has vanished, before anything is changed.

        Raises:
            DataError: if more of it is gone than ``extract.max_failed_fraction``.
        """
        most, lost = self.config.extract.max_failed_fraction, comparison.lost
        if len(lost) > most * len(self.manifest.rows):
            raise DataError(
                f"{len(lost)} videos of the manifest that were there are gone, {lost[0]!r} the first of "
                "them; nothing was changed",
                where=self.uri,
                accepted=f"is their folder mounted? extract.max_failed_fraction={most:g} of them may be gone",
            )

    def mark_incomplete(self, comparison: Comparison) -> None:
        """Marks the store as incomplete, and retires rows that no longer count."""
        self._describe({}, complete=False)
        self.store.write_retired(comparison.retired, self.held)

    def retire_and_count(self) -> Inventory:
        """Retires rows that were replaced, so that each clip counts once, and counts the clips."""
        self.store.write_retired(self.compare_with_collection().retired, self.held)
        return self.count()

    def finish(self, comparison: Comparison, inventory: Inventory, done: Mapping[str, Any]) -> dict[str, Any]:
        """Records what the store holds; returns ``result`` with ``done``, the numbers of the work.

        Raises:
            DataError: for more failures than ``extract.max_failed_fraction``; the parts written stay.
        """
        self._describe(inventory.counts, complete=inventory.is_complete)
        for reason, count in inventory.reasons.most_common(SUMMARISED):
            logger.warning("failed: %d × %s", count, reason)
        inventory.raise_if_too_many()
        return self.result(comparison, inventory) | dict(done)

    def result(self, comparison: Comparison, inventory: Inventory) -> dict[str, Any]:
        """Builds the result of the run for this store."""
        return {
            "store": self.uri,
            "fingerprint": fingerprint(self.settings),
            "videos": inventory.num_wanted_stored,
            "attempted": len(comparison.pending),
            **comparison.counts,
            **inventory.summary(),
        }

    def _describe(self, counts: dict[str, int], *, complete: bool) -> None:
        meta = StoreMeta(
            kind=self.kind,
            fingerprint=fingerprint(self.settings),
            settings=self.settings,
            counts=counts,
            complete=complete,
            config=self.config.to_yaml(),
            code_version=self.code_version,
        )
        self.store.write_meta(meta, self.held)


class FrameStoreUpdate(StoreUpdate):
    """The update of a frame store to a manifest's clips.

    Args:
        config: of the run.
        manifest: the clips that the store should hold.
        uri: the store.
        stat: reads the present versions of files.
        code_version: of this package.

    Raises:
        DataError: for a store that was made with other settings, with each that differs.
    """

    kind = "frames"

    def __init__(self, config: Config, manifest: Manifest, uri: str, stat: Stat, code_version: str) -> None:
        super().__init__(config, manifest, uri, frame_settings(config.extract), code_version)
        self._stat = stat

    @property
    def schema(self) -> pa.Schema:
        """Columns of the store's data parts."""
        return frame_schema(self.config.extract)

    @property
    def decodes(self) -> bool:
        """Always True: it is made from video files."""
        return True

    def compare_with_collection(self) -> Comparison:
        """Compares the store with the files in their present state."""
        versions = self._stat([row.uri for row in self.manifest.rows])
        extract = self.config.extract
        return compare(
            self.uri,
            self.manifest.rows,
            versions,
            retry_failed=extract.retry_failed,
            max_attempts=extract.max_attempts,
            again=self.again,
        )
