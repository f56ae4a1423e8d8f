"""Features of one's own encoders: reads arrays and records, and checks that they belong together.

N frames, C captions, V videos in the records, F frames of a video, D width of frames, E of captions.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gare.data.benchmarks.formats.captions_file import SPLIT_NAMES
from gare.data.benchmarks.formats.texts import decode_text
from gare.data.collected_errors import CollectedErrors, join_first
from gare.data.manifest import Manifest, ManifestRow
from gare.data.noise import describe_noise, draw_exchange, exchange_captions
from gare.errors import DataError, without_secrets
from gare.storage.files import list_files, read_bytes

#: Names of the arrays by side: features, and the video of each.
SIDES = {"frames": "frame_owner", "captions": "caption_owner"}
#: Placeholder for the location of a video, which nothing here reads.
NO_VIDEO = "imported features"
LARGEST = float(np.finfo(np.float16).max)

_Array: TypeAlias = npt.NDArray[Any]
_Half: TypeAlias = npt.NDArray[np.float16]


@dataclass(frozen=True)
class ImportedVideo:
    """Features of a video.

    Attributes:
        row: of the manifest; texts of the captions are placeholders if the records have none.
        frames: (F, D), in the order of the array.
        captions: (captions, E), in the order of the row's texts.
    """

    row: ManifestRow
    frames: _Half
    captions: _Half


@dataclass(frozen=True)
class ImportedFeatures:
    """Features of all videos of a collection.

    Attributes:
        videos: in the order of the records.
        sha256: SHA-256 of the files that they were read from, by name.
        protocol: splits as the records have them, and noise.
    """

    videos: tuple[ImportedVideo, ...]
    sha256: Mapping[str, str]
    protocol: str = "splits of the records"

    @property
    def widths(self) -> dict[str, int]:
        """Widths D and E of frames and captions."""
        first = self.videos[0]
        return {"frames": first.frames.shape[1], "captions": first.captions.shape[1]}

    @property
    def manifest(self) -> Manifest:
        """The manifest of the videos.

        Raises:
            DataError: for rows that break its contract, such as blank captions.
        """
        rows = tuple(video.row for video in self.videos)
        return Manifest(rows, "features", self.protocol, dict(self.sha256))

    def arrays_sha256(self) -> str:
        """Hashes all features (SHA-256), whatever file format and order of videos they were read in."""
        digest = hashlib.sha256(json.dumps(self.widths, sort_keys=True).encode())
        for video in sorted(self.videos, key=lambda video: video.row.video_id):
            shapes = [video.row.video_id, len(video.frames), len(video.captions)]
            digest.update(json.dumps(shapes).encode() + b"\n")
            digest.update(np.ascontiguousarray(video.frames, "<f2").data)
            digest.update(np.ascontiguousarray(video.captions, "<f2").data)
        return digest.hexdigest()

    def with_noise(self, fraction: float, seed: int) -> ImportedFeatures:
        """Exchanges a share of the train captions between videos, texts and features alike.

        Raises:
            ConfigError: as ``gare.data.noise.draw_exchange``.
        """
        rows = [video.row for video in self.videos]
        sources = draw_exchange(rows, fraction, seed)
        captions = np.concatenate([video.captions for video in self.videos])[sources]
        ends = np.cumsum([len(row.captions) for row in rows])[:-1]
        pieces = np.split(captions, ends)
        videos = tuple(
            replace(video, row=row, captions=piece)
            for video, row, piece in zip(self.videos, exchange_captions(rows, sources), pieces, strict=True)
        )
        return replace(self, videos=videos, protocol=f"{self.protocol}; {describe_noise(fraction, seed)}")


def read_imported(features: str, records: str, *, max_frames: int, width: int) -> ImportedFeatures:
    """Reads arrays and records, and checks that they belong together.

    Args:
        features: location of an .npz file, which is opened without pickles, or of a folder of Parquet files:
            each has the columns ``frames`` and ``frame_owner``, or ``captions`` and ``caption_owner``, and
            files follow each other in the order of their names.
        records: location of JSON Lines, see ``read_records``.
        max_frames: most frames that a video may have.
        width: greatest width of frames and captions.

    Raises:
        DataError: with all faults of the arrays and how they fit the records, each with its first ten places.
    """
    rows, records_sha256 = read_records(records)
    arrays, arrays_sha256 = _read_arrays(features)
    where, faults = without_secrets(features), CollectedErrors()
    _check_shapes(arrays, faults)
    faults.raise_if_any(
        where, accepted="frames (n, D), frame_owner (n,), captions (m, D'), caption_owner (m,)"
    )
    _check_widths(arrays, width, where)
    halves = {side: _half(arrays[side], side, faults) for side in SIDES}
    for side, owner in SIDES.items():
        _check_owners(arrays[owner], side, rows, faults)
    faults.raise_if_any(where)
    groups = {side: _group(arrays[owner].astype(np.int64), len(rows)) for side, owner in SIDES.items()}
    _check_lengths(groups["frames"], rows, max_frames, where)
    videos = []
    for number, row in enumerate(rows):
        captions = groups["captions"][number]
        texts = row.captions or tuple(f"{row.video_id} #{at + 1}" for at in range(len(captions)))
        if len(texts) != len(captions):
            faults.add(
                "number of captions",
                f"{row.video_id!r} has {len(texts)} texts in {without_secrets(records)} and {len(captions)} "
                "rows of captions",
            )
        frames = halves["frames"][groups["frames"][number]]
        videos.append(ImportedVideo(replace(row, captions=texts), frames, halves["captions"][captions]))
    faults.raise_if_any(where, accepted="a text for each row of captions, or no texts at all")
    return ImportedFeatures(tuple(videos), {**arrays_sha256, **records_sha256})


def read_records(location: str) -> tuple[list[ManifestRow], dict[str, str]]:
    """Reads the records of videos: ``video_id``, ``split`` and, in all of them or none, ``captions``.

    Returns:
        The rows in order, without captions if the records have none; SHA-256 of the file by its name.

    Raises:
        DataError: for a file that is not JSON Lines, and with all faults of single records.
    """
    data, where = read_bytes(location), without_secrets(location)
    faults, rows = CollectedErrors(), []
    for number, line in enumerate(decode_text(where, data).split("\n"), 1):
        if line.strip() and (row := _read_record(line, f"line {number}", faults)):
            rows.append(row)
    times = Counter(row.video_id for row in rows)
    for video_id, count in times.items():
        if count > 1:
            faults.add("video_id used more than once", f"{video_id!r} ({count} times)")
    without = [row.video_id for row in rows if not row.captions]
    if without and len(without) < len(rows):
        faults.add("captions missing where other records have them", join_first(map(repr, without)))
    accepted = '{"video_id": "a", "split": "train", "captions": ["…"]} a line, captions in all or none'
    faults.raise_if_any(where, accepted=accepted)
    if not rows:
        raise DataError("has no records", where=where, accepted=accepted)
    return rows, {_name(location): hashlib.sha256(data).hexdigest()}


def _read_record(line: str, where: str, faults: CollectedErrors) -> ManifestRow | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        faults.add("not JSON", f"{where}: {error}")
        return None
    if not isinstance(record, Mapping):
        faults.add("not an object", where)
        return None
    video_id, split, captions = (record.get(key) for key in ("video_id", "split", "captions"))
    if not isinstance(video_id, str) or not video_id:
        faults.add("no video_id", where)
        return None
    known = SPLIT_NAMES.get(split.strip().lower()) if isinstance(split, str) else None
    if known is None:
        faults.add("split is not one of train, val, test", f"{video_id!r}: {split!r} ({where})")
    texts = [] if captions is None else captions
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        faults.add("captions is not a list of texts", f"{video_id!r} ({where})")
        texts = []
    return ManifestRow(video_id, NO_VIDEO, None, None, known or "train", tuple(texts))


def _name(location: str) -> str:
    return (
        location.partition("?")[0].rstrip("/").rpartition("/")[2]
        if "://" in location
        else Path(location).name
    )


def _read_arrays(location: str) -> tuple[dict[str, _Array], dict[str, str]]:
    """Reads the four arrays; returns them with SHA-256 of the files by name."""
    where = without_secrets(location)
    if _name(location).lower().endswith(".npz"):
        data = read_bytes(location)
        return _read_npz(data, where), {_name(location): hashlib.sha256(data).hexdigest()}
    if location.lower().endswith(".parquet") or not (parts := list_files(location, ".parquet")):
        raise DataError(
            "is neither an .npz file nor a folder of Parquet files", where=where, accepted="one of the two"
        )
    return _read_parquet(parts, where)


def _read_npz(data: bytes, where: str) -> dict[str, _Array]:
    accepted = "an .npz file of numbers, without pickled objects, or a folder of Parquet files"
    arrays: dict[str, _Array] = {}
    try:
        # By default numpy refuses arrays of objects, whose reading would run code.
        file = np.load(io.BytesIO(data))
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it is one array and not an .npz file")
        names = [*SIDES, *SIDES.values()]
        if missing := [name for name in names if name not in file.files]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        for name in names:
            arrays[name] = file[name]
            if not isinstance(arrays[name], np.ndarray):
                raise ValueError(f"{name} is no array")
    except (ValueError, OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"cannot be read: {error}", where=where, accepted=accepted) from error
    return arrays


def _read_parquet(parts: Sequence[str], where: str) -> tuple[dict[str, _Array], dict[str, str]]:
    pieces: dict[str, list[_Array]] = {name: [] for name in (*SIDES, *SIDES.values())}
    sha256 = {}
    for part in parts:
        data = read_bytes(part)
        sha256[_name(part)] = hashlib.sha256(data).hexdigest()
        try:
            table = pq.read_table(pa.BufferReader(data))
            side = next((side for side in SIDES if side in table.column_names), "")
            if not side or SIDES[side] not in table.column_names:
                raise ValueError(f"its columns are {', '.join(table.column_names)}")
            pieces[side].append(_matrix(table[side].combine_chunks()))
            owner = SIDES[side]
            pieces[owner].append(table[owner].combine_chunks().to_numpy(zero_copy_only=False))
        except (ValueError, OSError, pa.ArrowException) as error:
            raise DataError(
                f"cannot be read: {error}",
                where=without_secrets(part),
                accepted="the columns " + " or ".join(f"{side}, {owner}" for side, owner in SIDES.items()),
            ) from error
    if missing := [side for side in SIDES if not pieces[side]]:
        raise DataError(f"no Parquet file has the column {missing[0]}", where=where)
    widths = {side: {piece.shape[1] for piece in pieces[side]} for side in SIDES}
    if uneven := [side for side in SIDES if len(widths[side]) > 1]:
        raise DataError(f"{uneven[0]} are of several widths, {sorted(widths[uneven[0]])}", where=where)
    return {name: np.concatenate(arrays) for name, arrays in pieces.items()}, sha256


def _matrix(column: Any) -> _Array:
    """Returns a column of lists of one length, fixed in its type or not, as rows of a matrix."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if column.null_count or not hasattr(column, "flatten") or pa.types.is_struct(column.type):
        raise ValueError("features are not lists of numbers, one a row")
    flat: _Array = column.flatten().to_numpy(zero_copy_only=False)
    if pa.types.is_fixed_size_list(column.type):
        return flat.reshape(len(column), column.type.list_size)
    lengths = set(column.value_lengths().to_pylist())
    if len(lengths) > 1:
        raise ValueError(f"features are lists of several lengths, {sorted(lengths)[:3]}")
    return flat.reshape(len(column), *lengths or {0})


