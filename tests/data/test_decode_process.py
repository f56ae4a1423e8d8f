"""The process boundary: no file may hang or end an extraction that runs all night."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gare.data.decode import decode_clip
from gare.data.decode_process import DecodeProcess, DecoderCrashError, DecodeTimeoutError
from gare.data.images import decode_jpeg, prepare_frame
from gare.errors import DataError


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
        clip, start_s=1, end_s=9, sample_fps=2, num_frames=5, image_size=64, encoding="raw"
    )
    for ours, data in zip(here.frames, there.frames, strict=True):
        assert (np.frombuffer(data, np.uint8).reshape(64, 64, 3) == prepare_frame(ours, 64)).all()
    assert there.frame_idx.tolist() == here.frame_idx.tolist()
    assert there.time_s.tolist() == here.time_s.tolist()
    for name in ["decoder", "decoder_version", "width", "height", "fps", "duration_s", "complete", "note"]:
        assert getattr(there, name) == getattr(here, name)


def test_jpeg_has_the_asked_size(process: DecodeProcess, clip: str) -> None:
    """Lost otherwise: a store of pictures that the model does not take."""
    found = process.extract(f"file://{clip}", image_size=96, jpeg_quality=80)
    assert len(found.frames) == 12
    assert {decode_jpeg(data).shape for data in found.frames} == {(96, 96, 3)}


def test_bad_files_report_and_the_child_lives_on(process: DecodeProcess, shared: Path, clip: str) -> None:
    """Lost otherwise: the reason of a failure, and the start of a process for every bad file."""
    process.extract(clip, num_frames=1)
    before = process.pid
    for name in ("zero_byte.mp4", "text_renamed.mp4", "audio_only.mp4", "gone.mp4"):
        with pytest.raises(DataError) as caught:
            process.extract(str(shared / "data/broken" / name))
        assert caught.value.where.endswith(name)
    with pytest.raises(DataError, match="the video lasts 12"):
        process.extract(clip, start_s=500)
    process.extract(clip, num_frames=1)
    assert process.pid == before


def test_remote_files_are_refused(process: DecodeProcess) -> None:
    """Lost otherwise: a clear word that this file has to be fetched first."""
    with pytest.raises(DataError, match="not on this machine"):
        process.extract("s3://bucket/video.mp4")


def test_a_file_that_hangs_ends_at_its_deadline(process: DecodeProcess, pipe: str, clip: str) -> None:
    """Lost otherwise: the night, waiting for one file."""
    process.extract(clip, num_frames=1)
    before = process.pid
    with pytest.raises(DecodeTimeoutError, match=r"deadline of 0\.3 s") as caught:
        process.extract(pipe, deadline_s=0.3)
    assert isinstance(caught.value, DataError)
    assert before is not None
    with pytest.raises(ProcessLookupError):  # killed and reaped, not left behind
        os.kill(before, 0)
    assert len(process.extract(clip).frames) == 12


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_is_reported(process: DecodeProcess, pipe: str, clip: str, number: signal.Signals) -> None:
    """Lost otherwise: the worker, and with it the videos beside the one that crashes the decoder."""
    process.extract(clip, num_frames=1)

    def crash() -> None:
        with Path(pipe).open("wb"):  # returns once the child has begun to read
            os.kill(process.pid or 0, number)

    thread = threading.Thread(target=crash)
    thread.start()
    with pytest.raises(DecoderCrashError, match=rf"signal {int(number)} \({number.name}\)") as caught:
        process.extract(pipe, deadline_s=60)
    thread.join()
    assert caught.value.where == pipe
    assert len(process.extract(clip).frames) == 12


def test_a_child_that_died_between_videos_is_replaced(process: DecodeProcess, clip: str) -> None:
    """Lost otherwise: a good video, blamed for what the system did to an idle process."""
    process.extract(clip, num_frames=1)
    pid = process.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert len(process.extract(clip).frames) == 12
    assert process.pid != pid


def test_children_are_renewed(clip: str) -> None:
    """Lost otherwise: memory, by what decoders leak over thousands of videos."""
    with DecodeProcess(max_videos=2) as process:
        pids = []
        for _ in range(4):
            process.extract(clip, num_frames=1)
            pids.append(process.pid)
    assert process.pid is None
    assert pids[0] == pids[1] != pids[2] == pids[3]


def test_the_child_ends_with_its_parent(clip: str, pipe: str) -> None:
    """Lost otherwise: a machine full of decoders after a worker was killed, one of them hanging."""
    code = (
        "import sys; from gare.data.decode_process import DecodeProcess\n"
        "process = DecodeProcess(); process.extract(sys.argv[1], num_frames=1)\n"
        "print(process.pid, flush=True); process.extract(sys.argv[2], deadline_s=600)"
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
        "import sys, gare.data.decode_child\n"
        "heavy = {'torch', 'ray', 'mlflow', 'transformers', 'pyarrow', 'decord'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
