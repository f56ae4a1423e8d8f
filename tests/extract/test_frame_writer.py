"""From videos to parts of the store: real files, broken files, resume and retry."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gare.config import ExtractConfig
from gare.data.decode.clip_request import ClipRequest
from gare.data.decode.decoded_clip import DecodedClip
from gare.data.decode.process import DecodeProcess
from gare.data.manifest import Manifest, ManifestRow
from gare.data.store.contents import Store, frame_schema, part_files, read_columns
from gare.data.store.frame_reader import FrameReader
from gare.data.store.part_index import read_entries, read_index
from gare.data.store.parts import PartEncoder, encode_part, table_of
from gare.data.store.verify import verify
from gare.errors import DataError
from gare.extract.frame_writer import Extractor, clips_per_part, cut_into_parts
from tests.helpers.stores import describe_store, pending_rows, random_frames, stored_row, stored_values

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
    stored = Store(store).ids()
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
    failures = Store(store).read_failures(stored)
    assert failures.keys() == {"broken", "gone"}
    for name, failed in failures.items():
        assert failed["attempts"] == 1
        assert failed["uri"].endswith(f"{name}.mp4")
        assert failed["message"]
        assert failed["error_type"]
        assert failed["transient"] is False


def write_pictures(path: Path, sizes: list[tuple[int, int]], seed: int, codec: str = "libx264") -> None:
    """A video of smooth grey pictures at 2 per second, each of its own height and width."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 1), dtype=np.uint8).repeat(3, axis=2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=2)
        stream.height, stream.width = sizes[0]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if sizes[0][0] % 2 or sizes[0][1] % 2:
            stream.pix_fmt = "yuv444p"
        for number, (height, width) in enumerate(sizes):
            picture = np.array(Image.fromarray(np.roll(blocks, number, 0)).resize((width, height)))
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if codec != "mjpeg":
                container.mux(stream.encode(frame))
                continue
            # Each picture by an encoder of its own, since none changes its size.
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.height, encoder.width, encoder.pix_fmt = height, width, "yuvj420p"
            encoder.time_base = Fraction(1, 2)
            for packet in [*encoder.encode(frame), *encoder.encode()]:
                packet.stream, packet.time_base = stream, Fraction(1, 2)
                packet.pts = packet.dts = number
                container.mux(packet)
        if codec != "mjpeg":
            container.mux(stream.encode())


def test_whole_pictures_of_videos_of_any_shape(seed: int, tmp_path: Path) -> None:
    """The edges of a wide or tall video must be there for training, and its centre where it was."""
    shapes = {
        "wide.mp4": ([(48, 64)] * 3, (32, 42)),
        "tall.mp4": ([(64, 48)] * 3, (42, 32)),
        "square.mp4": ([(48, 48)] * 3, (32, 32)),
        "odd.mp4": ([(51, 67)] * 3, (32, 42)),
        "small.mp4": ([(16, 34)] * 3, (32, 68)),
        # A camera that is turned while it records.
        "turned.avi": ([(48, 64), (64, 48), (64, 64)], (32, 42)),
    }
    for name, (sizes, _) in shapes.items():
        write_pictures(tmp_path / name, sizes, seed, "mjpeg" if name.endswith("avi") else "libx264")
    rows = tuple(ManifestRow(name, str(tmp_path / name), None, None, "train", ("one",)) for name in shapes)
    manifest = Manifest(rows, benchmark="folder", protocol="own")
    readers = {}
    for crop in ("center", "none"):
        extract = EXTRACT.model_copy(update={"encoding": "jpeg", "jpeg_quality": 100, "crop": crop})
        store = str(tmp_path / crop)
        describe_store(store, extract)
        extractor = Extractor(store, extract)
        done = extractor.write(pending_rows(manifest, store, retry_failed=False))
        extractor.close()
        assert counts_of(done) == (6, 0, 18)
        faults, _ = verify(store, frame_schema(extract), list(shapes))
        assert [fault for fault in faults if fault["video_id"]] == []
        readers[crop] = FrameReader(store)
    for name, (_, shape) in shapes.items():
        whole, mask = readers["none"].read_whole(name)
        assert whole.shape == (3, *shape, 3)
        assert mask.all()
        (squares,), (known,) = (readers[crop].read([name])[0] for crop in ("none", "center"))
        # The same pixels, but for JPEG; those beside them are farther off.
        assert np.abs(squares.astype(int) - known).mean() < 1.5, name
        assert np.abs(squares[..., 1:, :].astype(int) - known[..., :-1, :]).mean() > 3, name


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
    failures = Store(store).read_failures(Store(store).ids())
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
    assert Store(store).ids().keys() == {"dark", "gone"}
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


