"""Learning from stored features is learning from frames with frozen towers."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gare.config import Config
from gare.data.manifest import Manifest, ManifestRow, read_manifest, write_manifest
from gare.data.splits import read_splits
from gare.data.store import parts as parts_module
from gare.data.store.compact import compact
from gare.data.store.contents import Store, frame_schema, part_files, write_part
from gare.data.store.feature_reader import FeatureReader
from gare.data.store.frame_reader import FrameReader
from gare.data.store.parts import read_columns, read_parts, write_table
from gare.data.store.verify import verify
from gare.data.videos import FileVersion
from gare.errors import CheckpointError, ConfigError, DataError
from gare.extract.feature_update import FeatureStoreUpdate
from gare.extract.feature_writer import FeatureMaker
from gare.model.encoders.clip import ClipTowers, towers_sha256
from gare.model.encoders.compiled import CompiledBlocks
from gare.model.gare import GARE
from gare.retrieval.ranking.encode import Encoder, encode_stored
from gare.storage.lock import StoreLock
from gare.train.callback import Callback
from gare.train.checkpoint.files import check_checkpoint, copy_checkpoint, load_checkpoint, save_checkpoint
from gare.train.input.feed import Feed
from gare.train.input.inputs import FeatureInput, FrameInput, TrainInput
from gare.train.input.loader import WorkerBatches
from gare.train.input.plan import plan_run
from gare.train.loop import run_loop
from gare.train.step import Learner, build_learner
from gare.train.validation import Validation
from tests.helpers.manifests import rows_of_splits
from tests.helpers.stores import describe_store, random_frames, stored_row, write_store
from tests.helpers.tiny import tiny_config


class Seen(Callback):
    """Follower that keeps the loss of each step and the mean rank of each epoch."""

    def __init__(self) -> None:
        self.numbers: list[Any] = []

    def on_step(self, step: int, values: dict[str, float]) -> None:
        self.numbers.append(values["loss/total"])

    def on_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        self.numbers.append(metrics["val/t2v/MnR"])


@dataclass
class Places:
    """A manifest with a frame store and a feature store of one model's towers."""

    config: Config
    manifest: str
    frames: str
    features: str
    seed: int

    def model(self, config: Config | None = None) -> GARE:
        torch.manual_seed(self.seed)
        return GARE((config or self.config).model)

    def feature_pass(self, model: GARE) -> FeatureStoreUpdate:
        manifest, towers = read_manifest(self.manifest), towers_sha256(model.towers)
        return FeatureStoreUpdate(self.config, manifest, self.frames, self.features, towers, "0")

    def encode(self, model: GARE) -> FeatureStoreUpdate:
        job = self.feature_pass(model)
        maker = FeatureMaker(self.frames, self.features, self.config.features, model, uuid.uuid4().hex)
        job.mark_incomplete(job.compare_with_collection())
        for part in job.parts(1):
            maker.write(part)
        job.finish(job.compare_with_collection(), job.retire_and_count(), {})
        return job


@pytest.fixture
def places(tmp_path: Path, rng: np.random.Generator, seed: int) -> Places:
    overrides = ["model.clip.vocab_size=49408", "train.clip_weights=x", "train.freeze=towers"]
    config = tiny_config(*overrides, f"train.seed={seed}", "features.batch=4", "features.words=true")
    rows = rows_of_splits({"train": 9, "val": 3})
    manifest, frames, features = (str(tmp_path / name) for name in ("m.parquet", "frames", "features"))
    write_manifest(Manifest(rows, benchmark="folder", protocol="own"), manifest)
    write_store(frames, config.extract, [row.video_id for row in rows], rng)
    return Places(config, manifest, frames, features, seed)


