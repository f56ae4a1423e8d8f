"""The training and validation clips of a manifest that a store holds."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from gare.config import ExtractConfig
from gare.data.manifest import ManifestRow, read_manifest, require_captions
from gare.data.store.contents import Store, frame_settings
from gare.data.store.feature_schema import with_other_captions
from gare.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredSplits:
    """Usable rows of the manifest by split, and fingerprints of the data.

    Attributes:
        train: rows of the train split that the store holds.
        val: rows of val.
        test: rows of test.
        missing: ids of the manifest that failed to be extracted.
        manifest_fingerprint: fingerprint of the manifest.
        store_fingerprint: fingerprint of the store.
        benchmark: the manifest's benchmark.
        protocol: the manifest's protocol.
    """

    train: tuple[ManifestRow, ...]
    val: tuple[ManifestRow, ...]
    test: tuple[ManifestRow, ...]
    missing: tuple[str, ...]
    manifest_fingerprint: str
    store_fingerprint: str
    benchmark: str
    protocol: str

    def ids(self) -> dict[str, list[str]]:
        """Returns the ids of the clips of train and val."""
        return {split: [row.video_id for row in self.of_split(split)] for split in ("train", "val")}

    def restricted_to(self, ids: Mapping[str, Sequence[str]]) -> StoredSplits:
        """Returns only the train and val clips that a run began with, since a store may grow meanwhile."""
        train, val = (
            tuple(row for row in self.of_split(split) if row.video_id in chosen)
            for split, chosen in (("train", set(ids["train"])), ("val", set(ids["val"])))
        )
        return replace(self, train=train, val=val)

    def hashes(self) -> dict[str, str]:
        """Returns SHA-256 of the clips of train and val with their captions."""
        return {split: split_hash_of(self.of_split(split)) for split in ("train", "val")}

    def identity(self) -> dict[str, Any]:
        """Returns what identifies the data of a run: fingerprints, and the clips that it begins with."""
        return {
            "manifest_fingerprint": self.manifest_fingerprint,
            "store_fingerprint": self.store_fingerprint,
            "clips": self.hashes(),
        }

    def of_split(self, split: str) -> tuple[ManifestRow, ...]:
        """Returns the rows of train, val or test."""
        rows: tuple[ManifestRow, ...] = getattr(self, split)
        return rows


def read_splits(
    manifest_uri: str, store_uri: str, extract: ExtractConfig, settings: Mapping[str, Any] | None = None
) -> StoredSplits:
    """Reads the manifest and finds its clips in the store.

    Args:
        manifest_uri: the manifest.
        store_uri: a frame store, or a feature store.
        extract: settings of a frame store.
        settings: of a feature store, from ``feature_settings``; None for a frame store.

    Raises:
        DataError: for a manifest without captions, a store that was made with other settings or that is not
            complete, or a missing file.
    """
    require_captions(manifest_uri)
    manifest = read_manifest(manifest_uri)
    store = Store(store_uri)
    meta = store.read_meta_of(frame_settings(extract) if settings is None else settings)
    stored = store.ids()
    places = stored.find(pa.array([row.video_id for row in manifest.rows], pa.string()))
    other = set() if settings is None else with_other_captions(store_uri, manifest.rows)
    missing = tuple(
        row.video_id
        for row, place in zip(manifest.rows, places.tolist(), strict=True)
        if place < 0 or row.video_id in other
    )
    left_out = set(missing)
    failed = {row["video_id"] for row in store.all_failures()} & left_out
    # If the manifest has grown since, the new videos were never tried.
    if not meta.complete or len(failed) < len(missing):
        raise DataError(
            f"the store is not complete: of {len(manifest.rows)} videos it holds "
            f"{len(manifest.rows) - len(missing)}, {len(failed)} failed",
            where=store_uri,
            accepted="run pipelines/extract.py again, it continues where it stopped",
        )
    if missing:
        logger.warning("%d videos could not be extracted and are left out", len(missing))
    splits = {
        split: tuple(row for row in manifest.of_split(split) if row.video_id not in left_out)
        for split in ("train", "val", "test")
    }
    return StoredSplits(
        **splits,
        missing=missing,
        manifest_fingerprint=manifest.fingerprint,
        store_fingerprint=meta.fingerprint,
        benchmark=manifest.benchmark,
        protocol=manifest.protocol,
    )


def split_hash(captions: Iterable[tuple[str, str]]) -> str:
    """Returns SHA-256 of a split's (video id, caption) pairs, whatever their order and the videos' URIs."""
    lines = sorted(json.dumps(pair, ensure_ascii=False) for pair in captions)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def split_hash_of(rows: Sequence[ManifestRow]) -> str:
    """Returns the ``split_hash`` of rows of a manifest."""
    return split_hash((row.video_id, caption) for row in rows for caption in row.captions)
