"""The manifest: all clips with their splits and captions, as a Parquet file that prepare writes."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gare.data.collected_errors import CollectedErrors
from gare.errors import DataError
from gare.storage.files import exists, open_fs, read_bytes, write_atomically
from gare.storage.uris import is_uri, scheme_of

SPLITS = ("train", "val", "test")
SCHEMA_VERSION = 1
_COLUMNS: list[pa.Field[Any]] = [
    pa.field("video_id", pa.string()),
    pa.field("uri", pa.string()),
    pa.field("start_s", pa.float64()),
    pa.field("end_s", pa.float64()),
    pa.field("split", pa.string()),
    pa.field("captions", pa.list_(pa.string())),
]
SCHEMA = pa.schema(_COLUMNS)
#: Rows that are read as Python objects at once.
_ROWS_AT_ONCE = 10_000
#: Column of manifests with noise alone.
NOISY = pa.field("noisy", pa.list_(pa.bool_()))
_METADATA = (
    "schema_version",
    "benchmark",
    "protocol",
    "annotation_sha256",
    "counts",
    "fingerprint",
    "left_out",
)


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One clip.

    Attributes:
        video_id: name of the clip, unique in the manifest.
        uri: location of the video file: a local path or a URI.
        start_s: seconds into the file at which the clip starts; None for the beginning.
        end_s: seconds into the file at which it ends; None for the end.
        split: train, val or test.
        captions: at least one text; none where no clip of the manifest has one.
        noisy: for each caption, True if it is another video's (``gare.data.noise``); empty without noise.
    """

    video_id: str
    uri: str
    start_s: float | None
    end_s: float | None
    split: str
    captions: tuple[str, ...]
    noisy: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """All clips of a data set.

    Attributes:
        rows: the clips, in the order in which they are read.
        benchmark: name of the data set.
        protocol: name of the split, as a person would cite it.
        annotation_sha256: SHA-256 of every annotation file, by its name.
        left_out: names of videos that were found but not used, such as those without a caption.
        deviations: differences of annotations or videos from the published benchmark, with ids.

    Raises:
        DataError: for rows that break the contract, with the ids of all of them.
    """

    rows: tuple[ManifestRow, ...]
    benchmark: str
    protocol: str
    annotation_sha256: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self.rows)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that a result depends on: ids, start, end, split, captions and noise of every clip.

        URIs and the order of the rows do not count, so that moving the folder changes nothing.
        """
        digest = hashlib.sha256()
        for row in sorted(self.rows, key=lambda row: row.video_id):
            content: list[Any] = [
                row.video_id,
                _number(row.start_s),
                _number(row.end_s),
                row.split,
                list(row.captions),
            ]
            content += [list(row.noisy)] if any(row.noisy) else []
            digest.update(json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode() + b"\n")
        return digest.hexdigest()

    @cached_property
    def counts(self) -> dict[str, dict[str, int]]:
        """Videos and captions of each split: ``{split: {"videos": …, "captions": …}}``, empty ones too."""
        counts = {split: {"videos": 0, "captions": 0} for split in SPLITS}
        for row in self.rows:
            counts[row.split]["videos"] += 1
            counts[row.split]["captions"] += len(row.captions)
        return counts

    def of_split(self, split: str) -> tuple[ManifestRow, ...]:
        """Returns the rows of one split, in order.

        Raises:
            DataError: for an unknown split.
        """
        if split not in SPLITS:
            raise DataError(f"there is no split {split!r}", accepted=", ".join(SPLITS))
        return tuple(row for row in self.rows if row.split == split)


def write_manifest(manifest: Manifest, uri: str) -> None:
    """Writes the manifest as one Parquet file, whole or not at all; with signed links for the user alone.

    Raises:
        DataError: if it cannot be written.
    """
    schema = SCHEMA.append(NOISY) if any(row.noisy for row in manifest.rows) else SCHEMA
    columns = {name: [getattr(row, name) for row in manifest.rows] for name in schema.names}
    metadata = {
        "schema_version": str(SCHEMA_VERSION),
        "benchmark": manifest.benchmark,
        "protocol": manifest.protocol,
        "annotation_sha256": json.dumps(manifest.annotation_sha256),
        "counts": json.dumps(manifest.counts),
        "fingerprint": manifest.fingerprint,
        "left_out": json.dumps(manifest.left_out),
        "deviations": json.dumps(manifest.deviations),
    }
    table = pa.table(columns, schema=schema).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    # The query of a link may be a signature, with which anybody could read the video until it expires.
    signed = any(scheme_of(row.uri) in ("http", "https") and "?" in row.uri for row in manifest.rows)
    write_atomically(uri, sink.getvalue().to_pybytes(), private=signed)


def read_manifest(uri: str) -> Manifest:
    """Reads a manifest back.

    Raises:
        DataError: if it is missing, not Parquet, has other columns, breaks the contract or does not match its
            fingerprint.
    """
    if not exists(uri):
        raise DataError("there is no manifest", where=uri, accepted="run pipelines/prepare.py first")
    data = read_bytes(uri)
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"is not a Parquet file: {error}",
            where=uri,
            accepted="a manifest written by pipelines/prepare.py",
        ) from error
    table = _with_our_columns(table, uri)
    metadata = _metadata(table, uri)
    try:
        manifest = Manifest(
            rows=tuple(_rows_of(table)),
            benchmark=metadata["benchmark"],
            protocol=metadata["protocol"],
            annotation_sha256=metadata["annotation_sha256"],
            left_out=tuple(metadata["left_out"]),
            deviations=tuple(metadata["deviations"]),
        )
    except DataError as error:
        raise DataError(error.what, where=uri, accepted=error.accepted) from error
    if manifest.fingerprint != metadata["fingerprint"]:
        raise DataError(
            f"its rows have fingerprint {manifest.fingerprint}, but it was written with "
            f"{metadata['fingerprint']}: it was changed by hand or damaged",
            where=uri,
            accepted="change the annotations and run pipelines/prepare.py again",
        )
    return manifest


def require_captions(uri: str) -> None:
    """Raises an error if the videos of a manifest have no captions; reads its description alone.

    A manifest that is missing or damaged passes: ``read_manifest`` says so.

    Raises:
        DataError: for a manifest without captions.
    """
    filesystem, path = open_fs(uri)
    try:
        metadata = pq.read_schema(path, filesystem=filesystem).metadata or {}
        counts = json.loads(metadata.get(b"counts", b"{}"))
    except (pa.ArrowException, OSError, ValueError):
        return
    if counts and not any(count["captions"] for count in counts.values()):
        raise DataError(
            "its videos have no captions, which training and evaluation need",
            where=uri,
            accepted="run pipelines/prepare.py again with data.captions=FILE; what is extracted is kept",
        )


def _rows_of(table: pa.Table) -> Iterator[ManifestRow]:
    """Yields the rows; a split is one string for all of its rows."""
    for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
        columns = [batch.column(name).to_pylist() for name in SCHEMA.names]
        has_noise = NOISY.name in table.column_names
        columns.append(batch.column(NOISY.name).to_pylist() if has_noise else [None] * len(batch))
        for video_id, uri, start_s, end_s, split, captions, noisy in zip(*columns, strict=True):
            yield ManifestRow(
                video_id,
                uri,
                start_s,
                end_s,
                sys.intern(split or ""),
                tuple(captions or ()),
                tuple(noisy or ()),
            )


def _with_our_columns(table: pa.Table, uri: str) -> pa.Table:
    schema = SCHEMA.append(NOISY) if NOISY.name in table.column_names else SCHEMA
    missing = [name for name in schema.names if name not in table.column_names]
    unknown = [name for name in table.column_names if name not in schema.names]
    mistyped = []
    columns = []
    for column in schema:
        if column.name in missing:
            continue
        try:
            columns.append(table.column(column.name).cast(column.type))
        except (pa.ArrowException, KeyError):
            mistyped.append(
                f"{column.name} of type {table.schema.field(column.name).type}, not {column.type}"
            )
    faults = [
        f"{kind} columns: {', '.join(names)}"
        for kind, names in (("missing", missing), ("unknown", unknown), ("mistyped", mistyped))
        if names
    ]
    if faults:
        raise DataError(
            "; ".join(faults),
            where=uri,
            accepted="columns " + ", ".join(f"{column.name}: {column.type}" for column in SCHEMA),
        )
    return pa.table(columns, names=schema.names).replace_schema_metadata(table.schema.metadata)


def _metadata(table: pa.Table, uri: str) -> dict[str, Any]:
    accepted = "a manifest written by this version's pipelines/prepare.py"
    raw = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    version = raw.get("schema_version")
    if version != str(SCHEMA_VERSION):
        raise DataError(f"has schema version {version}, not {SCHEMA_VERSION}", where=uri, accepted=accepted)
    missing = [key for key in _METADATA if key not in raw]
    if missing:
        raise DataError(f"lacks the metadata {', '.join(missing)}", where=uri, accepted=accepted)
    return {
        **raw,
        "annotation_sha256": json.loads(raw["annotation_sha256"]),
        "left_out": json.loads(raw["left_out"]),
        "deviations": json.loads(raw.get("deviations", "[]")),  # older manifests have none
    }


def _number(value: float | None) -> float | None:
    # An int and a float of the same value are the same time.
    return None if value is None else float(value)


def _check(rows: tuple[ManifestRow, ...]) -> None:
    faults = CollectedErrors()
    if not rows:
        raise DataError("no video has a caption", where="manifest", accepted="at least one row")
    times = Counter(row.video_id for row in rows)
    for video_id, count in times.items():
        if count > 1:
            faults.add("video_id used more than once", f"{video_id!r} ({count} times)")
    has_captions = any(row.captions for row in rows)
    for position, row in enumerate(rows):
        name = f"{row.video_id!r}" if row.video_id else f"row {position}"
        if has_captions and not row.captions:
            faults.add("no caption", name)
        _check_row(row, name, faults)
    faults.raise_if_any("manifest")


def _check_row(row: ManifestRow, name: str, faults: CollectedErrors) -> None:
    if not row.video_id:
        faults.add("empty video_id", name)
    if not row.uri:
        faults.add("no uri", name)
    # The signature of a presigned URL opens only this link and expires; a password gives more access.
    if is_uri(row.uri or "") and "@" in re.split(r"[/?#]", row.uri.partition("://")[2])[0]:
        faults.add("name or password in the uri; credentials belong into the environment", name)
    if row.split not in SPLITS:
        faults.add(f"split is not one of {', '.join(SPLITS)}", f"{name}: {row.split!r}")
    if any(not caption or not caption.strip() for caption in row.captions):
        faults.add("blank caption", name)
    if row.noisy and len(row.noisy) != len(row.captions):
        faults.add("noisy is not of the captions", name)
    if any(row.noisy) and row.split != "train":
        faults.add("noise outside of train", name)
    if not all(_is_text(text) for text in (row.video_id, row.uri, *row.captions)):
        faults.add("text that cannot be written in UTF-8", name)
    clip = f"{name}: start {row.start_s}, end {row.end_s}"
    given = [value for value in (row.start_s, row.end_s) if value is not None]
    if any(not math.isfinite(value) or value < 0 for value in given):
        faults.add("start or end is not a time in seconds", clip)
    elif row.end_s is not None and (row.start_s or 0.0) >= row.end_s:
        faults.add("start is not before end", clip)


def _is_text(text: str | None) -> bool:
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        return False
    return True
