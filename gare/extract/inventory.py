"""Counts of a store compared with its collection at the end of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from gare.data.manifest import ManifestRow
from gare.data.store.contents import Store
from gare.errors import DataError
from gare.storage.files import join

#: Failed videos, and reasons, that a result names at most.
SUMMARISED = 100


@dataclass(frozen=True)
class Inventory:
    """Counts of stored and failed videos.

    Attributes:
        uri: the store.
        num_wanted: number of videos of the manifest.
        num_wanted_stored: number of these that the store holds.
        counts: as ``_META.json`` has them: videos, failures and parts of the store.
        failures: the last failure of each failed video of the manifest, by id.
        max_failed_fraction: share of the manifest's videos that may fail.
    """

    uri: str
    num_wanted: int
    num_wanted_stored: int
    counts: dict[str, int]
    failures: dict[str, dict[str, Any]]
    max_failed_fraction: float

    @property
    def has_too_many(self) -> bool:
        """True if more videos failed than allowed."""
        return len(self.failures) > self.max_failed_fraction * self.num_wanted

    @property
    def is_complete(self) -> bool:
        """True if every video is stored or failed, and not too many failed."""
        return self.num_wanted_stored + len(self.failures) == self.num_wanted and not self.has_too_many

    @property
    def reasons(self) -> Counter[str]:
        """Number of failures by reason."""
        return Counter(row["message"].split(":")[0] for row in self.failures.values())

    def summary(self) -> dict[str, Any]:
        """Returns the failures for a result: the number, counts by reason, and messages of the first, by id.

        All of them are in the store. A result is one line, which has to stay short.
        """
        first = sorted(self.failures)[:SUMMARISED]
        return {
            "failed": {video_id: self.failures[video_id]["message"] for video_id in first},
            "num_failed": len(self.failures),
            "failed_reasons": dict(self.reasons.most_common(SUMMARISED)),
        }

    def raise_if_too_many(self) -> None:
        """Raises an error if more videos failed than allowed.

        Raises:
            DataError: with the table of reasons.
        """
        if not self.has_too_many:
            return
        table = "".join(f"\n  {count:6d} × {reason}" for reason, count in self.reasons.most_common(20))
        raise DataError(
            f"{len(self.failures)} of {self.num_wanted} videos failed:{table}\n",
            where=join(self.uri, "failures"),
            accepted=f"at most extract.max_failed_fraction={self.max_failed_fraction:g} of them; the next "
            "run retries those that may be temporary, --retry-failed (extract.retry_failed=true) all of them",
        )


def take_inventory(uri: str, rows: Sequence[ManifestRow], max_failed_fraction: float) -> Inventory:
    """Counts what a store holds of the rows of a manifest.

    Raises:
        DataError: for a part that cannot be read or an id in two parts.
    """
    store = Store(uri)
    stored = store.ids()
    last = store.read_failures(stored)
    failures = {row.video_id: last[row.video_id] for row in rows if row.video_id in last} if last else {}
    places = stored.find(pa.array([row.video_id for row in rows], pa.string()))
    return Inventory(
        uri=uri,
        num_wanted=len(rows),
        num_wanted_stored=int((places >= 0).sum()),
        counts={"videos": len(stored), "failures": len(failures), "parts": len(stored.used_parts())},
        failures=failures,
        max_failed_fraction=max_failed_fraction,
    )