def train(places: Places, config: Config, model: GARE, *, features: bool) -> tuple[Learner, list[Any]]:
    """Runs the loop on either store; losses by step and metrics by epoch."""
    source: TrainInput = FrameInput(config, places.frames)
    if features:
        settings = places.feature_pass(places.model()).settings
        source = FeatureInput(config, places.features, settings)
    splits = read_splits(places.manifest, source.store, config.extract, source.store_settings)
    plan = plan_run([len(row.captions) for row in splits.train], 3, config.train, rank=0, world_size=1)
    learner = build_learner(model, config, plan.num_steps, torch.device("cpu"))
    device = torch.device("cpu")
    listed = WorkerBatches(plan, splits.ids())
    load = source.loader(listed, source.shared_data(splits), device, model)()
    sizes = [len(batch.videos) for batch in plan.batches]
    # In chunks, as several loaders share a batch.
    chunks = (
        load(number, start, min(start + 4, size))
        for number, size in enumerate(sizes)
        for start in range(0, size, 4)
    )
    seen = Seen()
    run_loop(
        learner,
        listed,
        0,
        source,
        Feed(chunks, sizes, device),
        Validation(model, device),
        [seen],
    )
    return learner, seen.numbers


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.micro_batch=2"],
        ["model.context=words", "model.corrected_side=video"],
        ["model.adapters=true"],
    ],
    ids=["frames", "in parts", "words", "adapters"],
)
def test_losses_are_those_of_frozen_towers(
    places: Places, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that learned something else from features than from frames would be another method."""
    # Features are stored in float16: what the towers make of frames is rounded in the same way, since a few
    # steps of an optimiser may make much of the difference.
    for name in ("encode_images", "project_text"):
        plain = getattr(ClipTowers, name)
        monkeypatch.setattr(ClipTowers, name, lambda *args, plain=plain: plain(*args).half().float())
    tree = places.config.model_dump(mode="json")
    config = tiny_config(*(f"{key}={value}" for key, value in flat(tree)), *overrides)
    places.encode(places.model(config))
    _, from_frames = train(places, config, places.model(config), features=False)
    model = places.model(config)
    model.drop_towers()
    assert not any("text_model" in name for name in model.state_dict())
    _, from_features = train(places, config, model, features=True)
    assert len(from_features) == 12
    # Three epochs of three steps and a validation.
    assert from_features == pytest.approx(from_frames, rel=1e-4)


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_a_checkpoint_gets_its_towers(places: Places, tmp_path: Path, rng: np.random.Generator) -> None:
    """A trained head without towers can neither search nor be served."""
    config = places.config.model_copy(
        update={"train": places.config.train.model_copy(update={"input": "features"})}
    )
    places.encode(places.model())
    model = places.model()
    model.drop_towers()
    learner, _ = train(places, config, model, features=True)
    uri = str(tmp_path / "checkpoint")
    save_checkpoint(uri, learner, 3)
    with pytest.raises(CheckpointError, match="has no towers: its run learned from features"):
        load_checkpoint(uri)
    with pytest.raises(ConfigError, match="has no towers"):
        learner.model.encode_text(torch.ones(1, 8, dtype=torch.int64), torch.ones(1, 8))
    best = str(tmp_path / "best")
    copy_checkpoint(uri, best, start=places.model())
    whole = load_checkpoint(best)
    check_checkpoint(best)
    assert towers_sha256(whole.towers) == towers_sha256(places.model().towers)
    for name, tensor in learner.model.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name

    ids = list(Store(places.frames).ids())
    stored = encode_stored(whole, FeatureReader(places.features), ids, batch=5)
    rows = {row.video_id: row for row in read_manifest(places.manifest).rows}
    encoder = Encoder(whole, places.frames)
    clips, texts = encoder.clips(ids), encoder.captions([text for one in ids for text in rows[one].captions])
    assert np.array_equal(stored["video/mask"], clips["mask"])
    assert np.array_equal(stored["text/mask"], texts["mask"])
    assert np.allclose(stored["video/frames"], clips["frames"], atol=2e-2)
    assert np.allclose(stored["text/embedding"], texts["embedding"], atol=2e-2)


def test_adapters_start_as_the_identity(places: Places, rng: np.random.Generator) -> None:
    """Else a run with adapters would start from worse than CLIP."""
    config = tiny_config("model.clip.vocab_size=49408", "model.adapters=true")
    with_adapters, without = places.model(config).eval(), places.model().eval()
    assert places.model(config).state_dict().keys() - without.state_dict().keys() == {
        "adapters.text.weight",
        "adapters.video.weight",
    }
    for name, tensor in without.state_dict().items():
        assert torch.equal(tensor, with_adapters.state_dict()[name]), name
    frames = torch.from_numpy(rng.standard_normal((3, 4, 32), dtype=np.float32))
    mask = torch.ones(3, 4)
    expected = without.video_from_towers(frames, mask).frames
    assert torch.equal(with_adapters.video_from_towers(frames, mask).frames, expected)


def test_features_of_whole_pictures_are_those_of_their_centre(
    places: Places, rng: np.random.Generator, tmp_path: Path
) -> None:
    """A store of whole pictures, kept for one training, must not give another one other features."""
    ids = [row.video_id for row in read_manifest(places.manifest).rows]
    squares, whole = (
        replace(places, frames=str(tmp_path / name), features=str(tmp_path / f"{name} features"))
        for name in ("squares", "whole")
    )
    extract = whole.config.extract.model_copy(update={"encoding": "jpeg", "crop": "none"})
    whole.config = whole.config.model_copy(update={"extract": extract})
    write_store(whole.frames, extract, ids, rng)
    frames, mask = FrameReader(whole.frames).read(ids)
    extract = squares.config.extract
    rows = [stored_row(extract, name, clip[real]) for name, clip, real in zip(ids, frames, mask, strict=True)]
    write_part(squares.frames, "data", rows, frame_schema(extract))
    describe_store(squares.frames, extract)
    found = []
    for one in (squares, whole):
        job = one.encode(one.model())
        assert job.settings.get("crop", "center") == one.config.extract.crop
        found.append(FeatureReader(one.features).read(ids))
    assert same(found[1], found[0])
    # What was made of the one is not taken for the other's.
    with pytest.raises(DataError, match="crop is 'none' in the store and 'center' in the configuration"):
        replace(squares, features=whole.features).feature_pass(squares.model())


def test_features_that_are_not_finite_are_failures(places: Places) -> None:
    """One infinite number in a store ends every training on it, or spoils it silently."""
    model = places.model()
    with torch.no_grad():
        model.towers.clip.visual_projection.weight.mul_(1e9)
    job = places.feature_pass(model)
    for part in job.parts(1):
        FeatureMaker(places.frames, places.features, places.config.features, model).write(part)
    assert not Store(places.features).ids()
    failures = Store(places.features).read_failures(())
    assert len(failures) == 12
    assert {row["stage"] for row in failures.values()} == {"encode"}
    assert all("frames features are not finite in float16" in row["message"] for row in failures.values())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_compiled_towers_make_the_same_store(
    places: Places, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler changes rounding alone: neither the fingerprint nor what a clip's features are."""
    compile_blocks = CompiledBlocks.compile
    # It traces as inductor does, and generates no code.
    monkeypatch.setattr(CompiledBlocks, "compile", lambda blocks: compile_blocks(blocks, "aot_eager"))
    ids, found, prints = [f"train{number}" for number in range(9)], [], []
    for how in ("off", "towers"):
        features = places.config.features.model_copy(update={"compile": how, "precision": precision})
        config = places.config.model_copy(update={"features": features})
        one = replace(places, config=config, features=f"{places.features}-{how}")
        model = one.model()
        with torch._dynamo.config.patch(recompile_limit=8, optimize_ddp=True):  # as it was, afterwards
            prints.append(one.encode(model).settings)
        assert not model.towers.full_width  # the caller's own towers stay as they are
        found.append(FeatureReader(one.features, words=True).read(ids))
    torch._dynamo.reset()
    assert prints[0] == prints[1]
    off, fast = found
    assert np.array_equal(off["frame_mask"], fast["frame_mask"])
    real = off["caption_mask"]
    tolerance = 2e-2 if precision == "bf16" else 2e-3
    for name in ("frames", "text", "words"):
        ours, theirs = (one[name] if name == "frames" else one[name][real] for one in (fast, off))
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance, err_msg=name)
    # What is padding stays empty.
    assert not fast["frames"][~off["frame_mask"]].any()
    assert not fast["words"][real][~off["token_mask"][real]].any()


