"""Arrays and records of imported features, as a person's own encoders would leave them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def draw_arrays(
    rng: np.random.Generator, videos: int, *, frames: int = 4, widths: tuple[int, int] = (16, 12)
) -> dict[str, np.ndarray]:
    """Draws features of videos with 1 to ``frames`` frames and 2 captions each.

    Both show four numbers of their video, by two linear maps that adapters can bring together.
    """
    counts = rng.integers(1, frames + 1, videos)
    meaning = rng.standard_normal((videos, 4))
    image, text = (rng.standard_normal((4, width)) for width in widths)
    frame_owner = np.repeat(np.arange(videos), counts)
    caption_owner = np.repeat(np.arange(videos), 2)

    def noisy(values: np.ndarray) -> np.ndarray:
        return (values + 0.1 * rng.standard_normal(values.shape)).astype(np.float16)

    return {
        "frames": noisy(meaning[frame_owner] @ image),
        "frame_owner": frame_owner.astype(np.int16),
        "captions": noisy(meaning[caption_owner] @ text),
        "caption_owner": caption_owner.astype(np.int32),
    }


def draw_records(videos: int, *, val: int = 4, test: int = 6) -> list[dict[str, Any]]:
    """Returns records of videos: train first, then ``validate`` and ``test``."""
    train = videos - val - test
    splits = ["train"] * train + ["validate"] * val + ["test"] * test
    return [
        {"video_id": f"v{number}", "split": split, "captions": [f"one of {number}", f"other of {number}"]}
        for number, split in enumerate(splits)
    ]


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """Writes arrays as an .npz file and returns its path."""
    np.savez(path, **arrays)
    return str(path)


def write_records(path: Path, records: list[dict[str, Any]]) -> str:
    """Writes records as JSON Lines and returns the path."""
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def write_parquet(folder: Path, arrays: Mapping[str, np.ndarray], *, fixed: bool, pieces: int = 2) -> str:
    """Writes arrays as Parquet files, several a side, with lists of fixed size or not; returns the folder."""
    folder.mkdir()
    for side, owner in (("frames", "frame_owner"), ("captions", "caption_owner")):
        for number, rows in enumerate(np.array_split(np.arange(len(arrays[side])), pieces)):
            values = arrays[side][rows]
            flat = pa.array(values.reshape(-1))
            column: Any
            if fixed:
                column = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
            else:
                offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
                column = pa.ListArray.from_arrays(pa.array(offsets), flat)
            table = pa.table({side: column, owner: pa.array(arrays[owner][rows])})
            pq.write_table(table, folder / f"{side}-{number}.parquet")
    return str(folder)
