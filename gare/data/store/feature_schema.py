"""The feature store: outputs of CLIP's towers for clips' frames and captions, in Parquet parts.

A store as ``gare.data.store.contents`` describes it, of kind ``features``. One row a clip: the image tower's
output for each frame and the text tower's for each caption, both after CLIP's projection and not normalised,
as the model takes them. Parts of the model after the towers are not in it and can learn.

M clips, F frames, C captions, W words, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gare.config import Config, ModelConfig
from gare.data.manifest import ManifestRow
from gare.data.store.contents import (
    ADDED_COLUMNS,
    FAILURE_SCHEMA,
    IDENTITY,
    SCHEMA_VERSION,
    Store,
    frame_settings,
    read_columns,
)
from gare.data.store.part_index import DIGEST, digest_of
from gare.errors import DataError


def feature_schema(num_frames: int, width: int, num_words: int = 0) -> pa.Schema:
    """Returns the columns of a feature store's data parts.

    ``frames`` is one fixed-shape tensor (F, D) float16, zero where padded, with ``num_frames`` real rows;
    ``text`` a list of tensors (D,), one a caption; ``num_tokens`` the number of tokens of each caption, both
    markers included; ``words`` a list of tensors (W, D), zero where padded.

    Args:
        num_frames: F.
        width: D.
        num_words: W if word features are stored, else 0.
    """
    half = pa.float16()
    columns: dict[str, pa.DataType] = {
        "video_id": pa.string(),
        "uri": pa.string(),
        **{name: FAILURE_SCHEMA.field(name).type for name in IDENTITY},
        "num_frames": pa.int32(),
        "frames": pa.fixed_shape_tensor(half, [num_frames, width]),
        "captions": pa.list_(pa.string()),
        "num_tokens": pa.list_(pa.int32()),
        "text": pa.list_(pa.fixed_shape_tensor(half, [width])),
    }
    if num_words:
        columns["words"] = pa.list_(pa.fixed_shape_tensor(half, [num_words, width]))
    # Rules of the frames that the features were made of.
    columns["rules"] = ADDED_COLUMNS["rules"]
    return pa.schema(columns)


def feature_settings(config: Config, towers_sha256: str) -> dict[str, Any]:
    """Returns all settings that change the values of a feature store; their hash is the fingerprint.

    Args:
        config: settings of the frames and of the features made of them.
        towers_sha256: of the towers' weights.
    """
    return frame_settings(config.extract) | {
        "kind": "features",
        "schema_version": SCHEMA_VERSION,
        "towers_sha256": towers_sha256,
        "embed_dim": config.model.clip.embed_dim,
        "max_words": config.model.max_words,
        "words": config.features.words,
        "precision": config.features.precision,
    }


def imported_settings(model: ModelConfig, arrays_sha256: str, widths: Mapping[str, int]) -> dict[str, Any]:
    """Returns the same as ``feature_settings`` for a store of imported features, which no towers made.

    Args:
        model: the model that it is for.
        arrays_sha256: of the features.
        widths: of ``frames`` and ``captions``, before they are padded.
    """
    return {
        "kind": "features",
        "schema_version": SCHEMA_VERSION,
        "arrays_sha256": arrays_sha256,
        "widths": dict(widths),
        "num_frames": model.max_frames,
        "embed_dim": model.clip.embed_dim,
        "max_words": model.max_words,
        "words": False,
    }


def settings_of_imported(uri: str, model: ModelConfig) -> dict[str, Any]:
    """Returns the settings that a store of imported features must have for a model, of the arrays in it.

    Raises:
        DataError: if there is no store, or one that an extraction made.
    """
    if not (store := Store(uri)).exists:
        raise DataError(
            "there is no store here", where=uri, accepted="run pipelines/import_features.py first"
        )
    stored = store.read_meta().settings
    if "arrays_sha256" not in stored:
        raise DataError(
            "is a store that an extraction made, and data.benchmark is features",
            where=uri,
            accepted="another name for imported features, or the benchmark of the extraction",
        )
    return imported_settings(model, stored["arrays_sha256"], stored["widths"])


def feature_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Builds a table of rows, for ``gare.data.store.parts.write_table``.

    Args:
        rows: one mapping a clip with the columns of the schema, tensors as float16 arrays.
        schema: of the part.
    """
    columns = [_column([row[field.name] for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _column(values: Sequence[Any], kind: pa.DataType) -> pa.Array[Any]:
    if isinstance(kind, pa.FixedShapeTensorType):
        return _tensors(np.stack(values), kind)
    if isinstance(kind, pa.ListType) and isinstance(kind.value_type, pa.FixedShapeTensorType):
        offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
        tensors = _tensors(np.concatenate(values), kind.value_type)
        lists: pa.Array[Any] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), tensors)
        return lists
    column: pa.Array[Any] = pa.array(values, kind)
    return column


def _tensors(values: npt.NDArray[np.float16], kind: Any) -> pa.Array[Any]:
    flat = pa.array(np.ascontiguousarray(values, dtype=np.float16).reshape(-1))
    storage = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(kind.shape)))
    return pa.ExtensionArray.from_storage(kind, storage)


def stored_frames(part: str) -> dict[str, dict[str, Any]]:
    """Reads ``frames`` (F, D) float16 and ``num_frames`` of each clip of a part.

    Raises:
        DataError: if it cannot be read.
    """
    table = read_columns(part, ["video_id", "num_frames", "frames"])
    column: Any = table["frames"].combine_chunks()
    rows = zip(*(table[name].to_pylist() for name in ("video_id", "num_frames")), strict=True)
    return {
        str(video_id): {"frames": frames, "num_frames": count}
        for (video_id, count), frames in zip(rows, column.to_numpy_ndarray(), strict=True)
    }


def with_other_captions(uri: str, rows: Sequence[ManifestRow]) -> set[str]:
    """Returns ids of the manifest that are stored with other captions than it has now.

    Raises:
        DataError: for a part that cannot be read.
    """
    stored = Store(uri).clips([DIGEST])
    digests = stored.taken(DIGEST, [row.video_id for row in rows])
    return {
        row.video_id
        for row, digest in zip(rows, digests, strict=True)
        if digest is not None and digest != digest_of(row.captions)
    }
