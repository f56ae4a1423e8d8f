"""Reading clips back from a frame store.

M clips, F frames, H×W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gare.data.files import open_fs
from gare.data.images import decode_jpeg
from gare.data.store import ids_in_parts, read_meta
from gare.errors import DataError

#: Open Parquet files kept by a process: their footers cost more to read than one clip.
OPEN_PARTS = 256


class FrameReader:
    """Random access to the clips of a frame store.

    Args:
        uri: the store.

    Raises:
        DataError: where there is no frame store.
    """

    def __init__(self, uri: str) -> None:
        meta = read_meta(uri)
        if meta.kind != "frames":
            raise DataError(f"is a store of {meta.kind}", where=uri, accepted="a store of frames")
        self.uri = uri
        self.num_frames = int(meta.settings["num_frames"])
        self.size = int(meta.settings["image_size"])
        self.places = ids_in_parts(uri, "data")
        self._open = lru_cache(maxsize=OPEN_PARTS)(_open_part)

    def read(self, video_ids: Sequence[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """Frames (M, F, H, W, 3) uint8, zero where padded, and their mask (M, F).

        Raises:
            DataError: for an id that the store does not hold, or a clip that cannot be read.
        """
        frames = np.zeros((len(video_ids), self.num_frames, self.size, self.size, 3), dtype=np.uint8)
        mask = np.zeros((len(video_ids), self.num_frames), dtype=np.bool_)
        for row, video_id in enumerate(video_ids):
            if video_id not in self.places:
                raise DataError(f"does not hold {video_id!r}", where=self.uri, accepted="one of its videos")
            part, position = self.places[video_id]
            try:
                self._fill(frames[row], mask[row], part, position)
            except DataError as error:
                # Parts are merged while they are read.
                self.places = ids_in_parts(self.uri, "data") if _is_gone(error) else self.places
                if self.places.get(video_id) in (None, (part, position)):
                    raise
                self._fill(frames[row], mask[row], *self.places[video_id])
        return frames, mask

    def _fill(
        self, frames: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_], part: str, position: int
    ) -> None:
        try:
            row = self._open(part).read_row_group(position, columns=["num_frames", "frames"])
            count = int(row["num_frames"][0].as_py())
            if not 0 < count <= len(frames):
                raise ValueError(f"{count} frames; accepted: 1 to {len(frames)}")
            if isinstance(row.schema.field("frames").type, pa.FixedShapeTensorType):
                frames[:] = row["frames"].combine_chunks().to_numpy_ndarray()[0]
            else:
                # strict: a frame that the row lacks would be read as a black one.
                for index, jpeg in zip(range(count), row["frames"][0].as_py(), strict=True):
                    frames[index] = decode_jpeg(jpeg)
        except (OSError, ValueError, pa.ArrowException, DataError) as error:
            raise DataError(f"row {position} cannot be read: {error}", where=part) from error
        mask[:count] = True


def _is_gone(error: DataError) -> bool:
    return isinstance(error.__cause__, FileNotFoundError)


def _open_part(part: str) -> Any:
    filesystem, path = open_fs(part)
    return pq.ParquetFile(path, filesystem=filesystem, memory_map=False, page_checksum_verification=True)
