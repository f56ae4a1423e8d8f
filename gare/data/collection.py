"""What a store holds against what its collection is now: new, changed, unchanged and gone clips.

The answer is computed from the rows that are there and the collection alone, so that it is the same after
any crash: a file that comes back as it was makes its old row count again, and of a clip that two jobs have
written one row counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gare.data.manifest import ManifestRow
from gare.data.parts import Part, read_parts
from gare.data.sources import FileVersion
from gare.data.store import FAILURE_SCHEMA, IDENTITY
from gare.errors import DataError, GoneError

#: start_s, end_s, source_bytes, source_version: see ``gare.data.store.IDENTITY``.
Identity = tuple[Any, ...]


@dataclass(frozen=True)
class Comparison:
    """A store beside its collection.

    Attributes:
        pending: rows to extract, each with its identity as far as it is known and the attempts so far.
        retired: rows that no longer count, as ``gare.data.store.write_retired`` takes them.
        counts: ``new``, ``changed``, ``unchanged`` and ``gone`` clips; the first two are what there is to do
            and what failed before.
        lost: ids of the collection whose file was there once and is not any more.
    """

    pending: tuple[dict[str, Any], ...]
    retired: dict[str, dict[str, str]]
    counts: dict[str, int]
    lost: tuple[str, ...]


def compare(
    uri: str,
    rows: Sequence[ManifestRow],
    versions: Mapping[str, FileVersion | DataError],
    *,
    retry_failed: bool,
) -> Comparison:
    """Compares the rows of a store with the clips that it should hold.

    Args:
        uri: the store.
        rows: of the manifest.
        versions: what ``stat`` of the source says of each uri of the rows. A file that cannot be looked at
            for another reason than that it is gone counts as unchanged.
        retry_failed: whether clips are tried again that failed on this very file.
    """
    wanted = {row.video_id: row for row in rows}
    held = _held(read_parts(uri, "data", ["video_id", *IDENTITY])[0])
    failures = _failures(uri)
    counts = dict.fromkeys(("new", "changed", "unchanged", "gone"), 0)
    retired: dict[str, dict[str, str]] = {}
    pending: list[dict[str, Any]] = []
    lost: list[str] = []
    for video_id in held.keys() - wanted.keys():
        counts["gone"] += _retire(retired, video_id, held[video_id], None, "gone")
    for video_id, row in wanted.items():
        version, stored = versions[row.uri], held.get(video_id, [])
        is_gone = isinstance(version, GoneError)
        identity = _identity(row, version)
        match = None if is_gone else next((one for one in stored if _same(one[2], identity)), None)
        if is_gone and stored:
            lost.append(video_id)
            counts["gone"] += 1
        _retire(retired, video_id, stored, match, "gone" if is_gone else "changed")
        if match:
            counts["unchanged"] += 1
            continue
        failed = failures.get(video_id, [])
        known = any(_same(tuple(one[key] for key in IDENTITY), identity) for one in failed)
        if not is_gone or not stored:
            counts["changed" if (stored or failed) and not known else "unchanged" if known else "new"] += 1
        if retry_failed or not known:
            pending.append(_request(row, identity, max((one["attempts"] for one in failed), default=0)))
    return Comparison(tuple(pending), retired, counts, tuple(sorted(lost)))


def _held(parts: Sequence[Part]) -> dict[str, list[tuple[Part, int, Identity]]]:
    held: dict[str, list[tuple[Part, int, Identity]]] = {}
    for part in parts:
        for index, row in enumerate(part.rows):
            place = (part, index, tuple(row[key] for key in IDENTITY))
            held.setdefault(row["video_id"], []).append(place)
    return held


def _failures(uri: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for part in read_parts(uri, "failures", FAILURE_SCHEMA.names)[0]:
        for row in part.rows:
            found.setdefault(row["video_id"], []).append(row)
    return found


def _identity(row: ManifestRow, version: FileVersion | DataError) -> Identity:
    if isinstance(version, DataError):
        return (row.start_s, row.end_s, None, None)
    return (row.start_s, row.end_s, version.size_bytes, version.version)


def _same(stored: Identity, now: Identity) -> bool:
    """Whether a row is of the clip as it is now; a file of unknown version is taken for the same."""
    return stored == now or (stored[:2] == now[:2] and now[2:] == (None, None))


def _retire(
    retired: dict[str, dict[str, str]],
    video_id: str,
    stored: Sequence[tuple[Part, int, Identity]],
    match: tuple[Part, int, Identity] | None,
    reason: str,
) -> int:
    for one in stored:
        if one is not match:
            doubled = match is not None and one[2] == match[2]
            retired.setdefault(one[0].checksum, {})[video_id] = "doubled" if doubled else reason
    return 1 if stored else 0


def _request(row: ManifestRow, identity: Identity, attempts: int) -> dict[str, Any]:
    return {
        "video_id": row.video_id,
        "uri": row.uri,
        **dict(zip(IDENTITY, identity, strict=True)),
        "attempts": attempts,
    }
