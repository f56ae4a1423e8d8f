"""Reading clips back from a frame store.

M clips, F frames, H×W pixels, S pixels of the short side.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gare.data.images import crop_centre, decode_jpeg, size_fault
from gare.data.store.clip_places import ClipPlaces
from gare.data.store.contents import Store
from gare.data.store.pages import UnknownPageError, byte_arrays, low_bytes
from gare.data.store.parts import is_part_gone
from gare.data.store.recent import Recent
from gare.errors import DataError
from gare.storage.files import open_fs

#: Files of parts that a process keeps open.
OPEN_PARTS = 256
#: Bytes of the footers of parts of earlier versions, which have no index, that a process keeps: reading a
#: footer costs more than reading a clip.
FOOTER_BYTES = 64 * 2**20


class FrameReader:
    """Random access to the clips of a frame store.

    Args:
        uri: the store.

    Attributes:
        num_frames: F.
        size: S, pixels of a stored picture's short side.
        crop: center if the pictures are squares, none if they are whole.
        fetch_s: seconds that this reader has spent on reading clips from the store, and on unpacking raw
            frames.
        jpeg_s: seconds that it has spent on decoding JPEG.

    Raises:
        DataError: if there is no frame store.
    """

    def __init__(self, uri: str) -> None:
        meta = Store(uri).read_meta()
        if meta.kind != "frames":
            raise DataError(f"is a store of {meta.kind}", where=uri, accepted="a store of frames")
        self.uri = uri
        self.num_frames = int(meta.settings["num_frames"])
        self.size = int(meta.settings["image_size"])
        self.crop = str(meta.settings.get("crop", "center"))
        self.encoding = str(meta.settings["encoding"])
        self.fetch_s = self.jpeg_s = 0.0
        self.places: ClipPlaces = Store(uri).ids()
        self._open: Recent[str, OpenPart] = Recent(
            OpenPart, lambda part: part.footer_bytes, OPEN_PARTS, FOOTER_BYTES
        )

    def read(self, video_ids: Sequence[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """Reads frames (M, F, S, S, 3) uint8, zero where padded, cropped if whole, and their mask (M, F).

        Raises:
            DataError: for an id that the store does not hold, or a clip that cannot be read.
        """
        frames = np.empty((len(video_ids), self.num_frames, self.size, self.size, 3), dtype=np.uint8)
        mask = np.zeros((len(video_ids), self.num_frames), dtype=np.bool_)
        for row, video_id in enumerate(video_ids):
            _, count = self._clip(video_id, frames[row])
            mask[row, :count] = True
        return frames, mask

    def read_whole(self, video_id: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """Reads one clip as stored: frames (F, H, W, 3) uint8, zero where padded, and their mask (F,).

        The shorter of H and W is S. In a store of whole pictures, H and W differ from clip to clip; in one of
        cropped pictures both are S.

        Raises:
            DataError: as ``read``.
        """
        frames, count = self._clip(video_id, None)
        return frames, np.arange(self.num_frames) < count

    def _clip(self, video_id: str, out: npt.NDArray[np.uint8] | None) -> tuple[npt.NDArray[np.uint8], int]:
        """Returns a clip's frames and how many are real: centre squares in ``out``, or as they are stored."""
        if (place := self.places.ids.find(video_id)) < 0:
            raise DataError(f"does not hold {video_id!r}", where=self.uri, accepted="one of its videos")
        try:
            return self._read(video_id, place, out)
        except DataError as error:
            before = self.places[video_id]
            # Parts are merged while they are read.
            self.places = Store(self.uri).ids() if is_part_gone(error) else self.places
            if self.places.get(video_id) in (None, before):
                raise
            return self._read(video_id, self.places.ids.find(video_id), out)

    def _read(
        self, video_id: str, place: int, out: npt.NDArray[np.uint8] | None
    ) -> tuple[npt.NDArray[np.uint8], int]:
        places = self.places
        part, position = places.parts[places.part[place]], int(places.row[place])
        try:
            started = time.perf_counter()
            opened = self._open(part)
            where = Where.of(places, place)
            count = int(places.num_frames[place]) if where.is_known else opened.num_frames[position]
            if not 0 < count <= self.num_frames:
                raise ValueError(f"{count} frames; accepted: 1 to {self.num_frames}")
            if self.encoding == "raw":
                if out is None:
                    out = np.empty((self.num_frames, self.size, self.size, 3), dtype=np.uint8)
                opened.fill(out, where)
                self.fetch_s += time.perf_counter() - started
                return out, count
            jpegs = opened.pictures(where)
            fetched = time.perf_counter()
            self.fetch_s += fetched - started
            # Otherwise a missing frame would be read as a black one.
            if len(jpegs) != count:
                raise ValueError(f"{len(jpegs)} pictures of {count} frames")
            out = self._decode(jpegs, out)
            self.jpeg_s += time.perf_counter() - fetched
        except (OSError, ValueError, pa.ArrowException, DataError) as error:
            what = f"{video_id!r} in row {position} cannot be read: {error}"
            raise DataError(what, where=part) from error
        return out, count

    def _decode(
        self, jpegs: Sequence[bytes | None], out: npt.NDArray[np.uint8] | None
    ) -> npt.NDArray[np.uint8]:
        shape = None if self.crop == "none" else (self.size, self.size, 3)
        for index, jpeg in enumerate(jpegs):
            picture = decode_jpeg(jpeg or b"")
            if fault := size_fault(picture, self.size, shape):
                raise ValueError(f"frame {index} is {fault}")
            shape = picture.shape
            if out is None:
                out = np.empty((self.num_frames, *shape), dtype=np.uint8)
            out[index] = picture if out.shape[1:] == shape else crop_centre(picture, self.size)
        assert out is not None
        out[len(jpegs) :] = 0
        return out


