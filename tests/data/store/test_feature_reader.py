"""Features come back as they were stored, to this program and to plain readers of Parquet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from gare.data.store.contents import Store, part_files
from gare.data.store.feature_reader import FeatureReader
from gare.errors import DataError
from gare.train.input.loader import FeatureLoader
from tests.helpers.features import write_feature_store
from tests.helpers.plans import listed
from tests.helpers.stores import write_store
from tests.helpers.tiny import tiny_config

IDS = [f"clip {index}" for index in range(50)]


def stored(found: dict[str, np.ndarray], place: int, row: dict[str, Any], captions: list[int]) -> None:
    """Asserts that one clip of what was read is its row."""
    assert np.array_equal(found["frames"][place], row["frames"])
    assert found["frame_mask"][place].sum() == row["num_frames"]
    assert found["frame_mask"][place, : row["num_frames"]].all()
    real = found["caption_mask"][place]
    assert real.tolist() == [index < len(captions) for index in range(len(real))]
    assert np.array_equal(found["text"][place][real], row["text"][captions])
    lengths = found["token_mask"][place].sum(axis=1)
    assert lengths[real].tolist() == [row["num_tokens"][caption] for caption in captions]
    assert not lengths[~real].any()
    if "words" in row:
        assert np.array_equal(found["words"][place][real], row["words"][captions])


@pytest.mark.parametrize("cache_mb", [100.0, 0.0], ids=["in memory", "as it goes"])
@pytest.mark.parametrize("words", [False, True], ids=["no words", "words"])
def test_features_come_back_as_stored(
    cache_mb: float, words: bool, rng: np.random.Generator, tmp_path: Path
) -> None:
    """A model would learn from other numbers than the towers gave, or from another caption's."""
    config = tiny_config(f"features.words={words}")
    rows = write_feature_store(str(tmp_path), config, IDS, rng)
    reader = FeatureReader(str(tmp_path), words=words, cache_mb=cache_mb)
    assert reader.whole is bool(cache_mb)
    asked = [IDS[index] for index in rng.integers(0, len(IDS), 12)]
    found = reader.read(asked)
    for place, video_id in enumerate(asked):
        row = rows[video_id]
        stored(found, place, row, list(range(len(row["captions"]))))
    chosen = [int(rng.integers(len(rows[video_id]["captions"]))) for video_id in asked]
    found = FeatureLoader(reader, listed([[], asked], [[], chosen]))(1, 0, 12)
    assert found["text"].shape == (12, 1, 32)
    for place, (video_id, caption) in enumerate(zip(asked, chosen, strict=True)):
        stored(found, place, rows[video_id], [caption])
    assert len(reader.read([])["frames"]) == 0