def same(found: dict[str, np.ndarray], known: dict[str, np.ndarray]) -> bool:
    """Whether two readings are the same; what stands in place of captions that a clip lacks is nobody's."""
    real = known["caption_mask"]
    return all(
        np.array_equal(found[name][real], values[real])
        if name in ("text", "words")
        else np.array_equal(found[name], values)
        for name, values in known.items()
    )


def stored_again(places: Places, model: GARE, rows: Sequence[ManifestRow]) -> dict[str, int]:
    """Brings the store up to these rows; what there was to do, by reason."""
    write_manifest(Manifest(tuple(rows), benchmark="folder", protocol="own"), places.manifest)
    job = places.encode(model)
    counts = job.compare_with_collection().counts
    assert places.feature_pass(model).inventory_if_done(places.feature_pass(model).compare_with_collection())
    assert places.feature_pass(model).parts(1) == []
    return counts


def test_new_captions_alone_are_encoded(places: Places) -> None:
    """A store follows its manifest; what is there is not made again, though its frames are gone."""
    model = places.model()
    places.encode(model)
    before = FeatureReader(places.features).read(["train1", "train2"])
    shutil.rmtree(places.frames)
    rows = list(read_manifest(places.manifest).rows)
    old, rows[1] = rows[1], replace(rows[1], captions=("all new",))
    counts = stored_again(places, model, rows)
    assert counts == {"new": 0, "changed": 1, "unchanged": len(rows) - 1, "gone": 0, "retried": 0}
    after = FeatureReader(places.features).read(["train1", "train2"])
    assert np.array_equal(after["frames"], before["frames"])
    assert after["caption_mask"].sum(axis=1).tolist() == [1, 3]
    assert np.array_equal(after["text"][1], before["text"][1])
    # The old captions again: their row is still there, and counts again.
    rows[1] = old
    parts = part_files(places.features, "data")
    stored_again(places, model, rows)
    assert part_files(places.features, "data") == parts
    again = FeatureReader(places.features, cache_mb=0).read(["train1", "train2"])
    assert same(again, before)


