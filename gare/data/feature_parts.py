"""What is left to do to bring a feature store up to a manifest, cut into parts."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from gare.data.extraction import part_size
from gare.data.feature_store import stored_captions
from gare.data.files import join
from gare.data.manifest import Manifest, ManifestRow
from gare.data.store import FAILURE_SCHEMA, ids_in_parts, read_failures, write_part

#: A part to be made: ``location``; ``rows`` with video_id, uri, start_s, end_s, captions and attempts; and
#: ``reuse`` where the part is there and only its captions have changed.
Part = dict[str, Any]


def pending_parts(
    manifest: Manifest,
    frames_uri: str,
    uri: str,
    *,
    workers: int,
    limit: int,
    retry_failed: bool,
    skip: Container[str] = (),
) -> list[Part]:
    """Parts that are missing, or that hold a clip whose captions have changed since.

    A part that has changed is made again as a whole under its name, so that no clip is ever in two parts; it
    keeps the features of its frames, which need not be in the frame store any more.

    Args:
        manifest: what the store should hold.
        frames_uri: frame store that has the clips; those that it lacks are left out.
        uri: the feature store.
        workers: that share the parts, which are smaller where not all would have work; 0: never mind.
        limit: clips a part holds at most.
        retry_failed: whether clips that failed here are tried again.
        skip: ids that are being made.

    Raises:
        DataError: for a part that cannot be read.
    """
    wanted = {row.video_id: row for row in manifest.rows}
    places = ids_in_parts(frames_uri, "data")
    stored = ids_in_parts(uri, "data")
    failures = read_failures(uri, stored)
    attempts = {video_id: int(row["attempts"]) for video_id, row in failures.items()}
    parts = []
    for location, clips in stored_captions(uri).items():
        kept = [wanted[one] for one in clips if one in wanted and one not in skip]
        if any(row.captions != clips[row.video_id] for row in kept):
            parts.append(_part(location, kept, attempts) | {"reuse": True})
    missing = [
        row
        for row in manifest.rows
        if row.video_id in places
        and row.video_id not in stored
        and row.video_id not in skip
        and (retry_failed or row.video_id not in failures or failures[row.video_id]["stage"] == "decode")
    ]
    missing.sort(key=lambda row: places[row.video_id])  # so that a part is read from few others
    size = part_size(len(missing), workers, limit) if workers else limit
    for first in range(0, len(missing), size):
        rows = missing[first : first + size]
        parts.append(_part(part_location(uri, (row.video_id for row in rows)), rows, attempts))
    return parts


def part_location(uri: str, ids: Iterable[str]) -> str:
    """Where the part of a group of clips is, so that a group made twice is one part."""
    digest = hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:20]
    return join(uri, "data", f"part-{digest}.parquet")


def _part(location: str, rows: Sequence[ManifestRow], attempts: Mapping[str, int]) -> Part:
    described = [
        {
            "video_id": row.video_id,
            "uri": row.uri,
            "start_s": row.start_s,
            "end_s": row.end_s,
            "captions": list(row.captions),
            "attempts": attempts.get(row.video_id, 0),
        }
        for row in rows
    ]
    return {"location": location, "rows": described}


def copy_failures(manifest: Manifest, frames_uri: str, uri: str) -> None:
    """Records in the feature store which clips the frame store could not get, as it says it.

    Raises:
        DataError: if they cannot be read or written.
    """
    stored = ids_in_parts(uri, "data")
    wanted = {row.video_id for row in manifest.rows} - stored.keys()
    theirs = read_failures(frames_uri, ids_in_parts(frames_uri, "data"))
    ours = read_failures(uri, stored)
    rows = [
        row for video_id, row in sorted(theirs.items()) if video_id in wanted and ours.get(video_id) != row
    ]
    if rows:
        write_part(uri, "failures", rows, FAILURE_SCHEMA)
