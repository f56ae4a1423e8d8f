"""The frame store: Parquet parts that appear whole or not at all, and their description.

A store is a folder at any URI: ``data/part-*.parquet``, ``failures/part-*.parquet`` and ``_META.json``.
F frames a clip, H×W pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gare.config import ExtractConfig
from gare.data.files import exists, join, list_files, open_fs, read_bytes, write_atomically
from gare.data.tensor_pages import ENCODING, LEVEL
from gare.errors import DataError

SCHEMA_VERSION = 1
META = "_META.json"

_FAILURE_COLUMNS: dict[str, pa.DataType] = {
    "video_id": pa.string(),
    "uri": pa.string(),
    "stage": pa.string(),
    "error_type": pa.string(),
    "message": pa.string(),
    "attempts": pa.int32(),
}
FAILURE_SCHEMA = pa.schema(_FAILURE_COLUMNS)


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
    """Columns of a frame store's data parts.

    ``frames`` is a list of JPEG files, or for raw frames one fixed-shape tensor (F, H, W, 3) uint8 whose
    padded frames are zero; ``num_frames`` of them are real.
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
        "start_s": pa.float64(),
        "end_s": pa.float64(),
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
    }
    return pa.schema(columns)


def frame_settings(extract: ExtractConfig) -> dict[str, Any]:
    """All that changes the values of a frame store; its hash is the fingerprint."""
    settings: dict[str, Any] = {
        "kind": "frames",
        "schema_version": SCHEMA_VERSION,
        "sampling": _SAMPLING[extract.sampling],
        "decoder_policy": _DECODER_POLICY[extract.decoder],
        "picture": "short side to image_size, bicubic, centre crop",
        "num_frames": extract.num_frames,
        "image_size": extract.image_size,
        "encoding": extract.encoding,
    }
    if extract.sampling == "released":
        settings["sample_fps"] = extract.sample_fps
    return settings | ({"jpeg_quality": extract.jpeg_quality} if extract.encoding == "jpeg" else {})


