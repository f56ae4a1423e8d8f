"""From videos to parts of the store: real files, broken files, resume and retry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from gare.config import ExtractConfig
from gare.data.collection import compare
from gare.data.extraction import Extractor, part_size
from gare.data.frames import FrameReader
from gare.data.local_source import LocalSource
from gare.data.manifest import Manifest, ManifestRow
from gare.data.store import ids_in_parts, part_files, read_columns, read_failures
from gare.errors import DataError
from tests.stores import describe_store

EXTRACT = ExtractConfig(num_frames=3, image_size=32, encoding="raw", sample_fps=2.0)


def write_video(path: Path, level: int, seconds: float = 1.0) -> None:
    """A video of one grey level, 64×48 pixels at 10 frames per second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(int(10 * seconds)):
            picture = np.full((48, 64, 3), level, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def pending_rows(manifest: Manifest, store: str, *, retry_failed: bool) -> list[dict[str, Any]]:
    """What a run over these videos would do."""
    versions = LocalSource().stat(row.uri for row in manifest.rows)
    return list(compare(store, manifest.rows, versions, retry_failed=retry_failed).pending)


def counts_of(done: dict[str, Any]) -> tuple[int, int, int]:
    """Videos written, videos failed and frames written."""
    return done["written"], done["failed"], done["frames"]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Two good videos, one of them twice as two clips, a broken file and one that is not there."""
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "dark.mp4", 60)
    write_video(videos / "light.mp4", 200, seconds=3)
    (videos / "broken.mp4").write_bytes(b"this is no video")
    clips = [
        ("dark", "dark.mp4", None, None),
        ("light", "light.mp4", None, None),
        ("light end", "light.mp4", 2.5, 3.0),
        ("broken", "broken.mp4", None, None),
        ("gone", "gone.mp4", None, None),
    ]
    return Manifest(
        tuple(
            ManifestRow(name, str(videos / file), start, end, "train", ("a caption",))
            for name, file, start, end in clips
        ),
        benchmark="folder",
        protocol="own",
    )


@pytest.fixture
def store(tmp_path: Path) -> str:
    uri = str(tmp_path / "store")
    describe_store(uri, EXTRACT)
    return uri


@pytest.fixture
def extractor(store: str) -> Iterator[Extractor]:
    extractor = Extractor(store, EXTRACT)
    yield extractor
    extractor.close()


def test_good_and_bad_videos(manifest: Manifest, store: str, extractor: Extractor) -> None:
    """One broken file of ten thousand must cost itself alone, and be found again by its reason."""
    pending = pending_rows(manifest, store, retry_failed=False)
    assert [row["video_id"] for row in pending] == [row.video_id for row in manifest.rows]
    assert {row["attempts"] for row in pending} == {0}
    assert counts_of(extractor.write(pending)) == (3, 2, 2 + 3 + 1)
    stored = ids_in_parts(store, "data")
    assert stored.keys() == {"dark", "light", "light end"}
    frames, mask = FrameReader(store).read(["dark", "light", "light end"])
    assert mask.sum(axis=1).tolist() == [2, 3, 1]
    assert frames[0][mask[0]].mean() == pytest.approx(60, abs=3)
    assert frames[1][mask[1]].mean() == pytest.approx(200, abs=3)
    assert frames[2][mask[2]].mean() == pytest.approx(200, abs=3)
    row = read_columns(stored["light end"][0], ["video_id", "start_s", "frame_time_s", "decoder", "width_px"])
    end = next(entry for entry in row.to_pylist() if entry["video_id"] == "light end")
    assert 2.4 <= end["frame_time_s"][0] < 3
    assert (end["start_s"], end["width_px"]) == (2.5, 64)
    failures = read_failures(store, stored)
    assert failures.keys() == {"broken", "gone"}
    for name, failed in failures.items():
        assert failed["attempts"] == 1
        assert failed["uri"].endswith(f"{name}.mp4")
        assert failed["message"]
        assert failed["error_type"]


def test_resume_does_what_is_left(manifest: Manifest, store: str, extractor: Extractor) -> None:
    """A job that is started again must neither repeat hours of decoding nor forget a video."""
    pending = pending_rows(manifest, store, retry_failed=False)
    extractor.write(pending[:1] + pending[3:4])
    left = pending_rows(manifest, store, retry_failed=False)
    assert [row["video_id"] for row in left] == ["light", "light end", "gone"]
    extractor.write(left)
    before = part_files(store, "data")
    assert pending_rows(manifest, store, retry_failed=False) == []
    again = pending_rows(manifest, store, retry_failed=True)
    assert [(row["video_id"], row["attempts"]) for row in again] == [("broken", 1), ("gone", 1)]
    # One of them has been mended since.
    write_video(Path(manifest.rows[4].uri), 90)
    assert counts_of(extractor.write(again)) == (1, 1, 2)
    failures = read_failures(store, ids_in_parts(store, "data"))
    assert {name: row["attempts"] for name, row in failures.items()} == {"broken": 2}
    assert set(before) < set(part_files(store, "data"))
    assert [row["video_id"] for row in pending_rows(manifest, store, retry_failed=True)] == ["broken"]


def test_a_group_that_is_done_again_may_end_otherwise(
    manifest: Manifest, store: str, extractor: Extractor
) -> None:
    """Ray repeats a task whose actor died after writing; what fails by chance must not be there twice."""
    pending = pending_rows(manifest, store, retry_failed=False)
    group = [pending[0], pending[4]]
    extractor.write(group)
    write_video(Path(manifest.rows[4].uri), 90)
    extractor.write(group)
    assert ids_in_parts(store, "data").keys() == {"dark", "gone"}
    assert len(part_files(store, "data")) == 1


def test_a_store_that_cannot_be_written_is_said(manifest: Manifest, tmp_path: Path) -> None:
    """A full or read-only disk is no fault of the videos and must not be recorded as theirs."""
    (tmp_path / "file").write_text("not a folder")
    extractor = Extractor(str(tmp_path / "file"), EXTRACT)
    try:
        with pytest.raises(DataError, match="cannot be written"):
            extractor.write(pending_rows(manifest, str(tmp_path / "other"), retry_failed=False)[:1])
    finally:
        extractor.close()


@pytest.mark.parametrize(
    ("num_rows", "workers", "limit", "expected"),
    [(1000, 2, 32, 32), (10, 2, 32, 2), (1, 8, 32, 1), (64, 2, 32, 8), (100, 1, 1, 1)],
)
def test_parts_leave_work_for_all(num_rows: int, workers: int, limit: int, expected: int) -> None:
    """Few large parts would leave all but one worker idle at the end."""
    assert part_size(num_rows, workers, limit) == expected
