"""Parts carry their own checksum, and say which others they replace."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from gare.config import ExtractConfig
from gare.data.store.contents import Store, frame_schema
from gare.data.store.parts import CHECKSUM, checksum_fault, read_columns, read_parts, write_part, write_table
from gare.errors import DataError
from tests.helpers.stores import random_frames, stored_row

RAW = ExtractConfig(num_frames=3, image_size=8, encoding="raw")


def part_of(uri: str, rng: np.random.Generator, *ids: str) -> Path:
    rows = [stored_row(RAW, video_id, random_frames(RAW, rng, 2)) for video_id in ids]
    return Path(write_part(uri, "data", rows, frame_schema(RAW)))


def test_every_changed_byte_is_found(rng: np.random.Generator, tmp_path: Path) -> None:
    """A disk that turns one bit would change what a model is trained on, and nobody would know."""
    data = part_of(str(tmp_path), rng, "a", "b").read_bytes()
    assert checksum_fault(data) == ""
    for place in [0, len(data) - 1, *rng.integers(0, len(data), 60)]:
        changed = bytearray(data)
        changed[place] ^= 1 << int(rng.integers(8))
        assert checksum_fault(bytes(changed)), place
    # All of the footer: names that are no UTF-8 any more, counts, offsets.
    for place in range(len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data)):
        changed = bytearray(data)
        changed[place] ^= 0x80
        assert checksum_fault(bytes(changed)), place
    assert checksum_fault(data[:-1])
    assert checksum_fault(b"")


def test_the_checksum_can_be_made_without_this_program(rng: np.random.Generator, tmp_path: Path) -> None:
    """The README's recipe: the digits count as zeros in the file that they are the checksum of."""
    part = part_of(str(tmp_path), rng, "a")
    stated = pq.read_metadata(part).metadata[CHECKSUM.encode()]
    assert hashlib.sha256(part.read_bytes().replace(stated, b"0" * 64)).hexdigest() == stated.decode()


def test_a_turned_bit_of_a_frame_is_not_read(rng: np.random.Generator, tmp_path: Path) -> None:
    """Training reads pages, not whole files: the page's own checksum must stop it."""
    part = part_of(str(tmp_path), rng, "a")
    column = pq.read_metadata(part).row_group(0).column(frame_schema(RAW).names.index("frames"))
    assert column.path_in_schema.startswith("frames")
    data = bytearray(part.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    part.write_bytes(data)
    with pytest.raises(DataError, match=part.name):
        read_columns(str(part), ["frames"])
    assert read_columns(str(part), ["video_id"]).to_pylist() == [{"video_id": "a"}]


def test_replaced_parts_do_not_count(rng: np.random.Generator, tmp_path: Path) -> None:
    """From the moment that the merged part is there each row counts once, deleted or not."""
    uri = str(tmp_path)
    old = [part_of(uri, rng, "a"), part_of(uri, rng, "b")]
    parts, replaced = read_parts(uri, "data", ["video_id"])
    assert (len(parts), replaced) == (2, [])
    table = read_columns(str(old[0]), None).replace_schema_metadata(None)
    merged = write_table(uri, "data", table, ["merged"], [part.checksum for part in parts])
    assert Store(uri).ids() == {"a": (merged, 0)}
    # A later part of the same name with other content is another part.
    old[1].unlink()
    again = part_of(uri, rng, "b")
    assert again == old[1]
    assert Store(uri).ids() == {"a": (merged, 0), "b": (str(again), 0)}
