"""Real clips of many containers and codecs, and files that are broken in many ways."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.layout import layout
from gare.data.store.contents import Store
from gare.data.store.frame_reader import FrameReader
from pipelines import evaluate, extract, prepare, train
from tests.helpers.pipelines import losses, tiny

JPEG = ("extract.encoding=jpeg", "extract.sample_fps=1")
#: Nothing in them can be seen, as their README says.
HOPELESS = {"truncated_70pct_index_last", "zero_byte", "text_renamed", "audio_only", "zero_duration"}


def test_real_clips_go_the_whole_way(ray_local: None, shared: Path) -> None:
    """Synthetic videos are all alike; a user's are not."""
    folder = shared / "data"
    settings = (
        "name=real",
        "data.benchmark=folder",
        f"data.videos={folder / 'videos'}",
        f"data.captions={folder / 'captions.json'}",
        "train.epochs=1",
        "train.max_steps=3",
        "cluster.train_workers=1",
        *JPEG,
    )
    config = tiny(*settings)
    prepared = prepare.run(config)
    assert sum(split["videos"] for split in prepared["counts"].values()) == 58
    assert prepared["left_out"] == 0
    extracted = extract.run(config)
    print(json.dumps(extracted["failed"], indent=2))
    assert extracted["videos"] >= 54
    assert extracted["videos"] + len(extracted["failed"]) == 58
    assert all(extracted["failed"].values())
    assert train.run(config)["steps"] == 3
    assert len(losses(layout(config).run("first"))["loss/total"]) == 3
    evaluation = evaluate.run(config)
    assert evaluation["num_texts"] == 3 * evaluation["num_videos"]
    assert evaluation["num_videos"] > 5


def test_videos_alone_are_extracted(trained: dict[str, Any], shared: Path, tmp_path: Path) -> None:
    """People who only want to search have no captions; frames and features are made all the same."""
    for video in ("red", "green", "blue"):
        (tmp_path / f"{video}.mp4").symlink_to(shared / "data" / "faults" / "videos" / f"{video}.mp4")
    config = tiny(
        "name=alone",
        "data.benchmark=folder",
        f"data.videos={tmp_path}",
        "extract.store=both",
        "extract.workers=1",
        f"features.weights={trained['checkpoint']}",
    )
    assert prepare.run(config)["counts"]["train"] == {"videos": 1, "captions": 0}
    result = extract.run(config)
    assert result["videos"] == result["features"]["videos"] == 3
    for store in (layout(config).frames, layout(config).features):
        assert set(Store(store).ids()) == {"red", "green", "blue"}


def test_broken_files_stop_nothing_and_are_never_zeros(
    ray_local: None, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bad file must not end a night's extraction; a clip of zeros would be trained on in silence."""
    folder = shared / "data" / "broken"
    files = sorted(path.name for path in folder.iterdir() if path.name != "README.md")
    captions = tmp_path / "captions.csv"
    with captions.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["video", "caption"])
        writer.writerows((name, f"what is in {number}") for number, name in enumerate(files))
    settings = ("name=broken", "data.benchmark=folder", f"data.videos={folder}", f"data.captions={captions}")
    config = tiny(*settings, *JPEG, "extract.max_failed_fraction=1")
    prepared = prepare.run(config)
    assert sum(split["videos"] for split in prepared["counts"].values()) == len(files) == 16
    result = extract.run(config)
    store = layout(config).frames
    held = Store(store).ids()
    assert len(held) + len(result["failed"]) == 16
    assert not held.keys() & result["failed"].keys()
    assert {Path(video).stem for video in result["failed"]} >= HOPELESS
    assert all(len(reason) > 10 for reason in result["failed"].values())
    frames, mask = FrameReader(store).read(list(held))
    for video, clip, real in zip(held, frames, mask, strict=True):
        assert real.any(), video
        assert clip[real].reshape(real.sum(), -1).any(axis=1).all(), f"{video} has a frame of zeros"
    print(json.dumps(result["failed"], indent=2))