@contextlib.contextmanager
def full_disk(kind: str, folder: Path) -> Iterator[None]:
    """A file system without room, or a process that may write no larger files, as a quota has it."""
    if kind == "quota":
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1024)):
            continue
    assert shutil.disk_usage(folder).free == 0
    yield
    ballast.unlink()


@pytest.fixture(params=["quota", "disk"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A folder on a disk of 256 kB where we may mount one, or any folder."""
    folder = tmp_path / "small"
    folder.mkdir()
    if request.param == "quota":
        yield request.param, folder
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a small disk; the quota tries the same")
    yield request.param, folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_nothing(
    manifest: Manifest, small_disk: tuple[str, Path], store: str, extractor: Extractor
) -> None:
    """Killed by a full disk at its first part; with room again the store is that of an undisturbed run."""
    kind, folder = small_disk
    extractor.write(pending_rows(manifest, store, retry_failed=False))
    uri = str(folder / "store")
    describe_store(uri, EXTRACT)
    other = Extractor(uri, EXTRACT)
    try:
        with full_disk(kind, folder), pytest.raises(DataError, match="cannot be written"):
            other.write(pending_rows(manifest, uri, retry_failed=False))
        assert [path for path in folder.rglob("*") if path.name.startswith(".gare-")] == []
        left = pending_rows(manifest, uri, retry_failed=False)
        assert {"dark", "light", "light end"} <= {row["video_id"] for row in left}
        other.write(left)
    finally:
        other.close()
    assert stored_values(uri) == stored_values(store)
    assert Store(uri).read_failures({}).keys() == Store(store).read_failures({}).keys()


def test_a_file_that_hangs_costs_itself_alone(manifest: Manifest, store: str) -> None:
    """A named pipe that nobody writes to: its reader is killed at the deadline, the others get their turn."""
    pipe = Path(manifest.rows[4].uri)
    os.mkfifo(pipe)
    extractor = Extractor(store, EXTRACT.model_copy(update={"deadline_s": 6.0}))
    try:
        pending = pending_rows(manifest, store, retry_failed=False)
        extractor.write([pending[4], *pending[:3]])
    finally:
        extractor.close()
    assert Store(store).ids().keys() == {"dark", "light", "light end"}
    failures = Store(store).read_failures({})
    assert failures.keys() == {"gone"}
    assert "deadline of 6 s" in failures["gone"]["message"]
    # Of a node that is overloaded, as far as anybody can tell.
    assert failures["gone"]["transient"] is True


def test_a_killed_decoder_is_no_fault_of_the_file(
    manifest: Manifest, store: str, extractor: Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system kills what takes too much memory; the file that it was at is tried once more, no more."""
    extract = DecodeProcess.extract
    killed: list[str] = []

    def kill(times: int) -> None:
        def dying(process: DecodeProcess, request: ClipRequest, **limits: Any) -> DecodedClip[bytes]:
            if killed.count(request.path) < times and request.path == manifest.rows[0].uri:
                killed.append(request.path)
                child = process._ready_child()
                os.kill(child.process.pid, signal.SIGKILL)
                child.process.wait()
                monkeypatch.setattr(process, "_ready_child", lambda: child)
                try:
                    return extract(process, request, **limits)
                finally:
                    monkeypatch.delattr(process, "_ready_child")
            return extract(process, request, **limits)

        monkeypatch.setattr(DecodeProcess, "extract", dying)

    pending = pending_rows(manifest, store, retry_failed=False)[:2]
    kill(2)
    assert counts_of(extractor.write(pending)) == (1, 1, 3)
    failed = Store(store).read_failures({})["dark"]
    assert "SIGKILL" in failed["message"]
    assert failed["transient"] is True
    killed.clear()
    kill(1)
    assert counts_of(extractor.write(pending_rows(manifest, store, retry_failed=True)[:1])) == (1, 0, 2)


@pytest.mark.parametrize(("signals", "transient"), [("SS", False), ("SK", True), ("KS", True)])
def test_what_crashes_the_decoder_twice_is_at_fault(
    manifest: Manifest,
    store: str,
    extractor: Extractor,
    monkeypatch: pytest.MonkeyPatch,
    signals: str,
    *,
    transient: bool,
) -> None:
    """A file with which the decoder fails for good is not tried every night; one that was killed once is."""
    left = [signal.SIGSEGV if letter == "S" else signal.SIGKILL for letter in signals]
    ready = DecodeProcess._ready_child

    def dying(process: DecodeProcess) -> Any:
        child = ready(process)
        os.kill(child.process.pid, left.pop(0))
        os.waitid(os.P_PID, child.process.pid, os.WEXITED | os.WNOWAIT)
        return child

    monkeypatch.setattr(DecodeProcess, "_ready_child", dying)
    extractor.write(pending_rows(manifest, store, retry_failed=False)[:1])
    assert Store(store).read_failures({})["dark"]["transient"] is transient


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that is there and gives EIO")
def test_a_disk_that_does_not_give_a_file_is_no_fault_of_the_file(
    manifest: Manifest, store: str, extractor: Extractor
) -> None:
    """Decoders take EIO and ESTALE for damage; the clips of a bad hour of a mount would be lost for good."""
    Path(manifest.rows[4].uri).symlink_to("/proc/self/mem")
    extractor.write(pending_rows(manifest, store, retry_failed=False)[3:])
    failures = Store(store).read_failures({})
    assert {key: (row["stage"], row["transient"]) for key, row in failures.items()} == {
        "broken": ("decode", False),
        "gone": ("fetch", True),
    }
    assert failures["gone"]["message"] == "cannot be read to its end: Input/output error"


def test_a_clip_that_seems_cut_off_is_read_to_its_end(
    manifest: Manifest, store: str, extractor: Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that fails in the middle would store half of a good film, and nobody would look at it again."""
    video = Path(manifest.rows[4].uri).with_suffix(".avi")
    write_video(video, 90, seconds=3)
    video.write_bytes(video.read_bytes()[:-700])  # its index and its last pictures
    Path(manifest.rows[4].uri).symlink_to(video)
    row = pending_rows(manifest, store, retry_failed=False)[4]
    checked: list[str] = []
    monkeypatch.setattr("gare.extract.frame_writer.check_readable", checked.append)
    assert counts_of(extractor.write([row]))[0] == 1
    assert checked == [row["uri"]]


def test_a_folder_that_is_unmounted_meanwhile(manifest: Manifest, store: str, extractor: Extractor) -> None:
    """Clips that were there when the run began must not be given up for good: they come back as they were."""
    pending = pending_rows(manifest, store, retry_failed=False)
    Path(manifest.rows[0].uri).unlink()
    extractor.write([pending[0], pending[4]])
    failures = Store(store).read_failures({})
    assert {key: row["transient"] for key, row in failures.items()} == {"dark": True, "gone": False}


@pytest.mark.parametrize(("count", "workers", "limit"), [(1000, 2, 32), (10, 2, 32), (1, 8, 32), (100, 1, 1)])
def test_parts_leave_work_for_all(count: int, workers: int, limit: int, rng: np.random.Generator) -> None:
    """Few large parts, or a long film at the end, would leave all but one worker idle there."""
    sizes: list[int | None] = [*map(int, rng.integers(1, 10**6, count - 1)), None]
    rows = [{"video_id": str(number), "source_bytes": size} for number, size in enumerate(sizes)]
    parts = cut_into_parts(rows, workers, limit)
    assert sorted(row["video_id"] for part in parts for row in part) == sorted(
        row["video_id"] for row in rows
    )
    lengths = [len(part) for part in parts]
    assert max(lengths) <= limit
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 1
    order = [row["source_bytes"] or 0 for part in parts for row in part]
    assert order == sorted(order, reverse=True)


def test_large_frames_make_parts_of_fewer_clips() -> None:
    """A writer holds its part in memory, and a thousand clips of raw frames are two gigabytes."""
    assert clips_per_part(ExtractConfig()) == 1000
    assert clips_per_part(ExtractConfig(videos_per_part=7)) == 7
    raw = clips_per_part(ExtractConfig(encoding="raw"))
    assert 50 < raw < 200
    assert clips_per_part(ExtractConfig(encoding="raw", image_size=448)) == raw // 4
    assert clips_per_part(ExtractConfig(encoding="raw", image_size=4000, num_frames=100)) == 1


def test_a_part_that_comes_in_pieces_is_the_same(rng: np.random.Generator) -> None:
    """Frames are encoded while the next clips are decoded, so that they do not wait in memory."""
    rows = [stored_row(EXTRACT, f"clip {number}", random_frames(EXTRACT, rng, 2)) for number in range(9)]
    schema = frame_schema(EXTRACT)
    pieces = PartEncoder("data", schema)
    for first in (0, 4, 8):
        pieces.add(table_of(rows[first : first + 4], schema))
    pieces.add(table_of([], schema))
    found = pieces.finish("part-a.parquet")
    whole = encode_part("data", "part-a.parquet", table_of(rows, schema))
    assert pq.read_table(pa.BufferReader(found)).equals(pq.read_table(pa.BufferReader(whole)))
    indexes = [read_index(read_entries(pa.BufferReader(data))) for data in (found, whole)]
    assert indexes[0]
    assert indexes[1]
    assert indexes[0].table.equals(indexes[1].table)
    assert len(indexes[0].table) == 9
