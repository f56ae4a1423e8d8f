"""Extraction from S3 to S3 over lost connections, without Ray: what one worker does with its parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.remote import RemoteVideos
from gare.config import ExtractConfig, SourcesConfig
from gare.data.extraction import Extractor
from gare.data.manifest import Manifest, ManifestRow
from gare.data.sources import LocalVideos, VideoSource
from gare.data.store import frame_schema, ids_in_parts, read_columns, read_failures
from gare.errors import DataError
from tests.servers import DroppingProxy, Site
from tests.stores import pending_rows

EXTRACT = ExtractConfig(num_frames=3, image_size=32, encoding="raw", sample_fps=1.0)
CLIPS = (
    *("realshort.mp4", "video_90.mov", "test_pattern_321x241_vp9.mp4", "test_card_av1.mkv"),
    *("newtonscradle.gif", "sample_mpeg4.mp4", "asl_book.mkv"),
)


@pytest.fixture
def manifest(shared: Path, s3: Any) -> Manifest:
    """Real clips on S3, one of them as two clips."""
    for name in CLIPS:
        s3.put_object(Bucket="videos", Key=name, Body=(shared / "data" / "videos" / name).read_bytes())
    clips = [(name, None, None) for name in CLIPS] + [("sample_mpeg4.mp4", 1.0, 3.0)]
    return Manifest(
        tuple(
            ManifestRow(f"{name} {start}", f"s3://videos/{name}", start, end, "train", ("a caption",))
            for name, start, end in clips
        ),
        benchmark="folder",
        protocol="own",
    )


@contextlib.contextmanager
def extractor(store: str, source: VideoSource | None = None, **settings: Any) -> Iterator[Extractor]:
    sources = SourcesConfig(**{"backoff_s": 0.0, "private_addresses": True, **settings})
    worker = Extractor(store, EXTRACT, source or RemoteVideos(sources, LocalVideos()))
    try:
        yield worker
    finally:
        worker.close()


def rows(store: str) -> dict[str, pa.Table]:
    """Every row of a store, by id."""
    places = ids_in_parts(store, "data")
    tables = {part: read_columns(part, frame_schema(EXTRACT).names) for part, _ in places.values()}
    return {video: tables[part].slice(row, 1).combine_chunks() for video, (part, row) in places.items()}


def extract(manifest: Manifest, store: str, worker: Extractor) -> None:
    """Does what is left, in parts of two."""
    pending = pending_rows(manifest, store, retry_failed=True, source=worker.source)
    for first in range(0, len(pending), 2):
        worker.write(pending[first : first + 2])


def test_lost_connections_change_no_value(s3_proxy: DroppingProxy, manifest: Manifest, shared: Path) -> None:
    """Networks fail every night; the store of such a night must be that of a quiet one, value by value."""
    with extractor("s3://videos/quiet") as worker:
        extract(manifest, "s3://videos/quiet", worker)
    expected = rows("s3://videos/quiet")
    assert expected.keys() == {row.video_id for row in manifest.rows}

    runs, drops = 0, 0
    while runs < 20 and pending_rows(manifest, "s3://videos/disturbed", retry_failed=True):
        runs += 1
        s3_proxy.disturb(drops=15, most_bytes=100_000)
        # One that ends with an error is run again, as a person does.
        with contextlib.suppress(DataError), extractor("s3://videos/disturbed", retries=3) as worker:
            extract(manifest, "s3://videos/disturbed", worker)
        drops += s3_proxy.dropped["body"]
        s3_proxy.disturb(0)
    print(f"{runs} runs, {drops} bodies dropped")
    assert drops > 0
    found = rows("s3://videos/disturbed")
    assert found.keys() == expected.keys()
    for video, row in expected.items():
        assert found[video].equals(row), video
    assert read_failures("s3://videos/disturbed", found) == {}


def test_local_and_remote_videos_give_the_same_rows(manifest: Manifest, shared: Path, tmp_path: Path) -> None:
    """Moving a collection to S3 must not change what is trained on."""
    with extractor(str(tmp_path / "remote")) as worker:
        extract(manifest, str(tmp_path / "remote"), worker)
    local = Manifest(
        tuple(
            ManifestRow(
                row.video_id,
                str(shared / "data" / "videos" / row.uri.rpartition("/")[2]),
                *(row.start_s, row.end_s, row.split, row.captions),
            )
            for row in manifest.rows
        ),
        benchmark="folder",
        protocol="own",
    )
    with extractor(str(tmp_path / "local"), LocalVideos()) as worker:
        extract(local, str(tmp_path / "local"), worker)
    remote, here = rows(str(tmp_path / "remote")), rows(str(tmp_path / "local"))
    assert remote.keys() == here.keys()
    for video, row in here.items():
        own = ["uri", "source_version"]
        assert remote[video].drop_columns(own).equals(row.drop_columns(own)), video


def test_what_cannot_be_fetched_is_a_failure_of_its_own_kind(
    s3: Any, site: Site, shared: Path, tmp_path: Path
) -> None:
    """Whether to mend a link or a file is the first question; the answer must show no signature."""
    site.files["/text.mp4"] = b"this is no video"
    site.files["/good.mp4"] = (shared / "data" / "videos" / "realshort.mp4").read_bytes()
    uris = {
        "gone": f"{site.url}/gone.mp4?signature=hush",
        "broken": f"{site.url}/text.mp4?signature=hush",
        "missing": str(tmp_path / "none.mp4"),
        "no object": "s3://videos/none.mp4",
        "good": f"{site.url}/good.mp4?signature=hush",
    }
    manifest = Manifest(
        tuple(ManifestRow(name, uri, None, None, "train", ("a",)) for name, uri in uris.items()),
        benchmark="folder",
        protocol="own",
    )
    store = str(tmp_path / "store")
    with extractor(store) as worker:
        extract(manifest, store, worker)
    failures = read_failures(store, set())
    assert {name: row["stage"] for name, row in failures.items()} == {
        "gone": "fetch",
        "broken": "decode",
        "missing": "fetch",
        "no object": "fetch",
    }
    assert failures["gone"]["message"] == "the server answers 404 Not Found"
    assert failures["gone"]["uri"] == f"{site.url}/gone.mp4"
    assert failures["missing"]["error_type"] == "FileNotFoundError"
    assert rows(store)["good"]["uri"].to_pylist() == [f"{site.url}/good.mp4"]
    assert "hush" not in str(failures)
