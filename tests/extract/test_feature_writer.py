"""Features are made over storage faults: a clip is given up for its own faults alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from gare.config import Config
from gare.data.manifest import Manifest, ManifestRow
from gare.data.store.compact import compact
from gare.data.store.contents import FAILURE_SCHEMA, Store, part_files, read_columns, write_part
from gare.data.store.feature_schema import with_other_captions
from gare.data.store.frame_reader import FrameReader
from gare.errors import DataError
from gare.extract.feature_update import FeatureStoreUpdate
from gare.extract.feature_writer import FeatureMaker
from gare.model.encoders.clip import towers_sha256
from gare.model.gare import GARE
from gare.storage import object_store, patience
from gare.storage.files import read_bytes
from tests.helpers.manifests import rows_of_splits
from tests.helpers.servers import DroppingProxy
from tests.helpers.stores import failure_row, write_store
from tests.helpers.tiny import tiny_config

ROWS = rows_of_splits({"train": 6})
IDS = [row.video_id for row in ROWS]


@dataclass
class Places:
    """A frame store, and a feature store that is made of it."""

    config: Config
    model: GARE
    frames: str
    features: str
    rows: tuple[ManifestRow, ...] = ROWS

    def feature_pass(self) -> FeatureStoreUpdate:
        manifest = Manifest(self.rows, benchmark="folder", protocol="own")
        return FeatureStoreUpdate(
            self.config, manifest, self.frames, self.features, towers_sha256(self.model.towers), "0"
        )

    def maker(self, run: str = "", patience_s: float = 0.0) -> FeatureMaker:
        return FeatureMaker(
            self.frames, self.features, self.config.features, self.model, run, patience_s=patience_s
        )

    def write(self, run: str = "", patience_s: float = 0.0) -> list[dict[str, int]]:
        """Makes what is left; what each part came to."""
        maker = self.maker(run, patience_s)
        return [maker.write(part) for part in self.feature_pass().parts(1)]

    @property
    def made(self) -> set[str]:
        return set(Store(self.features).ids())


@pytest.fixture
def places(tmp_path: Path, rng: np.random.Generator, seed: int) -> Places:
    return make_places(str(tmp_path / "frames"), str(tmp_path / "features"), rng, seed)


def make_places(frames: str, features: str, rng: np.random.Generator, seed: int) -> Places:
    config = tiny_config("model.clip.vocab_size=49408", "train.clip_weights=x", "features.batch=4")
    write_store(frames, config.extract, IDS, rng, part=2)
    torch.manual_seed(seed)
    return Places(config, GARE(config.model), frames, features)


@pytest.fixture
def remote(
    s3: Any, tmp_path: Path, rng: np.random.Generator, seed: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Places]:
    """Frames on S3, whose client tries once, and features on a disk."""
    places = make_places("s3://videos/frames", str(tmp_path / "features"), rng, seed)
    monkeypatch.setattr(object_store, "MAX_RETRIES", 0)
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)
    object_store._file_system.cache_clear()
    yield places
    object_store._file_system.cache_clear()


def lost_at_the_first_clip(proxy: DroppingProxy, drops: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drops connections from the moment at which the first clip is read."""
    read, began = FrameReader.read, []

    def reading(reader: FrameReader, ids: Any) -> Any:
        if not began:
            began.append(True)
            proxy.disturb(drops=drops, most_bytes=2, share=1.0)
        return read(reader, ids)

    monkeypatch.setattr(FrameReader, "read", reading)