def fingerprint(settings: Mapping[str, Any]) -> str:
    """SHA-256 of the settings in a canonical form."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class StoreMeta:
    """The content of ``_META.json``.

    Attributes:
        kind: frames or features.
        fingerprint: of ``settings``.
        settings: what changes the values.
        counts: videos, failures and parts; empty until a run has gone through.
        complete: whether the last run went through.
        config: resolved configuration of the run that wrote last, as YAML.
        code_version: version of this package that wrote last.
        schema_version: of the store's layout.
    """

    kind: str
    fingerprint: str
    settings: dict[str, Any]
    counts: dict[str, int]
    complete: bool
    config: str
    code_version: str
    schema_version: int = SCHEMA_VERSION


def write_meta(uri: str, meta: StoreMeta) -> None:
    """Replaces the description of the store."""
    text = json.dumps(dataclasses.asdict(meta), indent=2, ensure_ascii=False)
    write_atomically(join(uri, META), text.encode())


def read_meta(uri: str) -> StoreMeta:
    """Reads the description of a store.

    Raises:
        DataError: where there is no store or its description is not ours.
    """
    location = join(uri, META)
    if not exists(location):
        raise DataError(
            "there is no store here", where=uri, accepted="run pipelines/extract.py with this configuration"
        )
    try:
        meta = StoreMeta(**json.loads(read_bytes(location)))
        if meta.schema_version != SCHEMA_VERSION:
            raise ValueError(f"its schema is {meta.schema_version}")
    except (TypeError, ValueError) as error:
        raise DataError(
            f"is not the description of a store of schema {SCHEMA_VERSION}: {error}", where=location
        ) from error
    return meta


def check_settings(uri: str, meta: StoreMeta, settings: Mapping[str, Any]) -> None:
    """Refuses a store that was made with other settings, naming each that differs.

    Raises:
        DataError: with the stored and the asked value of every field that differs.
    """
    if meta.fingerprint == fingerprint(settings):
        return
    keys = sorted(set(settings) | set(meta.settings))
    differing = [
        f"{key} is {meta.settings.get(key)!r} in the store and {settings.get(key)!r} in the configuration"
        for key in keys
        if settings.get(key) != meta.settings.get(key)
    ]
    raise DataError(
        "the store was made with other settings: " + "; ".join(differing or ["its fingerprint is damaged"]),
        where=uri,
        accepted="the same extract settings, or another name for a second store",
    )


def write_part(
    uri: str,
    folder: str,
    rows: Sequence[Mapping[str, Any]],
    schema: pa.Schema,
    group: Sequence[str] | None = None,
) -> str:
    """Writes one part, named by its group of ids, so that a group written twice is one part.

    A row group holds one clip, so that training reads any clip by itself.

    Args:
        uri: the store.
        folder: ``data`` or ``failures``.
        rows: one mapping a clip, with a ``video_id``.
        schema: of the part.
        group: ids of the videos that were tried together, of which ``rows`` are those that ended here; by
            default the ids of the rows. A group that is tried again after a crash may end otherwise (a
            deadline is a matter of luck) and must replace its part, not leave a second one beside it.

    Returns:
        The location of the part.
    """
    columns = [_column([row[field.name] for row in rows], field.type) for field in schema]
    table = pa.Table.from_arrays(columns, schema=schema)
    sink = pa.BufferOutputStream()
    row_group_size = 1 if folder == "data" else len(rows)
    # Training reads such tensors by their low bytes, see gare.data.tensor_pages.
    raw = [f"{field.name}.list.element" for field in schema if _is_byte_tensor(field.type)]
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=dict.fromkeys(raw, LEVEL) or None,
        use_dictionary=False,
        column_encoding=dict.fromkeys(raw, ENCODING) or None,
        row_group_size=row_group_size,
    )
    ids = [row["video_id"] for row in rows] if group is None else group
    digest = hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:20]
    location = join(uri, folder, f"part-{digest}.parquet")
    write_atomically(location, sink.getvalue().to_pybytes())
    return location


def _is_byte_tensor(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.FixedShapeTensorType) and kind.value_type == pa.uint8()


def _column(values: Sequence[Any], kind: pa.DataType) -> pa.Array[Any]:
    if not isinstance(kind, pa.FixedShapeTensorType):
        return pa.array(values, kind)
    # Tensors come as bytes of the exact size; storage is a fixed-size list over one flat buffer.
    flat = pa.Array.from_buffers(
        kind.value_type, sum(map(len, values)), [None, pa.py_buffer(b"".join(values))]
    )
    storage = pa.FixedSizeListArray.from_arrays(flat, math.prod(kind.shape))
    return pa.ExtensionArray.from_storage(kind, storage)


def part_files(uri: str, folder: str) -> list[str]:
    """Locations of a store's parts, sorted."""
    return list_files(join(uri, folder), ".parquet")


def ids_in_parts(uri: str, folder: str) -> dict[str, tuple[str, int]]:
    """Where each video is: id → (part, row).

    Raises:
        DataError: for a part that cannot be read, or an id that two parts hold.
    """
    found: dict[str, tuple[str, int]] = {}
    for part in part_files(uri, folder):
        for row, entry in enumerate(read_columns(part, ["video_id"]).to_pylist()):
            video_id: str = entry["video_id"]
            if video_id in found:
                raise DataError(
                    f"{video_id!r} is in two parts, {found[video_id][0]} and {part}",
                    where=uri,
                    accepted="delete one of them and run pipelines/extract.py again",
                )
            found[video_id] = (part, row)
    return found


def read_failures(uri: str, stored: Container[str]) -> dict[str, dict[str, Any]]:
    """The videos that are still failed, by id, each with its last attempt.

    Args:
        uri: the store.
        stored: ids that the data parts hold; a later attempt brought them in after all.
    """
    rows = [
        row
        for part in part_files(uri, "failures")
        for row in read_columns(part, FAILURE_SCHEMA.names).to_pylist()
        if row["video_id"] not in stored
    ]
    return {row["video_id"]: row for row in sorted(rows, key=lambda row: int(row["attempts"]))}


def read_columns(part: str, columns: Sequence[str]) -> pa.Table:
    """Some columns of a part.

    Raises:
        DataError: if the part is not whole Parquet or lacks a column.
    """
    filesystem, path = open_fs(part)
    try:
        return pq.read_table(path, columns=list(columns), filesystem=filesystem, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"cannot be read: {error}", where=part, accepted="a Parquet part of a store"
        ) from error
