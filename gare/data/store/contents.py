"""The frame store: its columns, its description, and the rows of it that count.

A store is a folder at any URI: ``data/part-*.parquet``, ``failures/part-*.parquet`` and ``_META.json``, and,
if rows no longer count, ``_RETIRED.json``.
F frames a clip, H×W pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from gare.config import ExtractConfig
from gare.data.store.clip_places import ClipPlaces
from gare.data.store.parts import Part, part_files, read_columns, read_parts, write_part
from gare.errors import DataError
from gare.storage.exclusive import replace_file
from gare.storage.files import exists, join, json_bytes, read_json
from gare.storage.generations import HeldStore

__all__ = [
    "ADDED_COLUMNS",
    "EARLIER_FAILURE_SCHEMA",
    "FAILURE_SCHEMA",
    "IDENTITY",
    "META",
    "NO_LOCK",
    "RETIRED",
    "RULES",
    "Store",
    "StoreMeta",
    "fingerprint",
    "frame_schema",
    "frame_settings",
    "part_files",
    "read_columns",
    "rules_of",
    "with_added_columns",
    "without_added_columns",
    "write_part",
]

SCHEMA_VERSION = 2
META = "_META.json"
RETIRED = "_RETIRED.json"
#: Tries to read a store while compactions end: three, and one for a record that was written late.
_LOOKS = 4
NO_LOCK = HeldStore()
#: Version of the rules by which video files are read, in the column ``rules`` of all rows. It rises when some
#: files give other frames; ``gare.data.decode.outdated`` recognises them. Rows without it are of version 1.
RULES = 2

#: Identity of a row's source: the same clip of the same file has the same four, wherever the file lies. The
#: last two are its size, and its modification time or ETag from ``gare.data.videos``.
_IDENTITY_COLUMNS: dict[str, pa.DataType] = {
    "start_s": pa.float64(),
    "end_s": pa.float64(),
    "source_bytes": pa.int64(),
    "source_version": pa.string(),
}
IDENTITY = tuple(_IDENTITY_COLUMNS)
_FAILURE_COLUMNS: dict[str, pa.DataType] = {
    "video_id": pa.string(),
    "uri": pa.string(),
    "stage": pa.string(),
    "error_type": pa.string(),
    "message": pa.string(),
    "attempts": pa.int32(),
    **_IDENTITY_COLUMNS,
}
#: Columns that parts of earlier versions lack; null if an earlier version did not record it. ``transient``:
#: True if a retry may succeed, since a server, disk or node was at fault.
ADDED_COLUMNS: dict[str, pa.DataType] = {"transient": pa.bool_(), "rules": pa.int32()}
FAILURE_SCHEMA = pa.schema(_FAILURE_COLUMNS | ADDED_COLUMNS)
#: Schema of failures in the first versions.
EARLIER_FAILURE_SCHEMA = pa.schema(_FAILURE_COLUMNS)


def rules_of(row: Mapping[str, Any]) -> int:
    """Returns the version of the rules by which a row or failure was made."""
    return row.get("rules") or 1


def without_added_columns(schema: pa.Schema) -> Iterator[pa.Schema]:
    """Yields the schema and those of earlier versions for the same kind of part."""
    added = [name for name in schema.names if name in ADDED_COLUMNS]
    for count in range(len(added) + 1):
        left_out = added[len(added) - count :]
        yield pa.schema([field for field in schema if field.name not in left_out])


def with_added_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Adds nulls for the columns that an earlier version's part lacks, in the order of ``schema``."""
    for name in schema.names:
        if name not in table.column_names and name in ADDED_COLUMNS:
            nulls: Any = pa.array([None] * len(table), ADDED_COLUMNS[name])
            table = table.append_column(schema.field(name), nulls)
    return table.select(schema.names)


_SAMPLING = {
    "released": "presentation times at sample_fps, then num_frames of them at equal steps",
    "uniform": "presentation times at the centres of num_frames equal segments",
    "keyframes": "keyframes, num_frames of them at equal steps (approximate)",
}
_DECODER_POLICY = {
    "auto": "decord where it is right, else PyAV",
    "pyav": "PyAV",
    "torchcodec": "torchcodec where it is right, else PyAV",
}


def frame_schema(extract: ExtractConfig) -> pa.Schema:
    """Returns the columns of a frame store's data parts.

    ``frames`` is a list of JPEG files, or for raw frames one fixed-shape tensor (F, H, W, 3) uint8 with zeros
    for padded frames; ``num_frames`` of them are real. JPEG files have H = W = image_size; uncropped ones
    (``extract.crop`` none) have one size a clip, with short side image_size.
    """
    size, num_frames = extract.image_size, extract.num_frames
    frames = (
        pa.list_(pa.binary())
        if extract.encoding == "jpeg"
        else pa.fixed_shape_tensor(pa.uint8(), [num_frames, size, size, 3])
    )
    columns: dict[str, pa.DataType] = {
        "video_id": pa.string(),
        "uri": pa.string(),
        **_IDENTITY_COLUMNS,
        "num_frames": pa.int32(),
        "frames": frames,
        "frame_idx": pa.list_(pa.int32()),
        "frame_time_s": pa.list_(pa.float64()),
        "width_px": pa.int32(),
        "height_px": pa.int32(),
        "fps": pa.float64(),
        "duration_s": pa.float64(),
        "sampling": pa.string(),
        "container": pa.string(),
        "codec": pa.string(),
        "decoder": pa.string(),
        "decoder_version": pa.string(),
        "complete": pa.bool_(),
        "note": pa.string(),
        "rules": ADDED_COLUMNS["rules"],
    }
    return pa.schema(columns)


