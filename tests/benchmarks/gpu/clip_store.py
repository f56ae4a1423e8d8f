"""A frame store of generated clips whose pictures are about as hard for JPEG as real videos.

F frames, H×W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from gare.config import ExtractConfig
from gare.data.images import encode_jpeg
from gare.data.store.contents import frame_schema, write_part
from tests.helpers.stores import describe_store, stored_row

#: Number of pictures drawn; clips share them, since drawing and encoding take longest.
PICTURES = 48


def write_clips(uri: str, extract: ExtractConfig, ids: Sequence[str], rng: np.random.Generator) -> None:
    """Writes a complete store of JPEG clips, each with the maximum number of frames."""
    jpegs = [
        encode_jpeg(_picture(rng, extract.image_size), extract.jpeg_quality)
        for _ in range(min(PICTURES, len(ids) * extract.num_frames))
    ]
    numbers = list(range(extract.num_frames))
    rows = []
    for video_id in ids:
        chosen = rng.integers(0, len(jpegs), extract.num_frames)
        row = stored_row(extract, video_id, np.empty((0, 1, 1, 3), dtype=np.uint8))
        row |= {"frames": [jpegs[one] for one in chosen], "num_frames": extract.num_frames}
        rows.append(row | {"frame_idx": numbers, "frame_time_s": [float(number) for number in numbers]})
    for first in range(0, len(rows), extract.videos_per_part):
        part = rows[first : first + extract.videos_per_part]
        write_part(uri, "data", part, frame_schema(extract))
    describe_store(uri, extract)


def _picture(rng: np.random.Generator, size_px: int) -> np.ndarray:
    """Draws random areas with edges and grain: some 25 kB at 224 px and quality 95."""
    coarse = rng.integers(0, 256, (size_px // 8, size_px // 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((size_px, size_px), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 3, (size_px, size_px, 1))
    return np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
