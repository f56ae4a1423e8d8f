"""One pass that brings a feature store up to a manifest: what is left, and what came of it.

Whoever runs it decides where the parts are made (``gare.retrieval.feature_maker``), and whether the frames
have all been there before or appear meanwhile.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from gare.config import Config
from gare.data.feature_parts import Part, copy_failures, pending_parts
from gare.data.feature_store import feature_settings, with_other_captions
from gare.data.files import exists, join
from gare.data.manifest import Manifest
from gare.data.store import (
    META,
    StoreMeta,
    check_settings,
    fingerprint,
    ids_in_parts,
    part_files,
    read_failures,
    read_meta,
    write_meta,
)
from gare.errors import DataError

logger = logging.getLogger(__name__)


class FeaturePass:
    """A feature store that is to hold a manifest's clips.

    Args:
        config: of the run.
        manifest: what the store should hold.
        frames_uri: frame store that features are made of.
        uri: the feature store.
        towers_sha256: of the towers that make them.
        code_version: of this package.

    Raises:
        DataError: for a store that was made with other settings, naming each that differs.
    """

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        frames_uri: str,
        uri: str,
        towers_sha256: str,
        code_version: str,
    ) -> None:
        self.config, self.manifest = config, manifest
        self.frames_uri, self.uri = frames_uri, uri
        self.settings = feature_settings(config, towers_sha256)
        self.code_version = code_version
        self._handed_out: set[str] = set()
        if exists(join(uri, META)):
            check_settings(uri, read_meta(uri), self.settings)

    def parts(self, workers: int, *, whole: bool = False) -> list[Part]:
        """What can be made now and was not handed out before; the store is then marked as incomplete.

        Args:
            workers: that will share the parts.
            whole: only parts of the full size, since more clips will come.
        """
        parts = pending_parts(
            self.manifest,
            self.frames_uri,
            self.uri,
            workers=0 if whole else workers,
            limit=self.config.features.videos_per_part,
            retry_failed=self.config.extract.retry_failed,
            skip=self._handed_out,
        )
        if whole:
            limit = self.config.features.videos_per_part
            parts = [part for part in parts if len(part["rows"]) == limit]
        self._handed_out |= {row["video_id"] for part in parts for row in part["rows"]}
        if parts or not exists(join(self.uri, META)):
            self._describe({}, complete=False)
        if left := sum(len(part["rows"]) for part in parts):
            logger.info("%s: %d clips to encode", self.uri, left)
        return parts

    def take_failures(self) -> None:
        """Records which clips the frame store could not get."""
        if exists(join(self.frames_uri, META)):
            copy_failures(self.manifest, self.frames_uri, self.uri)

    def finish(self) -> dict[str, Any]:
        """Records what the store holds now.

        Returns:
            ``store``, ``fingerprint``, ``videos`` and ``failed`` with the reason of each.

        Raises:
            DataError: for more failures than ``extract.max_failed_fraction``; what was made stays.
        """
        self.take_failures()
        wanted = {row.video_id for row in self.manifest.rows}
        stored = ids_in_parts(self.uri, "data")
        failures = {key: row for key, row in read_failures(self.uri, stored).items() if key in wanted}
        stale = with_other_captions(self.uri, self.manifest.rows)
        missing = (wanted - stored.keys() - failures.keys()) | stale
        most = self.config.extract.max_failed_fraction
        too_many = len(failures) > most * len(wanted)
        parts = len(part_files(self.uri, "data"))
        counts = {"videos": len(stored), "failures": len(failures), "parts": parts}
        self._describe(counts, complete=not missing and not too_many)
        if too_many:
            reasons = Counter(row["message"].split(":")[0] for row in failures.values())
            worst = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(5))
            raise DataError(
                f"{len(failures)} of {len(wanted)} videos failed: {worst}",
                where=join(self.uri, "failures"),
                accepted=f"at most extract.max_failed_fraction={most:g} of them; "
                "extract.retry_failed=true tries them again",
            )
        return {
            "store": self.uri,
            "fingerprint": fingerprint(self.settings),
            "videos": len(wanted & stored.keys()),
            "failed": {key: row["message"] for key, row in sorted(failures.items())},
        }

    def _describe(self, counts: dict[str, int], *, complete: bool) -> None:
        if exists(join(self.uri, META)):
            known = read_meta(self.uri)
            if (known.counts, known.complete) == (counts, complete):
                return  # as it stands; the same job again changes nothing
        meta = StoreMeta(
            kind="features",
            fingerprint=fingerprint(self.settings),
            settings=self.settings,
            counts=counts,
            complete=complete,
            config=self.config.to_yaml(),
            code_version=self.code_version,
        )
        write_meta(self.uri, meta)