def test_an_outage_of_the_storage_fails_no_clip(
    remote: Places, s3_proxy: DroppingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten minutes without S3 must end the night with its reason, not take a tenth of the clips away."""
    lost_at_the_first_clip(s3_proxy, 10_000, monkeypatch)
    with pytest.raises(DataError, match="s3://videos/frames"):
        remote.write()
    s3_proxy.disturb(0)
    assert Store(remote.features).read_failures(()) == {}
    assert remote.made == set()
    remote.write()
    assert remote.made == set(IDS)


def test_an_outage_that_ends_is_waited_for(
    remote: Places,
    s3_proxy: DroppingProxy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nobody wants to start a job again for a server that was away for a minute."""
    lost_at_the_first_clip(s3_proxy, 5, monkeypatch)
    remote.write(patience_s=60.0)
    assert remote.made == set(IDS)
    assert Store(remote.features).read_failures(()) == {}
    assert "the storage answers again" in caplog.text


def test_parts_that_are_merged_meanwhile_are_followed(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compacting the frame store, however often, must not cost the features of one clip."""
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)
    read, ids = FrameReader._read, Store(places.frames).ids
    sizes = [20, 10**6]

    def merging(reader: FrameReader, *arguments: Any) -> Any:
        # Between looking the clip up and reading it, once and then at its new place again.
        if sizes:
            before = ids()
            compact(places.frames, sizes.pop(0))
            if ids() == before:
                raise AssertionError("nothing was merged")
        return read(reader, *arguments)

    size = max(Path(part).stat().st_size for part in part_files(places.frames, "data"))
    sizes[0] = 2 * size + 1
    monkeypatch.setattr(FrameReader, "_read", merging)
    places.write(patience_s=60.0)
    assert places.made == set(IDS)
    assert Store(places.features).read_failures(()) == {}


def test_a_clip_that_is_there_no_more_is_left_out(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip that another job took out of the frame store has not failed: it is to be looked at again."""
    (parts,) = [places.feature_pass().parts(1)]
    part = Store(places.frames).ids()[IDS[0]][0]
    checksum = read_columns(part, []).schema.metadata[b"gare.sha256"].decode()
    Store(places.frames).write_retired({checksum: {IDS[0]: "changed"}})
    maker = places.maker()
    for one in parts:
        maker.write(one)
    assert places.made == set(IDS[1:])
    assert Store(places.features).read_failures(()) == {}


def test_a_damaged_clip_costs_itself_alone(places: Places, rng: np.random.Generator) -> None:
    """A flipped bit is no outage: nothing is waited for, the others are made, and it is found again."""
    part, position = Store(places.frames).ids()[IDS[2]]
    column = (
        pq.read_metadata(part).row_group(position).column(places_of_leaves(part).index("frames.list.element"))
    )
    data = bytearray(read_bytes(part))
    size = column.total_compressed_size
    # In the second half: at its start a page has statistics, of which a bit may flip and nothing is damaged.
    data[column.data_page_offset + int(rng.integers(size // 2, size))] ^= 16
    Path(part).write_bytes(data)
    done = places.write(patience_s=600.0)
    assert sum(one["failed"] for one in done) == 1
    assert places.made == set(IDS) - {IDS[2]}
    failed = Store(places.features).read_failures(())[IDS[2]]
    assert (failed["stage"], failed["transient"]) == ("encode", True)


def places_of_leaves(part: str) -> list[str]:
    schema = pq.ParquetFile(part).schema
    return [schema.column(number).path for number in range(len(schema))]


def test_clips_that_an_earlier_version_gave_up_are_made(places: Places) -> None:
    """Earlier versions recorded outages as failures of the clips; nobody has a list of what was lost."""
    lost = failure_row(IDS[0]) | {"stage": "encode", "error_type": "OSError", "transient": None}
    endless = failure_row(IDS[1]) | {"stage": "encode", "error_type": "ValueError", "transient": None}
    write_part(places.features, "failures", [lost, endless], FAILURE_SCHEMA)
    counts = places.feature_pass().compare_with_collection().counts
    assert counts == {"new": 4, "changed": 0, "unchanged": 1, "gone": 0, "retried": 1}
    job = places.feature_pass()
    maker = places.maker()
    for part in job.parts(1):
        maker.write(part)
    assert places.made == set(IDS) - {IDS[1]}
    assert job.compare_with_collection().counts == counts


@pytest.mark.parametrize("words", [False, True])
def test_clips_without_captions_are_encoded(places: Places, words: bool) -> None:
    """Features for a search alone, which captions that come later find made."""
    places.config = tiny_config(
        "model.clip.vocab_size=49408", "train.clip_weights=x", "features.batch=4", f"features.words={words}"
    )
    places.rows = tuple(replace(row, captions=()) for row in ROWS)
    assert sum(one["written"] for one in places.write()) == len(ROWS)
    assert places.made == set(IDS)
    columns = ["captions", "num_tokens", "text", *(["words"] if words else [])]
    for part in part_files(places.features, "data"):
        table = read_columns(part, columns)
        assert all(value == [] for name in columns for value in table[name].to_pylist())
    assert places.feature_pass().compare_with_collection().counts["unchanged"] == len(ROWS)
    places.rows = ROWS
    places.write("later")
    assert places.made == set(IDS)
    assert not with_other_captions(places.features, ROWS)
