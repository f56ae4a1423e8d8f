"""gare/data/imported_features.py: features of one's own encoders, checked before anything is learned."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gare.data.imported_features import ImportedFeatures, read_imported
from gare.errors import DataError
from tests.helpers.imported import draw_arrays, draw_records, write_npz, write_parquet, write_records

VIDEOS = 20


class Case:
    """Arrays and records in a folder, to be changed and read."""

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        self.folder, self.arrays, self.records = folder, draw_arrays(rng, VIDEOS), draw_records(VIDEOS)

    def read(self, features: str = "", *, max_frames: int = 4, width: int = 16) -> ImportedFeatures:
        features = features or write_npz(self.folder / "features.npz", self.arrays)
        records = write_records(self.folder / "videos.jsonl", self.records)
        return read_imported(features, records, max_frames=max_frames, width=width)

    def message(self, features: str = "", **limits: int) -> str:
        with pytest.raises(DataError) as caught:
            self.read(features, **limits)
        assert caught.value.exit_code == 3
        return str(caught.value)


@pytest.fixture
def case(tmp_path: Path, rng: np.random.Generator) -> Case:
    return Case(tmp_path, rng)


def test_each_video_gets_its_rows_in_order(case: Case, rng: np.random.Generator) -> None:
    """A frame or caption of another video would train, without a word, on what never was a pair."""
    shuffled = rng.permutation(len(case.arrays["frames"]))
    case.arrays["frames"], case.arrays["frame_owner"] = (
        case.arrays[name][shuffled] for name in ("frames", "frame_owner")
    )
    found = case.read()
    assert [video.row.video_id for video in found.videos] == [record["video_id"] for record in case.records]
    assert [video.row.split for video in found.videos[-10:]] == ["val"] * 4 + ["test"] * 6
    for number, video in enumerate(found.videos):
        assert np.array_equal(video.frames, case.arrays["frames"][case.arrays["frame_owner"] == number])
        assert np.array_equal(video.captions, case.arrays["captions"][2 * number : 2 * number + 2])
        assert list(video.row.captions) == case.records[number]["captions"]
    assert found.widths == {"frames": 16, "captions": 12}
    assert set(found.sha256) == {"features.npz", "videos.jsonl"}
    assert found.manifest.counts["train"] == {"videos": 10, "captions": 20}


@pytest.mark.parametrize("fixed", [True, False])
def test_parquet_is_the_same(fixed: bool, case: Case) -> None:
    """The fingerprint is of the features, not of the file that they came in."""
    folder = write_parquet(case.folder / "parquet", case.arrays, fixed=fixed)
    assert case.read(folder).arrays_sha256() == case.read().arrays_sha256()


def test_the_hash_knows_what_matters(case: Case, rng: np.random.Generator) -> None:
    """It takes the place of the towers' hash: other features must never pass for the same."""
    own = case.read().arrays_sha256()
    case.arrays |= {name: case.arrays[name].astype(np.float32) for name in ("frames", "captions")}
    assert case.read().arrays_sha256() == own
    order = rng.permutation(VIDEOS)
    place = np.argsort(order)
    arrays, records = case.arrays, case.records
    case.records = [records[number] for number in order]
    case.arrays = arrays | {name: place[arrays[name]] for name in ("frame_owner", "caption_owner")}
    assert case.read().arrays_sha256() == own
    case.records = records
    for name in ("frames", "captions"):
        changed = arrays[name].copy()
        changed[3, 5] += 1
        case.arrays = arrays | {name: changed}
        assert case.read().arrays_sha256() != own
    swapped = arrays["captions"].copy()
    swapped[[0, 2]] = swapped[[2, 0]]
    case.arrays = arrays | {"captions": swapped}
    assert case.read().arrays_sha256() != own


def test_noise_moves_features_with_their_texts(case: Case) -> None:
    """Noise in the texts alone would not reach a model that learns from features."""
    clean = case.read()
    noisy = clean.with_noise(0.4, 1)
    features = {
        text: feature.tobytes()
        for video in clean.videos
        for text, feature in zip(video.row.captions, video.captions, strict=True)
    }
    for before, after in zip(clean.videos, noisy.videos, strict=True):
        assert np.array_equal(before.frames, after.frames)
        for text, feature, mark in zip(after.row.captions, after.captions, after.row.noisy, strict=True):
            assert features[text] == feature.tobytes()
            assert (text not in before.row.captions) == mark
    assert sum(sum(video.row.noisy) for video in noisy.videos) == 8
    assert noisy.manifest.protocol == "splits of the records; 40 % noise, seed 1"
    assert noisy.arrays_sha256() != clean.arrays_sha256()


def test_records_without_texts(case: Case) -> None:
    """Features of captions whose texts may not be handed out are enough to learn from."""
    for record in case.records:
        del record["captions"]
    found = case.read()
    assert found.videos[1].row.captions == ("v1 #1", "v1 #2")
    case.records[0]["captions"] = ["a", "b"]
    assert "captions missing where other records have them (1): 'v1'; 'v2'" in case.message()


def _set(name: str, at: Any, value: Any) -> Any:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][at] = value

    return change