@dataclass(frozen=True)
class Where:
    """The place of a clip in a part.

    Attributes:
        row: of the part.
        offset: first byte of its frames in the file; -1 if the part has no index.
        size: bytes of its frames.
        shape: of raw frames; None for JPEG files.
    """

    row: int
    offset: int
    size: int
    shape: tuple[int, ...] | None

    @classmethod
    def of(cls, places: ClipPlaces, place: int) -> Where:
        """Returns where the clip at this place of the arrays is."""
        shape = places.shapes[places.part[place]]
        return cls(int(places.row[place]), int(places.offset[place]), int(places.size[place]), shape)

    @property
    def is_known(self) -> bool:
        """True if the part has an index."""
        return self.offset >= 0


class OpenPart:
    """An open part, with one clip in each row group; its footer is read only if it has to be.

    Args:
        part: its location.
    """

    def __init__(self, part: str) -> None:
        filesystem, path = open_fs(part)
        self.file: Any = filesystem.open_input_file(path)

    @cached_property
    def parquet(self) -> Any:
        """The part as a Parquet file."""
        return pq.ParquetFile(self.file, page_checksum_verification=True)

    @property
    def footer_bytes(self) -> int:
        """Bytes of the footer, if it has been read."""
        return self.parquet.metadata.serialized_size if "parquet" in self.__dict__ else 0

    @cached_property
    def num_frames(self) -> list[int]:
        """Number of real frames of each clip."""
        return [int(count) for count in self.parquet.read(columns=["num_frames"])["num_frames"].to_pylist()]

    def pictures(self, where: Where) -> list[bytes | None]:
        """Reads a clip's JPEG files."""
        if where.is_known:
            try:
                return list(byte_arrays(self.file.read_at(where.size, where.offset), "ZSTD"))
            except UnknownPageError:
                pass  # a picture that is missing, for one
        found: list[bytes | None] = self._frames(where.row)[0].as_py() or []
        return found

    def fill(self, frames: npt.NDArray[np.uint8], where: Where) -> None:
        """Fills an array with a clip's raw frames (F, H, W, 3), zero where padded.

        Raises:
            ValueError: if the frames of this part have another shape.
        """
        # Otherwise NumPy would broadcast an array of one pixel to all of them.
        shape = where.shape if where.is_known else self._shape
        if shape != frames.shape:
            raise ValueError(f"its frames have the shape {shape}, not {frames.shape}")
        offset, size, codec = where.offset, where.size, "ZSTD"
        if not where.is_known:
            chunk = self._group(where.row).column(self._leaf)
            offset, size, codec = chunk.data_page_offset, chunk.total_compressed_size, chunk.compression
        try:
            pages = low_bytes(self.file.read_at(size, offset), codec)
            if sum(map(len, pages)) != frames.size:
                raise UnknownPageError("another number of values")
        except UnknownPageError:
            column: Any = self._frames(where.row).combine_chunks()
            frames[:] = column.to_numpy_ndarray()[0]
            return
        flat, place = frames.reshape(-1), 0
        for page in pages:
            flat[place : place + len(page)] = page
            place += len(page)

    def _group(self, row: int) -> Any:
        """Returns the description of the row group that holds one clip.

        Raises:
            ValueError: if other clips are in it, as another program may have written them.
        """
        footer = self.parquet.metadata
        if row >= footer.num_row_groups or footer.row_group(row).num_rows != 1:
            raise ValueError("its row groups are not of one clip each, as this program writes them")
        return footer.row_group(row)

    def _frames(self, row: int) -> Any:
        self._group(row)
        return self.parquet.read_row_group(row, columns=["frames"])["frames"]

    @cached_property
    def _leaf(self) -> int:
        leaves = [self.parquet.schema.column(place).path for place in range(len(self.parquet.schema))]
        return leaves.index("frames.list.element")

    @cached_property
    def _shape(self) -> tuple[int, ...] | None:
        kind = self.parquet.schema_arrow.field("frames").type
        return tuple(kind.shape) if isinstance(kind, pa.FixedShapeTensorType) else None


class GreyPictures:
    """Grey pictures in place of a frame store that was not kept, for pictures shown only to people."""

    def read(self, video_ids: Sequence[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """Reads as ``FrameReader.read`` does, one small grey frame a clip."""
        frames = np.full((len(video_ids), 1, 32, 32, 3), 128, dtype=np.uint8)
        return frames, np.ones((len(video_ids), 1), dtype=np.bool_)


def open_pictures(uri: str) -> FrameReader | GreyPictures:
    """Opens the frame store, or returns grey pictures if there is no store.

    Raises:
        DataError: for a store that cannot be read.
    """
    return FrameReader(uri) if Store(uri).exists else GreyPictures()