def test_frames_that_were_made_again_are_encoded_again(places: Places, rng: np.random.Generator) -> None:
    """Features of a file that has been replaced would be learned under the new one's name."""
    model = places.model()
    places.encode(model)
    before = FeatureReader(places.features).read(["train1", "val0"])
    manifest, extract = read_manifest(places.manifest), places.config.extract
    places_of_parts = {part.checksum: part for part in read_parts(places.frames, "data", ["video_id"])[0]}
    (old,) = [key for key, part in places_of_parts.items() if {"video_id": "train1"} in part.rows]
    Store(places.frames).write_retired({old: {"train1": "changed"}})
    row = stored_row(extract, "train1", random_frames(extract, rng, 2)) | {"source_version": "mtime 2"}
    write_part(places.frames, "data", [row], frame_schema(extract))
    counts = stored_again(places, model, manifest.rows)
    assert counts["changed"] == 1
    stored = Store(places.features).rows(["source_version"])
    assert {
        key: one[2]["source_version"] for key, one in stored.items() if one[2]["source_version"] != "mtime 1"
    } == {"train1": "mtime 2"}
    for cache_mb in (0.0, 100.0):
        after = FeatureReader(places.features, cache_mb=cache_mb).read(["train1", "val0"])
        assert after["frame_mask"][0].sum() == 2
        assert not np.array_equal(after["frames"][0], before["frames"][0])
        assert np.array_equal(after["frames"][1], before["frames"][1])
    # What left the collection no longer counts either.
    counts = stored_again(places, model, manifest.rows[1:])
    assert counts["gone"] == 1
    assert "train0" not in FeatureReader(places.features).places


