"""Reading clips back from a frame store.

M clips, F frames, H×W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gare.data.files import exists, join, open_fs
from gare.data.images import decode_jpeg
from gare.data.parts import is_gone
from gare.data.store import META, ids_in_parts, read_meta
from gare.data.tensor_pages import UnknownPageError, low_bytes
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
        self.encoding = str(meta.settings["encoding"])
        self.places = ids_in_parts(uri, "data")
        self._open = lru_cache(maxsize=OPEN_PARTS)(_OpenPart)

    def read(self, video_ids: Sequence[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """Frames (M, F, H, W, 3) uint8, zero where padded, and their mask (M, F).

        Raises:
            DataError: for an id that the store does not hold, or a clip that cannot be read.
        """
        frames = np.empty((len(video_ids), self.num_frames, self.size, self.size, 3), dtype=np.uint8)
        mask = np.zeros((len(video_ids), self.num_frames), dtype=np.bool_)
        for row, video_id in enumerate(video_ids):
            if video_id not in self.places:
                raise DataError(f"does not hold {video_id!r}", where=self.uri, accepted="one of its videos")
            part, position = self.places[video_id]
            try:
                self._fill(frames[row], mask[row], part, position)
            except DataError as error:
                # Parts are merged while they are read.
                self.places = ids_in_parts(self.uri, "data") if is_gone(error) else self.places
                if self.places.get(video_id) in (None, (part, position)):
                    raise
                self._fill(frames[row], mask[row], *self.places[video_id])
        return frames, mask

    def _fill(
        self, frames: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_], part: str, position: int
    ) -> None:
        try:
            opened = self._open(part)
            count = opened.num_frames[position]
            if not 0 < count <= len(frames):
                raise ValueError(f"{count} frames; accepted: 1 to {len(frames)}")
            if self.encoding == "raw":
                opened.fill(frames, position)
            else:
                jpegs = opened.read(position, ["frames"])["frames"][0].as_py()
                # strict: a frame that the row lacks would be read as a black one.
                for frame, jpeg in zip(frames[:count], jpegs, strict=True):
                    frame[:] = decode_jpeg(jpeg)
                frames[count:] = 0
        except (OSError, ValueError, pa.ArrowException, DataError) as error:
            raise DataError(f"row {position} cannot be read: {error}", where=part) from error
        mask[:count] = True


class _OpenPart:
    """A part, of which a row group is a clip."""

    def __init__(self, part: str) -> None:
        filesystem, path = open_fs(part)
        self.file: Any = filesystem.open_input_file(path)
        self.parquet: Any = pq.ParquetFile(self.file, page_checksum_verification=True)
        names = self.parquet.schema_arrow.names
        leaves = [self.parquet.schema.column(place).path for place in range(len(self.parquet.schema))]
        self.leaf = leaves.index("frames.list.element") if "frames" in names else -1

    @cached_property
    def num_frames(self) -> list[int]:
        """Real frames of each clip."""
        return [int(count) for count in self.parquet.read(columns=["num_frames"])["num_frames"].to_pylist()]

    def read(self, position: int, columns: list[str]) -> pa.Table:
        table: pa.Table = self.parquet.read_row_group(position, columns=columns)
        return table

    def fill(self, frames: npt.NDArray[np.uint8], position: int) -> None:
        """Raw frames of a clip (F, H, W, 3), zero where padded."""
        chunk = self.parquet.metadata.row_group(position).column(self.leaf)
        try:
            data = self.file.read_at(chunk.total_compressed_size, chunk.data_page_offset)
            pages = low_bytes(data, chunk.compression)
            if sum(map(len, pages)) != frames.size:
                raise UnknownPageError("another number of values")
        except UnknownPageError:
            column: Any = self.read(position, ["frames"])["frames"].combine_chunks()
            frames[:] = column.to_numpy_ndarray()[0]
            return
        flat, place = frames.reshape(-1), 0
        for page in pages:
            flat[place : place + len(page)] = page
            place += len(page)


class NoPictures:
    """Grey pictures in place of a frame store that was not kept, where pictures are for people alone."""

    def read(self, video_ids: Sequence[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """As ``FrameReader.read``, one small grey frame a clip."""
        frames = np.full((len(video_ids), 1, 32, 32, 3), 128, dtype=np.uint8)
        return frames, np.ones((len(video_ids), 1), dtype=np.bool_)


def open_pictures(uri: str) -> FrameReader | NoPictures:
    """The frame store, or grey pictures where there is none.

    Raises:
        DataError: for a store that cannot be read.
    """
    return FrameReader(uri) if exists(join(uri, META)) else NoPictures()
