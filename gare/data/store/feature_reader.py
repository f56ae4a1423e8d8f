"""Reading clips back from a feature store.

M clips, F frames, C captions, W words, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gare.data.store.contents import Store
from gare.data.store.part_index import read_footer
from gare.data.store.parts import FEATURES_PER_GROUP, is_part_gone
from gare.data.store.recent import Recent
from gare.errors import DataError
from gare.storage.files import open_fs

#: Row groups, and parts, that a process keeps of a store larger than ``cache_mb``.
OPEN_GROUPS = 256
#: Bytes of these row groups, and of the parts' footers.
GROUP_BYTES, FOOTER_BYTES = 256 * 2**20, 64 * 2**20

_Arrays: TypeAlias = dict[str, npt.NDArray[Any]]
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Block:
    """Clips as arrays; ``first_caption`` (M + 1,) holds the position of each clip's first caption."""

    frames: npt.NDArray[np.float16]
    num_frames: npt.NDArray[np.int32]
    first_caption: npt.NDArray[np.int64]
    text: npt.NDArray[np.float16]
    num_tokens: npt.NDArray[np.int32]
    words: npt.NDArray[np.float16] | None

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        words = 0 if self.words is None else self.words.nbytes
        return int(self.frames.nbytes + self.text.nbytes + words)

    @classmethod
    def of(cls, table: pa.Table) -> _Block:
        columns: dict[str, Any] = {name: table[name].combine_chunks() for name in table.column_names}
        counts = columns["num_tokens"].value_lengths().to_numpy()
        words = columns.get("words")
        return cls(
            frames=columns["frames"].to_numpy_ndarray(),
            num_frames=columns["num_frames"].to_numpy(),
            first_caption=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
            text=columns["text"].flatten().to_numpy_ndarray(),
            num_tokens=columns["num_tokens"].flatten().to_numpy(),
            words=None if words is None else words.flatten().to_numpy_ndarray(),
        )