def test_feature_stores_are_checked_and_compacted(places: Places) -> None:
    """A store that cannot be checked cannot be trusted, and one of many small parts is slow to open."""
    config = places.config.features.model_copy(update={"videos_per_part": 2})
    places.config = places.config.model_copy(update={"features": config})
    model, wanted = places.model(), {row.video_id for row in read_manifest(places.manifest).rows}
    places.encode(model)
    schema = places.feature_pass(model).schema
    assert verify(places.features, schema, wanted)[0] == []
    opened = FeatureReader(places.features, cache_mb=0, words=True)
    whole = FeatureReader(places.features, words=True)
    before = FeatureReader(places.features, words=True).read(sorted(wanted))
    merged = compact(places.features, 10**8)
    assert (merged["parts_before"], merged["parts_after"]) == (6, 1)
    assert verify(places.features, schema, wanted)[0] == []
    # Also where a reader was open before the parts were merged.
    for reader in (FeatureReader(places.features, words=True), opened, whole):
        after = reader.read(sorted(wanted))
        assert same(after, before)
    (part,) = part_files(places.features, "data")
    rows = read_columns(part, None)
    spoilt = rows["frames"].combine_chunks().to_numpy_ndarray().copy()
    spoilt[3, 0, 0] = np.nan
    storage = pa.FixedSizeListArray.from_arrays(pa.array(spoilt.reshape(-1)), spoilt[0].size)
    column = pa.ExtensionArray.from_storage(schema.field("frames").type, storage)
    table = rows.set_column(rows.column_names.index("frames"), schema.field("frames"), column)
    write_table(places.features, "data", table.replace_schema_metadata(None), ["x"], [])
    Path(part).unlink()
    (fault,) = verify(places.features, schema, wanted)[0]
    assert (fault["video_id"], fault["fault"]) == (rows["video_id"][3].as_py(), "frames is not finite")


def test_a_growing_frame_store_is_followed_by_its_new_parts(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both indexes were read anew every five seconds: 9 CPU s each time at 50,000 clips, for nothing."""
    config = places.config.features.model_copy(update={"videos_per_part": 3})
    places.config = places.config.model_copy(update={"features": config})
    model = places.model()
    # All features are there; since then, all but one part's videos are other files.
    places.encode(model)
    (tmp_path / "late").mkdir()
    files = [Path(part) for part in part_files(places.frames, "data")]
    for file in files:
        shutil.move(file, tmp_path / "late" / file.name)
    job = places.feature_pass(model)
    assert job.parts(1, whole=True, anew=False) == []
    read: list[str] = []
    one = parts_module._read_part

    def counted(location: str, *asked: Any) -> Any:
        read.append(location)
        return one(location, *asked)

    monkeypatch.setattr(parts_module, "_read_part", counted)
    assert job.parts(1, whole=True, anew=False) == []
    assert read == []
    handed_out: list[str] = []
    for number, file in enumerate(files):
        rows = pq.read_table(tmp_path / "late" / file.name).replace_schema_metadata(None)
        ids = rows["video_id"].to_pylist()
        if number:
            changed = pa.array(["another file"] * len(rows), pa.string())
            rows = rows.set_column(rows.column_names.index("source_version"), "source_version", changed)
        write_table(places.frames, "data", rows, [file.name])
        read.clear()
        found = [row for part in job.parts(1, whole=True, anew=False) for row in part]
        assert len(read) == 1
        assert sorted(row["video_id"] for row in found) == (sorted(ids) if number else [])
        assert {row["place"] for row in found} <= set(read)
        handed_out += [row["video_id"] for row in found]
        assert {key for rows in job.store.read_retired().values() for key in rows} == set(handed_out)
    assert len(handed_out) == len(set(handed_out)) == 9
    # What a look at everything finds is the same.
    assert sorted(row["video_id"] for row in job.compare_with_collection().pending) == sorted(handed_out)
    assert job.compare_with_collection().retired == job.store.read_retired()


def test_files_are_asked_for_their_versions_once_a_pass(places: Places) -> None:
    """Every file was asked for its size for each block of clips: ten times each at 4,096 clips."""
    places.encode(places.model())
    manifest, asked = read_manifest(places.manifest), list[str]()

    def stat(uris: Sequence[str]) -> dict[str, FileVersion | DataError]:
        asked.extend(uris)
        return {uri: FileVersion(1, "now") for uri in uris}

    towers = towers_sha256(places.model().towers)
    job = FeatureStoreUpdate(places.config, manifest, places.frames, places.features, towers, "0", stat)
    job.compare_with_collection()
    for anew in (True, False, False):
        job.parts(1, anew=anew)
        job.compare_again()
    assert asked == [row.uri for row in manifest.rows]


def test_the_owner_of_a_quiet_store_looks_once(places: Places) -> None:
    """Where nobody else wrote, a second look at all files of the collection finds the same."""
    job = places.feature_pass(places.model())
    assert job.quiet_generation() == 0
    with StoreLock(places.features, when_locked="refuse", stale_s=60) as lock:
        assert job.quiet_generation() is None
        number = lock.held.generation
    assert job.quiet_generation() == number
