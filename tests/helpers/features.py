"""Feature stores with random numbers, written as extraction writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gare.config import Config
from gare.data.store.contents import RULES, Store, StoreMeta, fingerprint
from gare.data.store.feature_schema import feature_schema, feature_settings, feature_table
from gare.data.store.parts import write_table


def feature_row(config: Config, video_id: str, rng: np.random.Generator) -> dict[str, Any]:
    """Returns a row of a data part, with one to F frames and one to three captions."""
    model, width = config.model, config.model.clip.embed_dim
    count, captions = int(rng.integers(1, model.max_frames + 1)), int(rng.integers(1, 4))
    frames = rng.standard_normal((model.max_frames, width)).astype(np.float16)
    frames[count:] = 0
    row = {
        "video_id": video_id,
        "uri": f"/videos/{video_id}.mp4",
        "start_s": None,
        "end_s": None,
        "source_bytes": 1000,
        "source_version": "mtime 1",
        "num_frames": count,
        "frames": frames,
        "captions": [f"caption {number} of {video_id}" for number in range(captions)],
        "num_tokens": rng.integers(3, model.max_words + 1, captions).tolist(),
        "text": rng.standard_normal((captions, width)).astype(np.float16),
        "rules": RULES,
    }
    if config.features.words:
        row["words"] = rng.standard_normal((captions, model.max_words, width)).astype(np.float16)
    return row


def write_feature_store(
    uri: str, config: Config, ids: Sequence[str], rng: np.random.Generator, *, part: int = 20
) -> dict[str, dict[str, Any]]:
    """Writes a whole store and returns its rows by id."""
    rows = [feature_row(config, video_id, rng) for video_id in ids]
    words = config.model.max_words if config.features.words else 0
    schema = feature_schema(config.model.max_frames, config.model.clip.embed_dim, words)
    for first in range(0, len(rows), part):
        some = rows[first : first + part]
        write_table(uri, "data", feature_table(some, schema), [row["video_id"] for row in some])
    settings = feature_settings(config, "towers")
    Store(uri).write_meta(StoreMeta("features", fingerprint(settings), settings, {}, True, "", "0"))
    return {row["video_id"]: row for row in rows}
