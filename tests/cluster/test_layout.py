"""Where outputs go: one place below ``storage.root``, never the folder that a command happens to run in."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.layout import layout
from gare.config import parse_config


def test_all_outputs_are_below_root_and_name(tmp_path: Path) -> None:
    """Two data sets must not write over each other, and deleting one folder must delete one data set."""
    places = layout(parse_config({"name": "mine", "storage": {"root": str(tmp_path)}}))
    assert places.is_local
    assert places.root == str(tmp_path)
    locations = [
        places.data,
        places.videos,
        places.manifest,
        places.frames,
        places.run("r"),
        places.checkpoint("r"),
        places.evaluation("r", "test"),
        places.step("prepare"),
    ]
    assert len(set(locations)) == len(locations)
    assert all(location.startswith(f"{tmp_path}/mine") for location in locations)
    assert places.evaluation("r", "test") != places.evaluation("r", "val")
    assert places.checkpoint("r").startswith(places.run("r") + "/")


def test_a_job_finds_what_a_plain_run_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run in a working copy of their own; a path relative to it would be gone with it."""
    monkeypatch.setenv("GARE_ROOT", str(tmp_path / "shared"))
    first = layout(parse_config({}))
    monkeypatch.chdir(tmp_path)
    assert layout(parse_config({})) == first
    assert first.root == str(tmp_path / "shared")
    monkeypatch.delenv("GARE_ROOT")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert layout(parse_config({})).root == str(tmp_path / "home" / ".gare")


@pytest.mark.parametrize(
    ("root", "data", "local"),
    [
        ("s3://bucket/gare/", "s3://bucket/gare/own", False),
        ("/", "/own", True),
        ("/mnt/100% #1/", "/mnt/100% #1/own", True),
    ],
)
def test_roots(root: str, data: str, local: bool) -> None:
    """A slash at the end or a bucket must not change the names below."""
    places = layout(parse_config({"storage": {"root": root}}))
    assert places.data == data
    assert places.is_local is local
    assert places.manifest == f"{data}/manifest.parquet"


def test_a_relative_root_is_fixed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run elsewhere; what they get must mean the same there."""
    monkeypatch.chdir(tmp_path)
    assert layout(parse_config({"storage": {"root": "out"}})).root == str(tmp_path / "out")
