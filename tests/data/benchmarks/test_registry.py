"""gare/data/benchmarks/registry.py: from annotations and videos on disk to a manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gare.config.data import DataConfig
from gare.data.benchmarks.reader import names_of, stem_of
from gare.data.benchmarks.registry import format_table, read_benchmark
from gare.data.manifest import read_manifest, write_manifest
from gare.errors import ConfigError, DataError
from tests.helpers.annotation_copies import captions_of, counts_of, lines_of, read, text_of

LSMDC = "LSMDC16_challenge_1000_publictect.csv"


@pytest.fixture
def lsmdc(annotations: Path, tmp_path: Path) -> Path:
    """All 1,000 clips of LSMDC, each in the folder of its film, as the data set is unpacked."""
    for line in text_of(annotations / "lsmdc", LSMDC).splitlines():
        clip = line.split("\t")[0]
        film = tmp_path / "videos" / clip.rsplit("_", 1)[0]
        film.mkdir(parents=True, exist_ok=True)
        (film / f"{clip}.avi").write_bytes(b"video")
    return tmp_path / "videos"


def test_all_videos_are_found(annotations: Path, lsmdc: Path, tmp_path: Path) -> None:
    """Ids hold dots and dashes: cut at the last dot, two clips of a second would be one file."""
    found = read("lsmdc", annotations / "lsmdc", videos=str(lsmdc))
    assert found.missing == ()
    assert found.summary()["missing"]["test"] == {"count": 0, "ids": []}
    assert all(Path(row.uri).stem == row.video_id and Path(row.uri).is_file() for row in found.manifest.rows)
    write_manifest(found.manifest, str(tmp_path / "manifest.parquet"))
    assert read_manifest(str(tmp_path / "manifest.parquet")) == found.manifest


def test_missing_videos_are_named(annotations: Path, lsmdc: Path, rng: np.random.Generator) -> None:
    """A smaller gallery gives higher scores: nobody may get one without asking for it and seeing it said."""
    files = sorted(lsmdc.rglob("*.avi"))
    gone = {files[i].stem: files[i] for i in rng.choice(len(files), size=3, replace=False)}
    for file in gone.values():
        file.unlink()
    folder = annotations / "lsmdc"
    with pytest.raises(DataError, match=r"test clips without video file \(3\)") as caught:
        read("lsmdc", folder, videos=str(lsmdc))
    assert all(name in str(caught.value) for name in gone)
    assert "data.allow_missing=true" in str(caught.value)
    found = read("lsmdc", folder, videos=str(lsmdc), allow_missing=True)
    assert counts_of(found)["test"] == (997, 997)
    assert "test 997 videos for 1000, 997 captions for 1000" in found.manifest.protocol
    assert found.missing == tuple(sorted(gone))
    said = next(line for line in found.manifest.deviations if line.startswith("videos missing on disk"))
    assert all(name in said for name in gone)
    verified = read("lsmdc", folder, videos=str(lsmdc), verify=True)
    assert verified.summary()["missing"]["test"] == {"count": 3, "ids": sorted(gone)}
    assert "videos missing on disk: 3" in format_table(verified)


def test_two_files_of_one_video_are_refused(annotations: Path, lsmdc: Path) -> None:
    """Which of the two is the benchmark's cannot be guessed."""
    file = next(lsmdc.rglob("*.avi"))
    file.with_name(f"{file.stem}.mkv").write_bytes(b"video")
    with pytest.raises(DataError, match="several files of that name"):
        read("lsmdc", annotations / "lsmdc", videos=str(lsmdc))


def test_a_folder_of_other_videos(annotations: Path, tmp_path: Path) -> None:
    """The wrong folder should be said, not an empty gallery be built."""
    (tmp_path / "holiday.mp4").write_bytes(b"video")
    keys = {"videos": str(tmp_path), "allow_missing": True}
    with pytest.raises(DataError, match="holds no video of lsmdc"):
        read("lsmdc", annotations / "lsmdc", **keys)
    with pytest.raises(DataError, match="is missing"):
        read("lsmdc", annotations / "lsmdc", videos=str(tmp_path / "none"))


def test_didemo_by_its_file_names(annotations: Path, tmp_path: Path) -> None:
    """17 endings, none at all, or all converted: each name is one video, or the gallery shrinks."""
    folder = annotations / "didemo"
    listed = [name for split in ("train", "val", "test") for name in lines_of(folder, f"{split}_list.txt")]
    endings = {name.rpartition(".")[2] for name in listed}
    assert {"null", "divx", "asf", "3gpp", "m2ts", ""} <= endings
    chosen = {
        "as listed": lambda name: name,
        "converted": lambda name: f"{name.rpartition('.')[0]}.mp4",
        "converted and kept": lambda name: f"{name}.mp4",
    }
    for way, rename in chosen.items():
        videos = tmp_path / way
        videos.mkdir()
        for name in lines_of(folder, "test_list.txt"):
            (videos / rename(name)).touch()
        found = read("didemo", folder, videos=str(videos), allow_missing=True)
        assert counts_of(found)["test"] == (1004, 1004), way
    # An ending that no player has heard of: the listed name finds it, and so does the name without.
    odd = next(name for name in listed if name.endswith(".null"))
    assert stem_of(odd) == odd.removesuffix(".null")


