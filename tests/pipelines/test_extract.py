"""Extraction that is resumed, repeated, retried, and that meets bad videos."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.layout import Layout, layout
from cluster.tracking import resolve_tracking_uri
from gare.data.manifest import Manifest, ManifestRow, read_manifest, write_manifest
from gare.data.store.contents import Store
from gare.data.store.frame_reader import FrameReader
from gare.storage.files import list_files
from pipelines import extract, train
from tests.helpers.pipelines import Answer, in_process, snapshot, tiny
from tests.helpers.stores import stored_values


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
    again = Store(copy.frames).ids()
    original = Store(places.frames).ids()
    assert again.keys() == original.keys()
    for video in ids:
        (part, row), (original_part, original_row) = again[video], original[video]
        assert pq.read_table(part).slice(row, 1).equals(pq.read_table(original_part).slice(original_row, 1))
    assert Store(copy.frames).read_meta().complete


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
    assert Store(mixed.frames).ids().keys() == {row.video_id for row in good}
    failures = Store(mixed.frames).read_failures(set())
    assert failures.keys() == {"text", "later"}
    assert all(row["message"] and row["attempts"] == 1 for row in failures.values())

    answer = in_process(capsys, train.run, "--config", tiny_yaml, "name=mixed", "train.batch_size=2")
    answer.refused(3, "the store is not complete: of 8 videos it holds 6, 2 failed", "pipelines/extract.py")
    assert not Path(mixed.run("first")).exists()

    # Without retry_failed they are left alone; a larger share lets the store pass.
    result = extract.run(tiny("name=mixed", "extract.max_failed_fraction=0.3"))
    assert (result["attempted"], set(result["failed"])) == (0, {"text", "later"})
    assert Store(mixed.frames).read_meta().complete

    shutil.copyfile(good[0].uri, missing)
    result = extract.run(tiny("name=mixed", "extract.max_failed_fraction=0.3", "extract.retry_failed=true"))
    assert (result["attempted"], result["videos"], set(result["failed"])) == (2, 7, {"text"})
    failures = Store(mixed.frames).read_failures(Store(mixed.frames).ids())
    assert {video: row["attempts"] for video, row in failures.items()} == {"text": 2}


def test_a_grown_and_changed_collection(
    places: Layout,
    benchmark: dict[str, Any],
    tmp_path: Path,
    tiny_yaml: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The nightly run: what is new or changed is done, what is gone no longer counts, then all is checked."""
    rows = read_manifest(places.manifest).rows
    own = layout(tiny("name=grown"))
    files = [tmp_path / f"{number}.mp4" for number in range(4)]
    clips = [ManifestRow(file.stem, str(file), None, None, "train", ("one",)) for file in files]
    for file, row in zip(files, rows, strict=False):
        shutil.copyfile(row.uri, file)
    arguments = ["--config", tiny_yaml, "name=grown", "extract.max_failed_fraction=0.5", "extract.workers=1"]

    def counts(answer: Answer) -> tuple[int, ...]:
        assert answer.status == 0, answer.stderr
        result = json.loads(answer.stdout)
        return tuple(result[key] for key in ("new", "changed", "unchanged", "gone", "attempted", "videos"))

    def command(*more: str) -> Answer:
        return in_process(capsys, extract.run, *arguments, *more, flags=extract.FLAGS)

    write_manifest(Manifest(tuple(clips[:3]), "folder", "by hand"), own.manifest)
    assert counts(command()) == (3, 0, 0, 0, 3, 3)
    shutil.copyfile(rows[5].uri, files[0])
    files[1].unlink()
    write_manifest(Manifest((*clips[:2], clips[3]), "folder", "by hand"), own.manifest)
    answer = command("--preview", "2")
    assert counts(answer) == (1, 1, 0, 2, 3, 2)
    assert json.loads(answer.stdout)["failed"].keys() == {"1"}
    assert Path(json.loads(answer.stdout)["preview"]).read_bytes().startswith(b"\x89PNG")
    assert Store(own.frames).ids().keys() == {"0", "3"}
    new, other = stored_values(own.frames)["0"], stored_values(places.frames)[rows[5].video_id]
    assert new["frames"] == other["frames"]

    # Half of it is on a disk that is not mounted tonight: nothing is marked, nothing is lost.
    for file in (files[0], files[3]):
        file.rename(file.with_suffix(".away"))
    command().refused(3, "3 videos of the manifest that were there are gone", "is their folder mounted?")
    assert Store(own.frames).ids().keys() == {"0", "3"}
    for file in (files[0], files[3]):
        file.with_suffix(".away").rename(file)
    assert counts(command()) == (0, 0, 2, 2, 0, 2)

    merged = json.loads(command("--compact").stdout)
    assert (merged["parts_after"], merged["rows_left_out"]) == (1, 3)
    assert stored_values(own.frames)["0"] == new
    assert json.loads(command("--verify").stdout)["sound"]
    part = Path(list_files(f"{own.frames}/data")[0])
    part.write_bytes(part.read_bytes()[:-9])
    answer = command("--verify")
    assert answer.status == 3
    faults = json.loads(answer.stdout)["faults"]
    assert str(part) in [fault["part"] for fault in faults]
    assert "is not whole Parquet" in answer.stderr
    command("--verify", "--compact").refused(2, "--verify and --compact exclude each other")
    # What the message says mends it.
    part.unlink()
    assert counts(command("--retry-failed"))[4:] == (3, 2)
    assert json.loads(command("--verify").stdout)["sound"]


