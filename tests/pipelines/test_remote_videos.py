"""Videos and outputs on S3 and web servers, the whole way, with a network that drops connections."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.layout import layout
from gare.config import Config
from gare.data.manifest import read_manifest
from gare.data.store.contents import Store, frame_schema, read_columns
from gare.errors import GareError
from gare.storage.files import delete_tree, list_files
from pipelines import evaluate, extract, prepare, train
from tests.helpers.pipelines import in_process, tiny
from tests.helpers.servers import DroppingProxy, Site

#: Name of the clip, where it is put and its split.
CLIPS = (
    ("realshort.mp4", "folder", "train"),
    ("video_90.mov", "folder", "train"),
    ("test_pattern_321x241_vp9.mp4", "s3", "train"),
    ("sample_mpeg4.mp4", "web", "train"),
    ("test_card_av1.mkv", "local", "val"),
    ("newtonscradle.gif", "web", "test"),
    ("asl_book.mkv", "s3", "test"),
)


@pytest.fixture
def captions(shared: Path, s3: Any, site: Site, tmp_path: Path) -> Path:
    """Real clips, spread over all places that videos may be at, and the captions file that names them."""
    path = tmp_path / "captions.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["video", "caption", "split"])
        for name, place, split in CLIPS:
            source = shared / "data" / "videos" / name
            video = {
                "folder": name,
                "s3": f"s3://videos/more/{name}",
                "web": f"{site.url}/{name}?signature=hush",
                "local": source.as_uri(),
            }[place]
            writer.writerow([video, f"what is in {name}", split])
            if place == "web":
                site.files[f"/{name}"] = source.read_bytes()
            elif place != "local":
                key = f"clips/{name}" if place == "folder" else f"more/{name}"
                s3.put_object(Bucket="videos", Key=key, Body=source.read_bytes())
    return path


def on_s3(root: str, root_folder: Path, captions: Path, *more: str) -> Config:
    return tiny(
        "name=remote",
        "data.benchmark=folder",
        "data.videos=s3://videos/clips",
        f"data.captions={captions}",
        f"storage.root=s3://videos/{root}",
        f"tracking.uri=sqlite:///{root_folder / 'mlflow-remote.db'}",
        "sources.private_addresses=true",
        "sources.backoff_s=0.05",
        "sources.retries=20",
        "extract.videos_per_part=2",
        "extract.max_failed_fraction=0",
        "train.batch_size=4",
        "train.epochs=2",
        "train.diagnostics_every=0",
        "cluster.train_workers=1",
        *more,
    )


def rows(store: str) -> dict[str, pa.Table]:
    """Every row of a store, by id, from what its parts hold."""
    columns = frame_schema(tiny().extract).names
    places = Store(store).ids()
    tables = {part: read_columns(part, columns) for part, _ in places.values()}
    return {video: tables[part].slice(row, 1).combine_chunks() for video, (part, row) in places.items()}


def test_lost_connections_change_nothing(
    ray_local: None, root: Path, s3: Any, s3_proxy: DroppingProxy, site: Site, captions: Path
) -> None:
    """Networks fail every night; the store of such a night must be that of a quiet one, value by value."""
    quiet, disturbed = (on_s3(name, root, captions) for name in ("quiet", "disturbed"))
    for config in (quiet, disturbed):
        prepared = prepare.run(config)
        assert prepared["counts"]["train"]["videos"] == 4
    assert read_manifest(layout(quiet).manifest).fingerprint == prepared["fingerprint"]
    result = extract.run(quiet)
    assert (result["videos"], result["failed"]) == (len(CLIPS), {})
    expected = rows(layout(quiet).frames)
    assert len(expected) == len(CLIPS)
    assert {video.rpartition("/")[2] for video in expected} == {Path(name).stem for name, _, _ in CLIPS}

    retried = on_s3("disturbed", root, captions, "extract.retry_failed=true")
    ended: list[GareError] = []
    for _ in range(8):
        s3_proxy.disturb(drops=25, most_bytes=150_000)
        site.faults = [("cut", 10_000), 503]
        # One that ends with an error is run again, as a person does.
        try:
            result = extract.run(retried)
            break
        except GareError as error:
            ended.append(error)
    else:
        pytest.fail(f"never went through: {'; '.join(map(str, ended))}")
    print(s3_proxy.dropped)
    assert s3_proxy.dropped["body"] > 0
    s3_proxy.disturb(0)
    assert (result["videos"], result["failed"]) == (len(CLIPS), {})
    found = rows(layout(disturbed).frames)
    assert found.keys() == expected.keys()
    for video, row in expected.items():
        assert found[video].equals(row), video
    meta = Store(layout(disturbed).frames).read_meta()
    assert meta.complete
    assert "hush" not in str(meta)
    assert all("hush" not in str(row["uri"]) for row in found.values())


def test_a_bad_night_is_made_up_for_by_the_next(
    ray_local: None, root: Path, s3: Any, site: Site, captions: Path
) -> None:
    """Five minutes of 503 must not keep clips out of the store for good, while every night ends well."""
    config = on_s3(
        "night", root, captions, "sources.retries=1", "extract.max_failed_fraction=1", "extract.workers=1"
    )
    prepare.run(config)

    def busy() -> None:
        if site.asked[-1][1] != "bytes=0-0":  # which asks for size and version alone
            site.faults.append(503)

    site.before = busy
    result = extract.run(config)
    assert (result["videos"], len(result["failed"])) == (len(CLIPS) - 2, 2)
    again = extract.run(config)
    names = ("new", "changed", "unchanged", "gone", "retried", "attempted", "videos")
    assert [again[name] for name in names] == [0, 0, len(CLIPS) - 2, 0, 2, 2, len(CLIPS) - 2]
    assert again["failed"] == result["failed"]
    site.before = lambda: None
    quiet = extract.run(config)
    assert (quiet["videos"], quiet["retried"], quiet["failed"]) == (len(CLIPS), 2, {})
    assert Store(layout(config).frames).read_meta().complete
    asked = len(site.asked)
    assert extract.run(config)["attempted"] == 0
    assert len(site.asked) == asked + 2


def test_outputs_on_s3_go_the_whole_way(
    ray_local: None, root: Path, s3: Any, captions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cluster without a shared disk has nothing else; each step must find there what the last one left."""
    config = on_s3("whole", root, captions, "extract.workers=1")
    prepare.run(config)
    places = layout(config)
    assert extract.run(config)["attempted"] == len(CLIPS)
    # As after a kill: what is lost is made again, what is there stays.
    before = {entry["Key"]: entry["LastModified"] for entry in _objects(s3, "whole/remote/frames/data/")}
    lost = list_files(f"{places.frames}/data")[0]
    ids = [video for video, (part, _) in Store(places.frames).ids().items() if part == lost]
    key = lost.removeprefix("s3://videos/")
    s3.delete_object(Bucket="videos", Key=key)
    assert extract.run(config)["attempted"] == len(ids)
    after = {entry["Key"]: entry["LastModified"] for entry in _objects(s3, "whole/remote/frames/data/")}
    assert {name: time for name, time in after.items() if name in before and name != key} == {
        name: time for name, time in before.items() if name != key
    }
    trained = train.run(config)
    assert trained["steps"] == 2
    assert trained["checkpoint"] == "s3://videos/whole/remote/runs/first/best"
    assert train.run(config) == trained
    assert evaluate.run(config)["num_videos"] == 2
    delete_tree(places.data)
    assert _objects(s3, "whole/remote/") == []