def test_the_listed_file_wins(annotations: Path, tmp_path: Path) -> None:
    """Two uploads differ in their ending alone; the list says which of them the paragraph is of."""
    for ending in ("avi", "mp4"):
        (tmp_path / f"10175347@N00_4841555141_4eeb6a515a.{ending}").touch()
    found = read("didemo", annotations / "didemo", videos=str(tmp_path), allow_missing=True)
    assert [Path(row.uri).suffix for row in found.manifest.rows] == [".mp4"]


def test_other_names_of_a_video(annotations: Path, tmp_path: Path) -> None:
    """MSVD's videos are also kept as vid12.avi, ActivityNet's without v_, both with leading dashes."""
    msvd, activitynet = tmp_path / "msvd", tmp_path / "activitynet"
    for folder, names in (
        (msvd, ("vid1.avi", "-7KMZQEsJW4_205_208.avi")),
        (activitynet, ("--0edUL8zmA.mkv",)),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    found = read("msvd", annotations / "msvd", videos=str(msvd), allow_missing=True)
    assert captions_of(found).keys() == {"-4wsuPCjDBc_5_15", "-7KMZQEsJW4_205_208"}
    found = read("activitynet", annotations / "activitynet", videos=str(activitynet), allow_missing=True)
    assert captions_of(found).keys() == {"v_--0edUL8zmA"}


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("video7020.mp4", "video7020"),
        (r"C:\data\video7020.MP4", "video7020"),
        ("3086_UGLY_TRUTH_00.23.23.000-00.23.28.886", "3086_UGLY_TRUTH_00.23.23.000-00.23.28.886"),
        ("3086_UGLY_TRUTH_00.23.23.000-00.23.28.886.avi", "3086_UGLY_TRUTH_00.23.23.000-00.23.28.886"),
        ("10052357@N03_7585070382_5762149bfc.", "10052357@N03_7585070382_5762149bfc"),
        ("/home/x/videos/-4wsuPCjDBc_5_15.avi", "-4wsuPCjDBc_5_15"),
        ("video7020.webm", "video7020"),
        (".mp4", ".mp4"),
    ],
)
def test_stems(name: str, stem: str) -> None:
    """What follows the last dot may belong to the id."""
    assert stem_of(name) == stem
    assert names_of(stem, name)[-1] == stem


def test_videos_held_out_for_val(annotations: Path) -> None:
    """Where there is no val, a checkpoint can be chosen on train videos, and never on test ones."""
    keys = {"benchmark": "youcook2", "annotations": str(annotations / "youcook2")}
    whole = read_benchmark(DataConfig(**keys))
    held = read_benchmark(DataConfig(**keys, val_videos=100))
    splits = {row.video_id: row.split for row in held.manifest.rows}
    before = {row.video_id: row.split for row in whole.manifest.rows}
    assert all(before[name] == "train" for name, split in splits.items() if split == "val")
    assert {n for n, s in before.items() if s == "test"} == {n for n, s in splits.items() if s == "test"}
    # Segments of one video go together: none is trained on and validated on.
    videos = {
        split: {n.partition("#")[0] for n, s in splits.items() if s == split} for split in ("train", "val")
    }
    assert len(videos["val"]) == 100
    assert len(videos["train"]) == 1233
    assert not videos["val"] & videos["train"]
    assert held.manifest.protocol.endswith("; 100 train videos held out for val (seed 0)")
    other = read_benchmark(DataConfig(**keys, val_videos=100, seed=1))
    assert other.manifest.fingerprint != held.manifest.fingerprint
    with pytest.raises(ConfigError, match="train has 1333 videos"):
        read_benchmark(DataConfig(**keys, val_videos=1333))


def test_val_cannot_be_held_out_twice(annotations: Path) -> None:
    """DiDeMo has a val split: a second one would change the published train split for nothing."""
    with pytest.raises(ConfigError, match="has a val split of its own"):
        read("didemo", annotations / "didemo", val_videos=10)


def test_annotations_must_be_named_and_be_there(tmp_path: Path) -> None:
    """The first command of a new user often lacks a path."""
    with pytest.raises(ConfigError, match=r"data.annotations: is empty"):
        read_benchmark(DataConfig(benchmark="msvd"))
    with pytest.raises(DataError, match="is missing"):
        read("msvd", tmp_path / "none")
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match="holds no annotation file"):
        read("msvd", tmp_path)
