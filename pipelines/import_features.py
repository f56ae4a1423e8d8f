"""import-features: features of one's own encoders → manifest and feature store.

Training on them (train.input=features) needs neither videos nor towers: adapters, temporal transformer and ψ
learn. The checkpoint has no towers, so that it cannot encode new captions or videos.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from cluster.runtime.signals import take_signals

    take_signals()

import logging
import time
from typing import Any

from cluster.command import main
from cluster.layout import absolute, layout
from gare import __version__
from gare.config import Config
from gare.data.imported_features import ImportedFeatures, read_imported
from gare.data.manifest import Manifest, read_manifest, write_manifest
from gare.data.noise import count_noisy
from gare.errors import ConfigError, DataError
from gare.extract.imported_update import ImportedStoreUpdate
from gare.storage.files import exists, join, write_json
from gare.storage.run_folder import RESULT
from pipelines.locks import store_lock

logger = logging.getLogger(__name__)


def run(config: Config) -> dict[str, Any]:
    """Writes the manifest and the feature store of ``data.features`` and ``data.records``.

    The same input again changes nothing. A store of other arrays is refused, as extraction refuses one that
    was made with other settings; other texts of the same captions replace the earlier ones.

    Raises:
        ConfigError: if a setting is missing, or noise cannot be drawn.
        DataError: for arrays or records that cannot be used, or a store of other arrays.
    """
    started, places = time.monotonic(), layout(config)
    imported = _read(config)
    update = ImportedStoreUpdate(config, imported, places.features, __version__)
    manifest = update.manifest
    comparison = update.compare_with_collection()
    if inventory := update.inventory_if_done(comparison):
        logger.info("%s: %d videos, nothing to do", update.uri, inventory.num_wanted_stored)
        _write_if_new(manifest, places.manifest)
        return _result(config, imported, manifest, update.result(comparison, inventory), started)
    with store_lock(config, update.uri) as lock:
        update.hold(lock.held)
        comparison = update.compare_with_collection()  # another job may have written during the wait
        update.mark_incomplete(comparison)
        update.write_pending(comparison)
        stored = update.finish(comparison, update.retire_and_count(), {})
        _write_if_new(manifest, places.manifest)
        result = _result(config, imported, manifest, stored, started)
        write_json(join(update.uri, RESULT), result)
    counts = ", ".join(f"{split} {count['videos']}" for split, count in manifest.counts.items())
    logger.info("imported %s: %s videos in %.1f s", update.uri, counts, result["seconds"])
    return result


def _read(config: Config) -> ImportedFeatures:
    """Reads the arrays and records, with noise if it is asked for."""
    data, model = config.data, config.model
    if not data.is_imported:
        raise ConfigError(
            f"is {data.benchmark}",
            where="data.benchmark",
            accepted="features, with data.features and data.records",
        )
    if missing := [f"data.{key}" for key in ("features", "records") if not getattr(data, key)]:
        raise ConfigError(
            f"{' and '.join(missing)} must be set",
            where="data.benchmark=features",
            accepted="data.features=FILE.npz data.records=FILE.jsonl",
        )
    width = model.clip.embed_dim
    imported = read_imported(
        absolute(data.features), absolute(data.records), max_frames=model.max_frames, width=width
    )
    for side, own in imported.widths.items():
        if own < width:
            logger.info(
                "%s are %d wide, padded with zeros to model.clip.embed_dim=%d: exact, no cosine changes "
                "by it, and nothing of them is lost to linear adapters",
                side,
                own,
                width,
            )
    return imported.with_noise(data.noise, data.seed) if data.noise else imported


def _write_if_new(manifest: Manifest, location: str) -> None:
    """Writes the manifest, unless the same one is there."""
    try:
        is_there = exists(location) and read_manifest(location) == manifest
    except DataError:  # of another version, or damaged
        is_there = False
    if not is_there:
        write_manifest(manifest, location)


def _result(
    config: Config, imported: ImportedFeatures, manifest: Manifest, stored: dict[str, Any], started: float
) -> dict[str, Any]:
    return {
        **stored,
        "manifest": layout(config).manifest,
        "benchmark": manifest.benchmark,
        "protocol": manifest.protocol,
        "manifest_fingerprint": manifest.fingerprint,
        "counts": manifest.counts,
        "widths": imported.widths,
        "embed_dim": config.model.clip.embed_dim,
        **({"noisy_captions": count_noisy(manifest.rows)} if config.data.noise else {}),
        "seconds": round(time.monotonic() - started, 2),
    }


if __name__ == "__main__":
    main(run, __doc__)