def _objects(s3: Any, prefix: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = s3.list_objects_v2(Bucket="videos", Prefix=prefix).get("Contents", [])
    return [entry for entry in found if not entry["Key"].endswith("/")]


def test_videos_that_are_gone_are_failures_with_a_reason(
    ray_local: None,
    root: Path,
    s3: Any,
    site: Site,
    captions: Path,
    tiny_yaml: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Links rot; each must be named with its reason, without the signature that somebody paid for."""
    config = on_s3("gone", root, captions, "extract.max_failed_fraction=1", "extract.workers=1")
    prepare.run(config)
    s3.delete_object(Bucket="videos", Key="more/asl_book.mkv")
    del site.files["/newtonscradle.gif"]
    result = extract.run(config)
    failures = Store(layout(config).frames).read_failures(set())
    assert {video.rpartition("/")[2] for video in failures} == {"asl_book", "newtonscradle"}
    assert {row["stage"] for row in failures.values()} == {"fetch"}
    reasons = {row["message"] for row in failures.values()}
    assert reasons == {"there is no such object (S3 answers NoSuchKey)", "the server answers 404 Not Found"}
    assert "hush" not in str(failures)
    assert result["videos"] == len(CLIPS) - 2


def test_what_can_only_be_local_is_said(
    root: Path, s3: Any, captions: Path, tiny_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Generated videos and an SQLite file need a disk; that has to be known before hours of work."""
    answer = in_process(capsys, prepare.run, "--config", tiny_yaml, "storage.root=s3://videos/x")
    answer.refused(2, "storage.root", "a local folder for generated videos")