def _check_shapes(arrays: Mapping[str, _Array], faults: CollectedErrors) -> None:
    for side, owner in SIDES.items():
        values, owners = arrays[side], arrays[owner]
        if values.ndim != 2 or not values.size:
            faults.add("not a matrix", f"{side} {values.shape}")
        if values.dtype.kind != "f":
            faults.add("not numbers of floating point", f"{side} of type {values.dtype}")
        if owners.dtype.kind not in "iu":
            faults.add("not whole numbers", f"{owner} of type {owners.dtype}")
        if owners.shape != values.shape[:1]:
            faults.add("not one owner for each row", f"{owner} {owners.shape} for {side} {values.shape}")


def _check_widths(arrays: Mapping[str, _Array], width: int, where: str) -> None:
    widths = {side: arrays[side].shape[1] for side in SIDES}
    if max(widths.values()) > width:
        raise DataError(
            f"frames are {widths['frames']} wide and captions {widths['captions']}, and model.clip.embed_dim "
            f"is {width}",
            where=where,
            accepted=f"model.clip.embed_dim={max(widths.values())} or more",
        )


def _half(values: _Array, side: str, faults: CollectedErrors) -> _Half:
    """Converts features to float16, in which they are stored."""
    finite = np.isfinite(values).all(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        half = values.astype(np.float16)
    small = np.isfinite(half).all(axis=1)
    for rows, kind in ((~finite, "not finite"), (finite & ~small, f"beyond float16's largest, {LARGEST:g}")):
        if places := np.flatnonzero(rows).tolist():
            faults.add(kind, f"{side} in rows {join_first(map(str, places))}")
    return half


def _check_owners(owners: _Array, side: str, rows: Sequence[ManifestRow], faults: CollectedErrors) -> None:
    wrong = (owners < 0) | (owners >= len(rows))
    if places := np.flatnonzero(wrong).tolist():
        shown = join_first(f"{owners[place]} in row {place}" for place in places)
        faults.add(f"{SIDES[side]} is not a record from 0 to {len(rows) - 1}", shown)
        return
    if lacking := sorted(set(range(len(rows))).difference(owners.tolist())):
        shown = join_first(f"{rows[number].video_id!r} (record {number})" for number in lacking)
        faults.add(f"videos without {side}", shown)


def _group(owners: npt.NDArray[np.int64], count: int) -> list[npt.NDArray[np.int64]]:
    """Returns the rows of each owner, in their order."""
    order = np.argsort(owners, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owners, minlength=count))[:-1])


def _check_lengths(
    groups: Sequence[npt.NDArray[np.int64]], rows: Sequence[ManifestRow], limit: int, where: str
) -> None:
    """Refuses videos of too many frames: which of them to leave out is the user's choice."""
    longest = max(map(len, groups))
    if longest > limit:
        long = [
            f"{row.video_id!r} {len(group)}"
            for row, group in zip(rows, groups, strict=True)
            if len(group) > limit
        ]
        raise DataError(
            f"{len(long)} videos have more frames than model.max_frames, {limit}: {join_first(long)}",
            where=where,
            accepted=f"model.max_frames={longest}, or fewer frames in the file",
        )