#: Settings that a store does not record at this value, so that older stores keep their fingerprint.
_UNSAID = {"crop": "center"}


def frame_settings(extract: ExtractConfig) -> dict[str, Any]:
    """Returns all settings that change the values of a frame store; their hash is the fingerprint."""
    settings: dict[str, Any] = {
        "kind": "frames",
        "schema_version": SCHEMA_VERSION,
        "sampling": _SAMPLING[extract.sampling],
        "decoder_policy": _DECODER_POLICY[extract.decoder],
        "picture": "short side to image_size, bicubic"
        + (", centre crop" if extract.crop == "center" else ", uncropped"),
        "num_frames": extract.num_frames,
        "image_size": extract.image_size,
        "encoding": extract.encoding,
    }
    if extract.sampling == "released":
        settings["sample_fps"] = extract.sample_fps
    if extract.crop != _UNSAID["crop"]:
        settings["crop"] = extract.crop
    return settings | ({"jpeg_quality": extract.jpeg_quality} if extract.encoding == "jpeg" else {})


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Returns SHA-256 of the settings in a canonical form."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class StoreMeta:
    """The content of ``_META.json``.

    Attributes:
        kind: frames or features.
        fingerprint: of ``settings``.
        settings: those that change the values.
        counts: videos, failures and parts; empty until a run has completed.
        complete: True if the last run completed.
        config: resolved configuration of the run that wrote last, as YAML.
        code_version: version of this package that wrote last.
        schema_version: of the store's layout.
        generation: of the job that wrote this, see ``gare.storage.generations``.
    """

    kind: str
    fingerprint: str
    settings: dict[str, Any]
    counts: dict[str, int]
    complete: bool
    config: str
    code_version: str
    schema_version: int = SCHEMA_VERSION
    generation: int = 0


