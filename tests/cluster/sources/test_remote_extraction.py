"""Extraction from S3 to S3 over lost connections, without Ray: what one worker does with its parts."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.sources.fetch import RemoteVideos
from gare.config import ExtractConfig, SourcesConfig
from gare.data.manifest import Manifest, ManifestRow
from gare.data.store.contents import Store, frame_schema, read_columns
from gare.data.videos import LocalVideos, VideoSource
from gare.errors import DataError
from gare.extract.comparison import compare
from gare.extract.frame_writer import Extractor
from gare.storage import object_store
from tests.helpers.servers import DroppingProxy, Site
from tests.helpers.stores import pending_rows

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
    places = Store(store).ids()
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
    assert Store("s3://videos/disturbed").read_failures(found) == {}


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
    failures = Store(store).read_failures(set())
    assert {name: row["stage"] for name, row in failures.items()} == {
        "gone": "fetch",
        "broken": "decode",
        "missing": "fetch",
        "no object": "fetch",
    }
    assert {row["transient"] for row in failures.values()} == {False}
    assert failures["gone"]["message"] == "the server answers 404 Not Found"
    assert failures["gone"]["uri"] == f"{site.url}/gone.mp4"
    assert failures["missing"]["error_type"] == "FileNotFoundError"
    assert rows(store)["good"]["uri"].to_pylist() == [f"{site.url}/good.mp4"]
    assert "hush" not in str(failures)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (503, "the server answers 503"),
        (429, "the server answers 429"),
        (403, "the server answers 403"),
        (("cut", 1000), "the connection was lost"),
        ("refused", "the server cannot be connected to"),
    ],
)
def test_a_bad_hour_of_a_server_is_made_up_for(
    site: Site, shared: Path, tmp_path: Path, fault: Any, said: str
) -> None:
    """Clips that a busy server, an ended signature or a lost line kept out must be in the store tomorrow."""
    site.files["/good.mp4"] = (shared / "data" / "videos" / "realshort.mp4").read_bytes()
    clip = ManifestRow("good", f"{site.url}/good.mp4", None, None, "train", ("a",))
    manifest, store = Manifest((clip,), benchmark="folder", protocol="own"), str(tmp_path / "store")
    with extractor(store, retries=1) as worker:

        def left() -> list[dict[str, Any]]:
            versions = worker.source.stat([clip.uri])
            return list(compare(store, manifest.rows, versions, retry_failed=False, max_attempts=3).pending)

        pending = left()
        if fault == "refused":
            pending = [row | {"uri": "http://127.0.0.1:1/good.mp4"} for row in pending]
        else:
            site.faults = [fault] * 2
        worker.write(pending)
        site.faults = []
        failed = Store(store).read_failures(set())["good"]
        assert (failed["stage"], failed["attempts"], failed["transient"]) == ("fetch", 1, True)
        assert failed["message"].startswith(said)
        worker.write(left())
        assert rows(store).keys() == {"good"}
        assert left() == []


def test_a_full_disk_of_a_node_is_made_up_for(
    site: Site, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One node without room for temporary files would take its share of the collection out for good."""
    site.files["/good.mp4"] = (shared / "data" / "videos" / "realshort.mp4").read_bytes()
    clip = ManifestRow("good", f"{site.url}/good.mp4", None, None, "train", ("a",))
    manifest, store = Manifest((clip,), benchmark="folder", protocol="own"), str(tmp_path / "store")
    with extractor(store, retries=1) as worker:
        pending = pending_rows(manifest, store, retry_failed=False, source=worker.source)
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EIO):

            def refused(*_: Any, number: int = number) -> None:
                raise OSError(number, os.strerror(number))

            with monkeypatch.context() as patch:
                patch.setattr("cluster.sources.temporary.tempfile.mkstemp", refused)
                worker.write(pending)
            failed = Store(store).read_failures(set())["good"]
            assert (failed["stage"], failed["transient"]) == ("fetch", True)
            assert "TMPDIR" in failed["message"]
            pending = [row | {"attempts": row["attempts"] + 1} for row in pending]


def test_a_storage_that_is_away_fails_no_clip(s3_proxy: DroppingProxy, s3: Any, shared: Path) -> None:
    """The store's own server was down, not that of the videos: no clip may be recorded for it."""
    clip = ManifestRow("good", str(shared / "data/videos/realshort.mp4"), None, None, "train", ("a",))
    manifest = Manifest((clip,), benchmark="folder", protocol="own")
    with pytest.MonkeyPatch.context() as patch, extractor("s3://videos/store") as worker:
        patch.setattr(object_store, "MAX_RETRIES", 0)
        object_store._file_system.cache_clear()
        pending = pending_rows(manifest, "s3://videos/store", retry_failed=False, source=worker.source)
        s3_proxy.refuse("/store/data/")
        with pytest.raises(DataError, match="cannot be written"):
            worker.write(pending)
        s3_proxy.refuse("")
        assert Store("s3://videos/store").read_failures(set()) == {}
        again = pending_rows(manifest, "s3://videos/store", retry_failed=False, source=worker.source)
        assert again == pending
    object_store._file_system.cache_clear()