class FeatureReader:
    """Random access to the clips of a feature store.

    A store that fits is read once and kept in memory; from a larger one, row groups are read on demand.

    Args:
        uri: the store.
        words: True to read word features, too.
        cache_mb: MB of features that may be kept in memory.

    Raises:
        DataError: if there is no feature store, or it lacks word features.
    """

    def __init__(self, uri: str, *, words: bool = False, cache_mb: float = 4096.0) -> None:
        meta = Store(uri).read_meta()
        if meta.kind != "features":
            raise DataError(f"is a store of {meta.kind}", where=uri, accepted="a store of features")
        if words and not meta.settings["words"]:
            raise DataError("holds no word features", where=uri, accepted="extract with features.words=true")
        self.uri = uri
        self.num_frames = int(meta.settings["num_frames"])
        self.width = int(meta.settings["embed_dim"])
        self.max_words = int(meta.settings["max_words"])
        self.columns = ["num_frames", "frames", "num_tokens", "text", *(["words"] if words else [])]
        self.places = Store(uri).ids()
        self.whole = self._again_where_moved(self._bytes) <= cache_mb * 10**6
        self._block: _Block | None = None
        self._block_rows: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._group: Recent[tuple[str, int], _Block] = Recent(
            self._read_group, lambda block: block.num_bytes, OPEN_GROUPS, GROUP_BYTES
        )
        self._open: Recent[str, Any] = Recent(
            _open_part, lambda part: int(part.metadata.serialized_size), OPEN_GROUPS, FOOTER_BYTES
        )

    def read(self, video_ids: Sequence[str], captions: Sequence[int] | None = None) -> _Arrays:
        """Reads the features of clips and of their captions.

        Args:
            video_ids: M clips.
            captions: position of one caption for each clip; None for all captions, padded to the largest
                number C.

        Returns:
            ``frames`` (M, F, D) float16, ``frame_mask`` (M, F) bool, ``text`` (M, C, D) float16,
            ``token_mask`` (M, C, W) bool, ``caption_mask`` (M, C) bool and, if wanted, ``words`` (M, C, W, D)
            float16.

        Raises:
            DataError: for an id or a caption that the store does not hold, or a part that cannot be read.
        """
        if unknown := [video_id for video_id in video_ids if video_id not in self.places]:
            raise DataError(f"does not hold {unknown[0]!r}", where=self.uri, accepted="one of its videos")
        if self.whole:
            block = self._again_where_moved(self._whole)
            found = [self.places.ids.find(one) for one in video_ids]
            return self._gather(block, self._block_rows[np.array(found, np.int64)], captions)
        pieces: list[_Arrays] = []
        for number, video_id in enumerate(video_ids):
            block, row = self._again_where_moved(partial(self._block_of, video_id))
            one = None if captions is None else captions[number : number + 1]
            pieces.append(self._gather(block, np.array([row]), one))
        if not pieces:
            return self._gather(self._nothing(), np.empty(0, np.int64), captions)
        return _stack(pieces)

    def _gather(self, block: _Block, rows: npt.NDArray[np.int64], captions: Sequence[int] | None) -> _Arrays:
        first, counts = block.first_caption[rows], np.diff(block.first_caption)[rows]
        if captions is None:
            position = np.arange(int(counts.max(initial=0)))[None]
            real = position < counts[:, None]
        else:
            position = np.asarray(captions, np.int64)[:, None]
            real = np.ones(position.shape, np.bool_)
            if (wrong := (position < 0) | (position >= counts[:, None])).any():
                raise DataError(f"caption {int(position[wrong][0])} of a clip that has fewer", where=self.uri)
        places = np.where(real, first[:, None] + position, 0)
        lengths = np.where(real, block.num_tokens[places], 0)
        found: _Arrays = {
            "frames": block.frames[rows],
            "frame_mask": np.arange(self.num_frames) < block.num_frames[rows][:, None],
            "text": block.text[places],
            "token_mask": np.arange(self.max_words) < lengths[:, :, None],
            "caption_mask": real,
        }
        return found if block.words is None else found | {"words": block.words[places]}

    def _again_where_moved(self, read: Callable[[], _T]) -> _T:
        """Reads, and repeats it if parts have been merged since their places were looked up."""
        try:
            return read()
        except DataError as error:
            if not is_part_gone(error):
                raise
            self.places = Store(self.uri).ids()
            return read()

    def _whole(self) -> _Block:
        if self._block is None:
            places = self.places
            parts = places.used_parts()
            tables = [_read(part, self.columns) for part in parts]
            sizes = dict(zip(parts, map(len, tables), strict=True))
            starts = np.cumsum([0, *(sizes.get(part, 0) for part in places.parts)], dtype=np.int64)
            # Rows that no longer count are read with the others; nothing points to them.
            self._block_rows = starts[places.part] + places.row
            self._block = _Block.of(pa.concat_tables(tables)) if tables else self._nothing()
        return self._block

    def _block_of(self, video_id: str) -> tuple[_Block, int]:
        if video_id not in self.places:
            raise DataError(f"no longer holds {video_id!r}", where=self.uri)
        part, row = self.places[video_id]
        return self._group((part, row // FEATURES_PER_GROUP)), row % FEATURES_PER_GROUP

    def _bytes(self) -> int:
        """Adds up the bytes that the columns take in memory, from the parts' indexes or footers."""
        places = self.places
        found = [places.column_bytes[number] for number in np.unique(places.part)]
        total = sum(int(known.get(name, 0)) for known in found if known for name in self.columns)
        lacking = [part for part, known in zip(places.used_parts(), found, strict=True) if known is None]
        for footer in (_open_part(part).metadata for part in lacking):
            for group in range(footer.num_row_groups):
                chunks = footer.row_group(group)
                for number in range(chunks.num_columns):
                    chunk = chunks.column(number)
                    if chunk.path_in_schema.split(".")[0] in self.columns:
                        total += chunk.total_uncompressed_size
        return int(total)

    def _read_group(self, place: tuple[str, int]) -> _Block:
        part, group = place
        try:
            return _Block.of(self._open(part).read_row_group(group, columns=self.columns))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"row group {group} cannot be read: {error}", where=part) from error

    def _nothing(self) -> _Block:
        half, none = np.float16, np.empty(0, np.int32)
        words = None
        if "words" in self.columns:
            words = np.empty((0, self.max_words, self.width), half)
        frames = np.empty((0, self.num_frames, self.width), half)
        return _Block(frames, none, np.zeros(1, np.int64), np.empty((0, self.width), half), none, words)


def _stack(pieces: list[_Arrays]) -> _Arrays:
    """Joins pieces of one clip each, with captions padded to the largest number."""
    most = max(piece["caption_mask"].shape[1] for piece in pieces)
    found: _Arrays = {}
    for name in pieces[0]:
        arrays = [piece[name] for piece in pieces]
        if not name.startswith("frame"):
            arrays = [
                np.pad(array, [(0, 0), (0, most - array.shape[1]), *[(0, 0)] * (array.ndim - 2)])
                for array in arrays
            ]
        found[name] = np.concatenate(arrays)
    return found


def _open_part(part: str) -> Any:
    try:
        filesystem, path = open_fs(part)
        file = filesystem.open_input_file(path)
        # By as few requests as an object store allows: one for the footer, one for each row group.
        return pq.ParquetFile(
            file, metadata=read_footer(file), page_checksum_verification=True, pre_buffer=True
        )
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"cannot be read: {error}", where=part) from error


def _read(part: str, columns: Sequence[str]) -> pa.Table:
    try:
        table: pa.Table = _open_part(part).read(columns=list(columns))
        return table
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"cannot be read: {error}", where=part) from error
