"""The process boundary: no file may hang or end an extraction that runs all night."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gare.data.decode.clip import decode_clip
from gare.data.decode.clip_request import ClipRequest
from gare.data.decode.decoded_clip import DecodedClip
from gare.data.decode.probe import probe
from gare.data.decode.process import (
    DecodeMemoryError,
    DecodeProcess,
    DecoderCrashError,
    DecodeTimeoutError,
)
from gare.data.images import decode_jpeg, prepare_frame
from gare.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def process() -> Iterator[DecodeProcess]:
    with DecodeProcess() as child:
        yield child


@pytest.fixture
def clip(shared: Path) -> str:
    return str(shared / "data/videos/video7014.mp4")


@pytest.fixture
def pipe(tmp_path: Path) -> str:
    """A file that never gives a byte."""
    path = tmp_path / "hangs.mp4"
    os.mkfifo(path)
    return str(path)


def test_the_child_gives_what_decoding_here_gives(process: DecodeProcess, clip: str) -> None:
    """Lost otherwise: pictures, times or facts on the way through the pipe."""
    here = decode_clip(clip, start_s=1, end_s=9, sample_fps=2, num_frames=5)
    there = process.extract(
        ClipRequest(clip, start_s=1, end_s=9, sample_fps=2, num_frames=5, image_size=64, encoding="raw")
    )
    for ours, data in zip(here.frames, there.frames, strict=True):
        assert (np.frombuffer(data, np.uint8).reshape(64, 64, 3) == prepare_frame(ours, 64)).all()
    assert there.frame_idx.tolist() == here.frame_idx.tolist()
    assert there.time_s.tolist() == here.time_s.tolist()
    facts = ["sampling", "container", "codec", "decoder", "decoder_version", "width", "height", "fps"]
    for name in [*facts, "duration_s", "complete", "note"]:
        assert getattr(there, name) == getattr(here, name)


def test_jpeg_has_the_asked_size(process: DecodeProcess, clip: str) -> None:
    """Lost otherwise: a store of pictures that the model does not take."""
    found = process.extract(ClipRequest(f"file://{clip}", image_size=96, jpeg_quality=80))
    assert len(found.frames) == 12
    assert {decode_jpeg(data).shape for data in found.frames} == {(96, 96, 3)}


def test_bad_files_report_and_the_child_lives_on(process: DecodeProcess, shared: Path, clip: str) -> None:
    """Lost otherwise: the reason of a failure, and the start of a process for every bad file."""
    process.extract(ClipRequest(clip, num_frames=1))
    before = process.pid
    for name in ("zero_byte.mp4", "text_renamed.mp4", "audio_only.mp4", "gone.mp4"):
        with pytest.raises(DataError) as caught:
            process.extract(ClipRequest(str(shared / "data/broken" / name)))
        assert caught.value.where.endswith(name)
    with pytest.raises(DataError, match="the video lasts 12"):
        process.extract(ClipRequest(clip, start_s=500))
    process.extract(ClipRequest(clip, num_frames=1))
    assert process.pid == before


def test_remote_files_are_refused(process: DecodeProcess) -> None:
    """Lost otherwise: a clear word that this file has to be fetched first."""
    with pytest.raises(DataError, match="not on this machine"):
        process.extract(ClipRequest("s3://bucket/video.mp4"))


def test_a_file_that_hangs_ends_at_its_deadline(process: DecodeProcess, pipe: str, clip: str) -> None:
    """Lost otherwise: the night, waiting for one file."""
    process.extract(ClipRequest(clip, num_frames=1))
    before = process.pid
    with pytest.raises(DecodeTimeoutError, match=r"deadline of 0\.3 s") as caught:
        process.extract(ClipRequest(pipe), deadline_s=0.3)
    assert isinstance(caught.value, DataError)
    assert before is not None
    with pytest.raises(ProcessLookupError):  # killed and reaped, not left behind
        os.kill(before, 0)
    assert len(process.extract(ClipRequest(clip)).frames) == 12


def gif_bomb(path: Path, side_px: int) -> str:
    """A GIF of some dozen bytes that asks for a canvas of any size, twice."""
    data = b"GIF89a" + struct.pack("<HHBBB", side_px, side_px, 0x80, 0, 0) + bytes([0, 0, 0, 255, 255, 255])
    for _ in range(2):
        data += b"\x21\xf9\x04\x04\x32\x00\x00\x00"  # shown for half a second
        data += b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"  # one pixel of it
    path.write_bytes(data + b"\x3b")
    return str(path)


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
def test_a_picture_of_absurd_size_ends_at_the_memory_limit(
    process: DecodeProcess, tmp_path: Path, clip: str, shared: Path, decoder: str
) -> None:
    """Lost otherwise: the machine, with all its workers, to a file of a hundred bytes."""

    def extract(path: str, **options: Any) -> DecodedClip[bytes]:
        return process.extract(ClipRequest(path, decoder=decoder, **options), memory_mb=1000)

    assert len(extract(gif_bomb(tmp_path / "small.gif", 64)).frames) == 1
    with pytest.raises(DecodeMemoryError, match="more memory to decode than its 1000 MB") as caught:
        extract(gif_bomb(tmp_path / "bomb.gif", 16_000))
    assert isinstance(caught.value, DataError)
    assert caught.value.where.endswith("bomb.gif")
    assert process.pid is None  # libraries that ran out of memory are not asked again
    assert len(extract(clip).frames) == 12
    found = extract(str(shared / "data/broken/uhd_4k_1s.mp4"), sample_fps=8, num_frames=8)
    assert (found.width, len(found.frames)) == (3840, 8)  # a good large video stays within


def test_no_file_but_a_file_is_opened(process: DecodeProcess, tmp_path: Path) -> None:
    """Lost otherwise: an hour, waiting for a device or a loop of links in a folder of videos."""
    loop = tmp_path / "loop.mp4"
    loop.symlink_to(loop)
    bound = tmp_path / "socket.mp4"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(bound))
        for path, why in {
            loop: "levels of symbolic links",
            tmp_path: "it is a folder",
            Path("/dev/zero"): "it is a device or socket",
            bound: "it is a device or socket",
            tmp_path / "gone.mp4": "No such file",
            tmp_path / ("long" * 100): "File name too long",
        }.items():
            with pytest.raises(DataError, match=f"cannot be opened as a video: .*{why}"):
                process.extract(ClipRequest(str(path)), deadline_s=60)


@pytest.mark.parametrize("size", [1.0, 0.5], ids=["whole", "half there"])
def test_a_file_that_grows_while_it_is_read(clip: str, tmp_path: Path, size: float) -> None:
    """Lost otherwise: an upload in progress, stored for good as a short or damaged video."""
    data = Path(clip).read_bytes()
    growing = tmp_path / "growing.mp4"
    growing.write_bytes(data[: int(size * len(data))])

    def grow(rgb: np.ndarray) -> np.ndarray:
        with growing.open("ab") as file:
            file.write(data[:1000])
        return rgb

    if size < 1:  # its index is missing, so that no picture is ever decoded: it grows beside the first read
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "gare.data.decode.clip.probe", lambda path: grow(np.zeros(0)) is None or probe(path)
            )
            with pytest.raises(DataError, match="changed while it was read") as caught:
                decode_clip(growing)
        assert isinstance(caught.value.__cause__, DataError)
    else:
        with pytest.raises(DataError, match="changed while it was read") as caught:
            decode_clip(growing, prepare=grow)
    assert caught.value.is_transient
    growing.write_bytes(data)
    assert len(decode_clip(growing).frames) == 12


def test_a_decoder_that_is_not_installed_is_no_fault_of_the_video(
    process: DecodeProcess, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: the cause, in a table of ten thousand failed videos."""
    (tmp_path / "torchcodec.py").write_text("raise ImportError('torchcodec is not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    process.close()
    with pytest.raises(ConfigError, match=r"torchcodec cannot be loaded: .* is not here") as caught:
        process.extract(ClipRequest(clip, decoder="torchcodec"))
    assert "gare[torchcodec]" in caught.value.accepted
    process.close()


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_is_reported(process: DecodeProcess, pipe: str, clip: str, number: signal.Signals) -> None:
    """Lost otherwise: the worker, and with it the videos beside the one that crashes the decoder."""
    process.extract(ClipRequest(clip, num_frames=1))

    def crash() -> None:
        with Path(pipe).open("wb"):  # returns once the child has begun to read
            os.kill(process.pid or 0, number)

    thread = threading.Thread(target=crash)
    thread.start()
    with pytest.raises(DecoderCrashError, match=rf"signal {int(number)} \({number.name}\)") as caught:
        process.extract(ClipRequest(pipe), deadline_s=60)
    thread.join()
    assert caught.value.where == pipe
    # Nobody but others sends SIGKILL: such as the system, for memory that another process took.
    assert caught.value.is_transient == (number == signal.SIGKILL)
    assert len(process.extract(ClipRequest(clip)).frames) == 12


def test_a_child_that_died_between_videos_is_replaced(process: DecodeProcess, clip: str) -> None:
    """Lost otherwise: a good video, blamed for what the system did to an idle process."""
    process.extract(ClipRequest(clip, num_frames=1))
    pid = process.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert len(process.extract(ClipRequest(clip)).frames) == 12
    assert process.pid != pid


def test_children_are_renewed(clip: str) -> None:
    """Lost otherwise: memory, by what decoders leak over thousands of videos."""
    with DecodeProcess(max_videos=2) as process:
        pids = []
        for _ in range(4):
            process.extract(ClipRequest(clip, num_frames=1))
            pids.append(process.pid)
    assert process.pid is None
    assert pids[0] == pids[1] != pids[2] == pids[3]


def test_the_child_ends_with_its_parent(clip: str, pipe: str) -> None:
    """Lost otherwise: a machine full of decoders after a worker was killed, one of them hanging."""
    code = (
        "import sys; from gare.data.decode.clip_request import ClipRequest\n"
        "from gare.data.decode.process import DecodeProcess\n"
        "process = DecodeProcess(); process.extract(ClipRequest(sys.argv[1], num_frames=1))\n"
        "print(process.pid, flush=True); process.extract(ClipRequest(sys.argv[2]), deadline_s=600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, clip, pipe], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    stopped = os.pidfd_open(child)
    with Path(pipe).open("wb"):
        parent.kill()
        parent.wait()
        parent.stdout.close()
        assert select.select([stopped], [], [], 60)[0] == [stopped]
    os.close(stopped)


def test_the_child_is_light() -> None:
    """Lost otherwise: seconds and hundreds of megabytes for each decoding process."""
    code = (
        "import sys, gare.data.decode.child\n"
        "heavy = {'torch', 'ray', 'mlflow', 'transformers', 'pyarrow', 'decord'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
