"""Extraction that is resumed, repeated, retried, and that meets bad videos."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.storage import Layout, layout
from gare.data.files import list_files
from gare.data.manifest import Manifest, ManifestRow, read_manifest, write_manifest
from gare.data.store import ids_in_parts, read_failures, read_meta
from pipelines import extract, train
from tests.pipelines.support import in_process, snapshot, tiny


@pytest.fixture
def copy(benchmark: dict[str, Any], places: Layout, request: pytest.FixtureRequest) -> Layout:
    """A copy of the tiny benchmark's manifest and store, named after the test."""
    copied = layout(tiny(f"name={request.node.originalname}"))
    shutil.copytree(places.frames, copied.frames)
    shutil.copy2(places.manifest, copied.manifest)
    return copied


def test_same_job_again_changes_nothing(
    copy: Layout, benchmark: dict[str, Any], tiny_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever is unsure runs it again; a store that others read must not move under them."""
    name = f"name={Path(copy.data).name}"
    extract.run(tiny(name, "train.seed=5"))  # the result names the copy's folder now
    before = snapshot(copy.frames)
    answer = in_process(capsys, extract.run, "--config", tiny_yaml, name, "train.seed=6")
    assert answer.status == 0
    assert json.loads(answer.stdout)["videos"] == benchmark["extract"]["videos"]
    assert snapshot(copy.frames) == before


def test_lost_parts_are_made_again(
    copy: Layout, places: Layout, tiny_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupted job costs what it had not done, no more, and gives the same frames."""
    parts = list_files(f"{copy.frames}/data")
    assert len(parts) > 2
    lost = {part: pq.read_table(part) for part in parts[:2]}
    kept = {part: Path(part).stat().st_mtime_ns for part in parts[2:]}
    for part in lost:
        Path(part).unlink()
    ids = [video for table in lost.values() for video in table["video_id"].to_pylist()]
    answer = in_process(capsys, extract.run, "--config", tiny_yaml, f"name={Path(copy.data).name}")
    assert answer.status == 0, answer.stderr
    assert json.loads(answer.stdout)["attempted"] == len(ids)
    assert f"{len(ids)} new, 0 changed, {40 - len(ids)} unchanged, 0 gone, {len(ids)} to do" in answer.stderr
    assert f"extracted {len(ids)}, failed 0, left 0" in answer.stderr
    assert {part: Path(part).stat().st_mtime_ns for part in kept} == kept
    again = ids_in_parts(copy.frames, "data")
    original = ids_in_parts(places.frames, "data")
    assert again.keys() == original.keys()
    for video in ids:
        (part, row), (original_part, original_row) = again[video], original[video]
        assert pq.read_table(part).slice(row, 1).equals(pq.read_table(original_part).slice(original_row, 1))
    assert read_meta(copy.frames).complete


def test_other_settings_are_refused(copy: Layout, tiny_yaml: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Frames of two settings in one store would train a model on a mixture."""
    before = snapshot(copy.frames)
    answer = in_process(
        capsys,
        extract.run,
        "--config",
        tiny_yaml,
        f"name={Path(copy.data).name}",
        "extract.sample_fps=3",
        "extract.encoding=jpeg",
    )
    answer.refused(
        3,
        "sample_fps is 2.0 in the store and 3.0 in the configuration",
        "encoding is 'raw' in the store and 'jpeg' in the configuration",
    )
    assert snapshot(copy.frames) == before


def test_bad_videos_are_recorded_and_tried_again(
    benchmark: dict[str, Any],
    places: Layout,
    tiny_yaml: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bad videos must be named with reasons; good ones must not be lost with them, nor trained on alone."""
    good = read_manifest(places.manifest).of_split("train")[:6]
    broken, missing = tmp_path / "text.mp4", tmp_path / "later.mp4"
    broken.write_text("this is no video")
    bad = [ManifestRow(path.stem, str(path), None, None, "val", ("one",)) for path in (broken, missing)]
    mixed = layout(tiny("name=mixed"))
    write_manifest(Manifest((*good, *bad), "folder", "by hand"), mixed.manifest)

    answer = in_process(capsys, extract.run, "--config", tiny_yaml, "name=mixed")
    answer.refused(3, "2 of 8 videos failed", "extract.max_failed_fraction=0.1", "extract.retry_failed=true")
    assert ids_in_parts(mixed.frames, "data").keys() == {row.video_id for row in good}
    failures = read_failures(mixed.frames, set())
    assert failures.keys() == {"text", "later"}
    assert all(row["message"] and row["attempts"] == 1 for row in failures.values())

    answer = in_process(capsys, train.run, "--config", tiny_yaml, "name=mixed", "train.batch_size=2")
    answer.refused(3, "the store is not complete: of 8 videos it holds 6, 2 failed", "pipelines/extract.py")
    assert not Path(mixed.run("first")).exists()

    # Without retry_failed they are left alone; a larger share lets the store pass.
    result = extract.run(tiny("name=mixed", "extract.max_failed_fraction=0.3"))
    assert (result["attempted"], set(result["failed"])) == (0, {"text", "later"})
    assert read_meta(mixed.frames).complete

    shutil.copyfile(good[0].uri, missing)
    result = extract.run(tiny("name=mixed", "extract.max_failed_fraction=0.3", "extract.retry_failed=true"))
    assert (result["attempted"], result["videos"], set(result["failed"])) == (2, 7, {"text"})
    failures = read_failures(mixed.frames, ids_in_parts(mixed.frames, "data"))
    assert {video: row["attempts"] for video, row in failures.items()} == {"text": 2}


def test_store_of_a_smaller_manifest_is_refused(
    copy: Layout, tiny_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Videos that were added since would silently be missing from training."""
    manifest = read_manifest(copy.manifest)
    new = ManifestRow("new", "/nowhere/new.mp4", None, None, "train", ("one",))
    write_manifest(Manifest((*manifest.rows, new), "synthetic", "grown"), copy.manifest)
    answer = in_process(capsys, train.run, "--config", tiny_yaml, f"name={Path(copy.data).name}")
    answer.refused(3, "the store is not complete: of 41 videos it holds 40, 0 failed")