def test_whole_pictures_go_the_whole_way(
    places: Layout, benchmark: dict[str, Any], tiny_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who keeps whole pictures must be able to show, merge, check and train on them as on squares."""
    own = layout(tiny("name=whole"))
    write_manifest(read_manifest(places.manifest), own.manifest)
    jpeg = ("name=whole", "extract.encoding=jpeg")

    def command(*more: str) -> Answer:
        return in_process(capsys, extract.run, "--config", tiny_yaml, *jpeg, *more, flags=extract.FLAGS)

    answer = command("extract.crop=none", "--preview", "2")
    assert answer.status == 0, answer.stderr
    assert json.loads(answer.stdout)["videos"] == benchmark["extract"]["videos"]
    assert Path(json.loads(answer.stdout)["preview"]).read_bytes().startswith(b"\x89PNG")
    reader = FrameReader(own.frames)
    before = {video_id: reader.read_whole(video_id)[0] for video_id in reader.places}
    sizes = {frames.shape[1:3] for frames in before.values()}
    assert {min(size) for size in sizes} == {32}
    assert max(map(max, sizes)) > 32
    assert json.loads(command("extract.crop=none", "--compact").stdout)["parts_after"] == 1
    for video_id, frames in before.items():
        assert np.array_equal(reader.read_whole(video_id)[0], frames)
    assert json.loads(command("extract.crop=none", "--verify").stdout)["sound"]
    crops = "crop is 'none' in the store and 'center' in the configuration"
    command().refused(3, crops)
    command("extract.crop=none", "extract.encoding=raw").refused(2, "crop none needs encoding jpeg")
    short = ("train.epochs=1", "train.max_steps=2", "cluster.train_workers=1")
    trained = train.run(tiny(*jpeg, "extract.crop=none", *short))
    assert trained["steps"] == 2


def test_each_extraction_is_a_run_in_mlflow(
    copy: Layout, root: Path, tiny_yaml: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What ran, how fast and what failed must be seen where all else is; idle nights leave nothing."""
    name = Path(copy.data).name
    broken = tmp_path / "broken.mp4"
    broken.write_text("this is no video")
    manifest = read_manifest(copy.manifest)
    new = ManifestRow("new", str(broken), None, None, "train", ("one",))
    write_manifest(Manifest((*manifest.rows, new), "synthetic", "grown"), copy.manifest)
    answer = in_process(capsys, extract.run, "--config", tiny_yaml, f"name={name}")
    assert answer.status == 0, answer.stderr
    result = json.loads(answer.stdout)
    extract.run(tiny(f"name={name}"))
    client = mlflow.MlflowClient(resolve_tracking_uri("sqlite:///mlflow.db", str(root)))
    experiment = client.get_run(result["mlflow_run_id"]).info.experiment_id
    runs = client.search_runs([experiment], f"attributes.run_name = '{name}/extract'")
    assert [run.info.run_id for run in runs] == [result["mlflow_run_id"]]
    assert runs[0].info.status == "FINISHED"
    assert runs[0].data.tags["fingerprint"] == result["fingerprint"]
    assert runs[0].data.params["extract.sample_fps"] == "2.0"
    metrics = runs[0].data.metrics
    assert (metrics["new"], metrics["unchanged"], metrics["failures"]) == (1, 40, 1)
    assert metrics["videos_per_s"] > 0
    assert "frames_per_s" in metrics
    table = json.loads(
        Path(client.download_artifacts(runs[0].info.run_id, "failures.json", str(tmp_path))).read_text()
    )
    assert [row[:2] for row in table["data"]] == [["new", str(broken)]]
    assert {file.path for file in client.list_artifacts(runs[0].info.run_id)} == {
        "failures.json",
        "result.json",
    }
    for said in ("slowest:", "failed: 1 ×", "GB read"):
        assert said in answer.stderr


def test_store_of_a_smaller_manifest_is_refused(
    copy: Layout, tiny_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Videos that were added since would silently be missing from training."""
    manifest = read_manifest(copy.manifest)
    new = ManifestRow("new", "/nowhere/new.mp4", None, None, "train", ("one",))
    write_manifest(Manifest((*manifest.rows, new), "synthetic", "grown"), copy.manifest)
    answer = in_process(capsys, train.run, "--config", tiny_yaml, f"name={Path(copy.data).name}")
    answer.refused(3, "the store is not complete: of 41 videos it holds 40, 0 failed")