@dataclass(frozen=True)
class Store:
    """A frame or feature store: its description, the rows that count, and its failures.

    Attributes:
        uri: the folder, a local path or a URI.
    """

    uri: str

    @property
    def exists(self) -> bool:
        """True if there is a store, complete or not."""
        return exists(join(self.uri, META))

    def read_meta(self) -> StoreMeta:
        """Reads the description.

        Raises:
            DataError: if there is no store, or its description is of another format.
        """
        location = join(self.uri, META)
        if not exists(location):
            raise DataError(
                "there is no store here",
                where=self.uri,
                accepted="run pipelines/extract.py with this configuration",
            )
        try:
            meta = StoreMeta(**read_json(location))
            if meta.schema_version != SCHEMA_VERSION:
                raise ValueError(f"its schema is {meta.schema_version}")
        except (TypeError, ValueError) as error:
            raise DataError(
                f"is not the description of a store of schema {SCHEMA_VERSION}: {error}", where=location
            ) from error
        return meta

    def read_meta_of(self, settings: Mapping[str, Any]) -> StoreMeta:
        """Reads the description of a store that was made with some settings.

        Raises:
            DataError: as ``read_meta``; for other settings with the stored and the requested value of each
                that differs.
        """
        meta = self.read_meta()
        if meta.fingerprint == fingerprint(settings):
            return meta
        stored, asked = _UNSAID | meta.settings, _UNSAID | dict(settings)
        differing = [
            f"{key} is {stored.get(key)!r} in the store and {asked.get(key)!r} in the configuration"
            for key in sorted({*stored, *asked})
            if asked.get(key) != stored.get(key)
        ]
        raise DataError(
            "the store was made with other settings: "
            + "; ".join(differing or ["its fingerprint is damaged"]),
            where=self.uri,
            accepted="the same extract settings, or another name for a second store",
        )

    def write_meta(self, meta: StoreMeta, held: HeldStore = NO_LOCK) -> None:
        """Replaces the description.

        Raises:
            GareError: if the store is no longer held; then nothing is written.
        """
        meta = dataclasses.replace(meta, generation=held.generation)
        text = json.dumps(dataclasses.asdict(meta), indent=2, ensure_ascii=False)
        replace_file(join(self.uri, META), text.encode(), held.raise_if_lost)

    def read_retired(self) -> dict[str, dict[str, str]]:
        """Reads the rows that no longer count: part's checksum → video id → why (changed, gone or doubled).

        Raises:
            DataError: if the record cannot be read.
        """
        return self._read_record()[0]

    def _read_record(self) -> tuple[dict[str, dict[str, str]], int]:
        """Reads the retired rows, and the generation that wrote them; 0 if none did."""
        location = join(self.uri, RETIRED)
        if not exists(location):
            return {}, 0
        record = read_json(location)
        return record["rows"], record.get("generation", 0)

    def write_retired(self, rows: Mapping[str, Mapping[str, str]], held: HeldStore = NO_LOCK) -> None:
        """Replaces the record of ``read_retired`` in one step.

        Nothing is written if it is the same and of this generation. The first write of a generation always
        changes the file: on S3, a job that lost the lock between its check and its request could still
        replace the file that it found, but no other.

        Raises:
            GareError: if the store is no longer held; then nothing is written.
        """
        if self._read_record() != (rows, held.generation):
            content = json_bytes({"rows": rows, "generation": held.generation})
            replace_file(join(self.uri, RETIRED), content, held.raise_if_lost)

    def ids(self, *, folder: str = "data") -> ClipPlaces:
        """Finds each video that counts: id → (part, row). Rows that are retired or replaced are left out.

        If a job and its successor have both written rows of a video, the newer row counts.

        Args:
            folder: ``data`` or ``failures``.

        Raises:
            DataError: for a part that cannot be read, or an id that two parts of one generation hold.
        """
        return self.clips((), folder=folder)

    def clips(self, columns: Sequence[str], added: Sequence[str] = (), *, folder: str = "data") -> ClipPlaces:
        """Finds videos as ``ids`` does, with some columns of each row.

        Args:
            columns: those to read; of ``gare.data.store.part_index.COLUMNS`` they come without a look at the
                rows.
            added: further columns, which parts of earlier versions lack; their rows have null there.
            folder: ``data`` or ``failures``.

        Raises:
            DataError: for a part that cannot be read or lacks a column, or an id that two parts of one
                generation hold.
        """
        parts, retired = self._parts_and_retired(folder, ["video_id", *columns], added)
        return ClipPlaces.of(self.uri, parts, retired, [*columns, *added])

    def rows(
        self, columns: Sequence[str], added: Sequence[str] = (), *, folder: str = "data"
    ) -> dict[str, tuple[str, int, dict[str, Any]]]:
        """Finds videos as ``clips`` does, each with its part, row and columns; takes kilobytes a clip.

        Args:
            columns: as of ``clips``.
            added: as of ``clips``.
            folder: as of ``clips``.

        Raises:
            DataError: as ``clips``.
        """
        found = self.clips(columns, added, folder=folder)
        rows = found.columns.to_pylist() if found.columns.num_columns else [{} for _ in found]
        return {
            key: (*place, row | {"video_id": key})
            for (key, place), row in zip(found.items(), rows, strict=True)
        }

    def _parts_and_retired(
        self, folder: str, columns: Sequence[str], added: Sequence[str]
    ) -> tuple[list[Part], dict[str, dict[str, str]]]:
        """Reads the parts that count and their retired rows, as of one moment."""
        if folder != "data":
            return read_parts(self.uri, folder, columns, added)[0], {}
        _, before = self._read_record()
        for _ in range(_LOOKS):
            parts, _ = read_parts(self.uri, folder, columns, added)
            if not parts:
                return [], {}
            # Read after the parts: a job that starts meanwhile retires rows before it writes their
            # successors.
            retired, generation = self._read_record()
            # An owner that was suspended may put its record over its successor's. Rows count again that were
            # retired before, and what replaces them may have been written after the parts were listed.
            is_late, before = generation < before, generation
            # A compaction that ends meanwhile deletes a part before its retired rows.
            if not is_late and {part.location for part in parts} <= set(part_files(self.uri, folder)):
                return parts, retired
        raise DataError(
            "other jobs keep merging its parts while it is read", where=self.uri, accepted="try again later"
        )

    def read_failures(self, stored: Container[str]) -> dict[str, dict[str, Any]]:
        """Returns the videos that are still failed, by id, each with its last attempt.

        Args:
            stored: ids in the data parts: a later attempt at them succeeded.
        """
        rows = [row for row in self.all_failures() if row["video_id"] not in stored]
        return {row["video_id"]: row for row in rows}

    def failures_by_clip(self) -> dict[str, list[dict[str, Any]]]:
        """Groups ``all_failures`` by clip id, each group ordered by attempt.

        Raises:
            DataError: for a part that cannot be read.
        """
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self.all_failures():
            found.setdefault(row["video_id"], []).append(row)
        return found

    def all_failures(self) -> list[dict[str, Any]]:
        """Reads all recorded failed attempts, also of videos stored by now, ordered by attempt.

        Raises:
            DataError: for a part that cannot be read.
        """
        parts, _ = read_parts(self.uri, "failures", list(_FAILURE_COLUMNS), list(ADDED_COLUMNS))
        return sorted((row for part in parts for row in part.rows), key=lambda row: int(row["attempts"]))