def _wide(arrays: dict[str, np.ndarray]) -> None:
    arrays["frames"] = arrays["frames"].astype(np.float32)
    arrays["frames"][2, 0] = 1e5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("frame_owner", 7, 20), "frame_owner is not a record from 0 to 19 (1): 20 in row 7"),
        (_set("caption_owner", 0, -1), "caption_owner is not a record from 0 to 19 (1): -1 in row 0"),
        (_set("caption_owner", slice(4, 6), 0), "videos without captions (1): 'v2' (record 2)"),
        (lambda arrays: arrays.update(frame_owner=arrays["frame_owner"] // 2 * 2), "videos without frames"),
        (_set("caption_owner", 4, 0), "'v0' has 2 texts"),
        (_set("frames", (1, 2), np.nan), "not finite (1): frames in rows 1"),
        (_set("captions", (1, 2), np.inf), "not finite (1): captions in rows 1"),
        (_wide, "beyond float16's largest, 65504 (1): frames in rows 2"),
        (lambda arrays: arrays.update(frames=arrays["frames"][:, 0]), "not a matrix (1): frames"),
        (lambda arrays: arrays.update(captions=arrays["captions"][:0]), "not a matrix (1): captions"),
        (
            lambda arrays: arrays.update(captions=np.ones((40, 12), np.int32)),
            "not numbers of floating point (1): captions of type int32",
        ),
        (
            lambda arrays: arrays.update(frame_owner=arrays["frame_owner"].astype(float)),
            "not whole numbers (1): frame_owner of type float64",
        ),
        (
            lambda arrays: arrays.update(caption_owner=arrays["caption_owner"][1:]),
            "not one owner for each row (1): caption_owner (39,) for captions (40, 12)",
        ),
        (lambda arrays: arrays.pop("caption_owner"), "it lacks caption_owner"),
    ],
)
def test_arrays_that_do_not_fit(change: Any, words: str, case: Case) -> None:
    """Each would end in wrong pairs, or in a NaN an hour later, far from its cause."""
    change(case.arrays)
    assert words in case.message()


def test_sizes_beyond_the_model(case: Case) -> None:
    """The message says which setting to change; nothing is cut without a word."""
    longest = max(np.bincount(case.arrays["frame_owner"]))
    message = case.message(max_frames=longest - 1)
    assert f"more frames than model.max_frames, {longest - 1}" in message
    assert f"model.max_frames={longest}" in message
    message = case.message(width=15)
    assert "frames are 16 wide and captions 12, and model.clip.embed_dim is 15" in message
    assert "model.clip.embed_dim=16 or more" in message


def test_records_that_do_not_fit(case: Case) -> None:
    """All faults come at once, with the places that a person has to look at."""
    case.records[1]["split"] = "trian"
    case.records[2]["video_id"] = "v3"
    case.records[4]["captions"] = ["a", 5]
    del case.records[5]["video_id"]
    message = case.message()
    for words in (
        "split is not one of train, val, test (1): 'v1': 'trian' (line 2)",
        "video_id used more than once (1): 'v3' (2 times)",
        "captions is not a list of texts (1): 'v4' (line 5)",
        "no video_id (1): line 6",
    ):
        assert words in message
    features = write_npz(case.folder / "features.npz", case.arrays)
    for content, words in ((b"{", "not JSON (1): line 1"), (b"[1]", "not an object"), (b"\n", "no records")):
        (case.folder / "bad.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=words.replace("(", r"\(").replace(")", r"\)")):
            read_imported(features, str(case.folder / "bad.jsonl"), max_frames=4, width=16)


def test_pickles_are_refused(case: Case) -> None:
    """A file that somebody shares must not run code when it is opened."""
    opened = case.folder / "opened"

    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(opened),)

    case.arrays["frames"] = np.array([Hostile()] * 40, dtype=object)
    assert "allow_pickle=False" in case.message()
    pickled = case.folder / "pickled.npz"
    pickled.write_bytes(case.arrays["frames"].dumps())
    assert "cannot be read" in case.message(str(pickled))
    assert not opened.exists()


def test_files_that_cannot_be_read(case: Case, rng: np.random.Generator) -> None:
    """One message, whatever a download left behind."""
    whole = Path(write_npz(case.folder / "features.npz", case.arrays)).read_bytes()
    for content in (b"", b"<html>", whole[: len(whole) // 2], whole[:200] + bytes(200) + whole[400:]):
        (case.folder / "bad.npz").write_bytes(content)
        assert "cannot be read" in case.message(str(case.folder / "bad.npz"))
    np.save(case.folder / "one.npy", case.arrays["frames"])
    (case.folder / "one.npy").rename(case.folder / "one.npz")
    assert "it is one array" in case.message(str(case.folder / "one.npz"))
    assert "neither an .npz file nor a folder" in case.message(str(case.folder / "nothing"))
    folder = Path(write_parquet(case.folder / "parquet", case.arrays, fixed=True))
    for part in folder.glob("captions*"):
        part.unlink()
    assert "no Parquet file has the column captions" in case.message(str(folder))
    (folder / "more.parquet").write_bytes(b"PAR1")
    assert "more.parquet: cannot be read" in case.message(str(folder))


def test_real_features_import_as_they_lie_there(shared: Path) -> None:
    """The test bed of the studies: features of real videos, with MSR-VTT's own names of the splits."""
    folder = shared / "data" / "msrvtt-features"
    found = read_imported(
        str(folder / "features.npz"), str(folder / "videos.jsonl.gz"), max_frames=8, width=384
    )
    counts = {split: count["videos"] for split, count in found.manifest.counts.items()}
    assert counts == {"train": 3151, "val": 244, "test": 1432}
    assert sum(len(video.frames) for video in found.videos) == 21_746
    with gzip.open(folder / "videos.jsonl.gz", "rt") as file:
        assert file.readline().split('"')[3] == found.videos[0].row.video_id