@pytest.mark.parametrize("cache_mb", [100.0, 0.0], ids=["in memory", "as it goes"])
def test_what_is_not_there_is_named(cache_mb: float, rng: np.random.Generator, tmp_path: Path) -> None:
    """Never another clip's or caption's numbers in place of what the store lacks."""
    config = tiny_config()
    rows = write_feature_store(str(tmp_path / "features"), config, IDS, rng)
    reader = FeatureReader(str(tmp_path / "features"), cache_mb=cache_mb)
    with pytest.raises(DataError, match="does not hold 'other'"):
        reader.read([IDS[0], "other"])
    with pytest.raises(DataError, match="caption 3 of a clip that has fewer"):
        reader.read(IDS[:2], [0, 3])
    with pytest.raises(DataError, match=r"no word features \(extract with features\.words=true\)|words"):
        FeatureReader(str(tmp_path / "features"), words=True)
    write_store(str(tmp_path / "frames"), config.extract, IDS[:2], rng)
    with pytest.raises(DataError, match="is a store of frames"):
        FeatureReader(str(tmp_path / "frames"))
    part = part_files(str(tmp_path / "features"), "data")[0]
    Path(part).write_bytes(Path(part).read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot be read"):
        FeatureReader(str(tmp_path / "features"), cache_mb=cache_mb).read([next(iter(rows))])


def test_a_store_of_other_settings_names_them(rng: np.random.Generator, tmp_path: Path) -> None:
    """Numbers of other towers, or of other frames, mean nothing to a model."""
    write_feature_store(str(tmp_path), tiny_config(), IDS[:2], rng)
    store = Store(str(tmp_path))
    other = store.read_meta().settings | {"towers_sha256": "others", "sample_fps": 9.0}
    with pytest.raises(DataError, match=r"sample_fps is 1\.0 .* towers_sha256 is 'towers' .* 'others'"):
        store.read_meta_of(other)


PLAIN_PYARROW = """
import pyarrow.parquet as pq

table = pq.read_table(f"{store}/data", columns=["video_id", "num_frames", "frames", "captions", "text"])
frames = table["frames"].combine_chunks().to_numpy_ndarray()      # (videos, F, D) float16, zero where padded
text = table["text"].combine_chunks().flatten().to_numpy_ndarray()  # (captions, D), in the order of the rows
"""

DUCKDB = """
import duckdb

rows = duckdb.sql(f'''
    SELECT video_id, num_frames, frames, unnest(captions) AS caption, unnest(text) AS embedding
    FROM '{store}/data/*.parquet'
''').fetchall()
"""


def test_plain_readers_see_the_numbers(rng: np.random.Generator, tmp_path: Path) -> None:
    """Stores outlive this program; these are the readers that the README shows."""
    store = str(tmp_path / "store")
    rows = write_feature_store(store, tiny_config(), IDS, rng)
    code = (
        f"import sys; store = sys.argv[1]\n{PLAIN_PYARROW}{DUCKDB}\n"
        "import numpy as np\n"
        "names = {'gare', 'ray', 'torch'} & sys.modules.keys()\n"
        "assert not names, names\n"
        "np.savez(sys.argv[2], ids=table['video_id'].to_pylist(), frames=frames, text=text,\n"
        "    embeddings=[row[4] for row in rows], captions=[row[3] for row in rows],\n"
        "    duck=[np.reshape(row[2], frames.shape[1:]) for row in rows], owners=[row[0] for row in rows])\n"
    )
    saved = str(tmp_path / "found.npz")
    subprocess.run([sys.executable, "-c", code, store, saved], check=True, timeout=120)
    found = np.load(saved)
    assert found["ids"].tolist() == [row for part in order(store) for row in part]
    ordered = [rows[video_id] for video_id in found["ids"]]
    assert np.array_equal(found["frames"], [row["frames"] for row in ordered])
    assert np.array_equal(found["text"], np.concatenate([row["text"] for row in ordered]))
    assert len(found["owners"]) == len(found["text"])
    for owner, caption, embedding, frames in zip(
        found["owners"], found["captions"], found["embeddings"], found["duck"], strict=True
    ):
        row = rows[str(owner)]
        assert np.array_equal(embedding, row["text"][row["captions"].index(str(caption))])
        assert np.array_equal(frames, row["frames"])


def order(store: str) -> list[list[str]]:
    tables = [pq.read_table(part, columns=["video_id"]) for part in part_files(store, "data")]
    return [table["video_id"].to_pylist() for table in tables]


def test_parts_are_compressed_without_dictionaries(rng: np.random.Generator, tmp_path: Path) -> None:
    """Dictionaries of floats only cost room; row groups bound what one clip costs to read."""
    write_feature_store(str(tmp_path), tiny_config(), IDS, rng, part=50)
    (part,) = part_files(str(tmp_path), "data")
    meta = pq.read_metadata(part)
    assert meta.num_row_groups == 4
    for place in range(meta.num_columns):
        column = meta.row_group(0).column(place)
        assert column.compression == "ZSTD"
        assert not column.has_dictionary_page
