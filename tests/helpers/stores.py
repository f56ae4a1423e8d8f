"""Frame stores with random frames, written as extraction writes them.

F frames, H×W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gare.config import ExtractConfig
from gare.data.images import encode_jpeg
from gare.data.manifest import Manifest
from gare.data.store.contents import (
    RULES,
    Store,
    StoreMeta,
    fingerprint,
    frame_schema,
    frame_settings,
    read_columns,
    write_part,
)
from gare.data.videos import LocalVideos, VideoSource
from gare.extract.comparison import compare


def stored_row(extract: ExtractConfig, video_id: str, frames: np.ndarray) -> dict[str, Any]:
    """Returns a row of a data part with these frames (at most F, H, W, 3) uint8."""
    count = len(frames)
    if extract.encoding == "jpeg":
        stored: Any = [encode_jpeg(frame, extract.jpeg_quality) for frame in frames]
    else:
        stored = frames.tobytes() + bytes((extract.num_frames - count) * frames[0].nbytes)
    return {
        "video_id": video_id,
        "uri": f"/videos/{video_id}.mp4",
        "start_s": None,
        "end_s": None,
        "source_bytes": 1000,
        "source_version": "mtime 1",
        "num_frames": count,
        "frames": stored,
        "frame_idx": list(range(count)),
        "frame_time_s": [float(index) for index in range(count)],
        "width_px": 64,
        "height_px": 48,
        "fps": 25.0,
        "duration_s": 2.0,
        "sampling": "released",
        "container": "mov",
        "codec": "h264",
        "decoder": "decord",
        "decoder_version": "0.6.0",
        "complete": True,
        "note": "",
        "rules": RULES,
    }


def failure_row(video_id: str, attempts: int = 1) -> dict[str, Any]:
    """Returns a row of a failures part; the file is at fault."""
    return {
        "video_id": video_id,
        "uri": f"/videos/{video_id}.mp4",
        "stage": "decode",
        "error_type": "DataError",
        "message": f"attempt {attempts}",
        "attempts": attempts,
        "start_s": None,
        "end_s": None,
        "source_bytes": 1000,
        "source_version": "mtime 1",
        "transient": False,
        "rules": RULES,
    }


def random_frames(extract: ExtractConfig, rng: np.random.Generator, count: int) -> np.ndarray:
    """Draws smooth pictures, which JPEG nearly preserves; without a crop one side is randomly longer."""
    small = rng.integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    height = width = size = extract.image_size
    if extract.crop == "none":
        height, width = rng.permuted([size, int(rng.integers(size, 2 * size + 1))])
    return small.repeat((height + 1) // 2, axis=1).repeat((width + 1) // 2, axis=2)[:, :height, :width]


def describe_store(uri: str, extract: ExtractConfig, *, complete: bool = True) -> None:
    """Writes ``_META.json``."""
    settings = frame_settings(extract)
    Store(uri).write_meta(StoreMeta("frames", fingerprint(settings), settings, {}, complete, "", "0"))


def pending_rows(
    manifest: Manifest, store: str, *, retry_failed: bool, source: VideoSource | None = None
) -> list[dict[str, Any]]:
    """Returns the rows that a run over these videos would process."""
    versions = (source or LocalVideos()).stat([row.uri for row in manifest.rows])
    return list(compare(store, manifest.rows, versions, retry_failed=retry_failed).pending)


def stored_values(uri: str) -> dict[str, dict[str, Any]]:
    """Returns every value of every counting row, by id."""
    return {
        video_id: read_columns(part, None).slice(row, 1).to_pylist()[0]
        for video_id, (part, row) in Store(uri).ids().items()
    }


def write_store(
    uri: str, extract: ExtractConfig, ids: Sequence[str], rng: np.random.Generator, *, part: int = 3
) -> dict[str, np.ndarray]:
    """Writes a whole store and returns the frames of each clip."""
    frames = {
        video_id: random_frames(extract, rng, int(rng.integers(1, extract.num_frames + 1)))
        for video_id in ids
    }
    rows = [stored_row(extract, video_id, frames[video_id]) for video_id in ids]
    for first in range(0, len(rows), part):
        write_part(uri, "data", rows[first : first + part], frame_schema(extract))
    describe_store(uri, extract)
    return frames
