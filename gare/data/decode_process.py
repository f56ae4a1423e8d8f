"""Decoding in a child process that can be killed: a file that hangs or crashes its decoder costs one clip.

Parent and child (``gare.data.decode_child``) speak over two pipes of their own, because decoders write to
stdout as they like. A message is the length of its header (4 bytes, big endian), the header (JSON), and bytes
whose sizes the header lists under ``sizes``.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

import gare
from gare.errors import DataError

#: Bytes of a message that hold the length of its header.
LENGTH_BYTES = 4
_STDERR_BYTES = 4000
#: Importing the decoders on a busy machine; not part of a video's deadline.
_START_DEADLINE_S = 120.0


class DecodeTimeoutError(DataError):
    """A video that did not decode within its deadline."""


class DecoderCrashError(DataError):
    """A video that took the decoding process down."""


@dataclass(frozen=True, eq=False)
class ExtractedClip:
    """A clip as the frame store keeps it.

    Attributes:
        frames: each a JPEG, or size × size × 3 raw RGB bytes.
        frame_idx: as in ``DecodedClip``, and so are the rest.
    """

    frames: list[bytes]
    frame_idx: NDArray[np.int64]
    time_s: NDArray[np.float64]
    decoder: str
    decoder_version: str
    width: int
    height: int
    fps: float
    duration_s: float
    complete: bool
    note: str


class DecodeProcess:
    """A reusable decoding child. Not for use by several threads at once.

    The child starts with the first video and again after a crash, a deadline or ``max_videos`` videos, which
    bounds what decoders leak. It ends with its parent; on Linux already with the thread that started it, and
    then another one starts.

    Args:
        max_videos: videos that one child decodes.
    """

    def __init__(self, max_videos: int = 500) -> None:
        self._max_videos = max_videos
        self._child: _Child | None = None
        self._num_videos = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the child, None while there is none."""
        return self._child.process.pid if self._child else None

    def start(self) -> None:
        """Starts the child ahead of the first video."""
        self._ready_child()

    def close(self) -> None:
        """Ends the child; the next ``extract`` starts another."""
        if self._child:
            self._child.kill()
        self._child = None

    def extract(
        self,
        path: str,
        *,
        start_s: float | None = None,
        end_s: float | None = None,
        sample_fps: float = 1.0,
        num_frames: int = 12,
        image_size: int = 224,
        encoding: Literal["jpeg", "raw"] = "jpeg",
        jpeg_quality: int = 95,
        deadline_s: float = 60.0,
    ) -> ExtractedClip:
        """Decodes, resizes, crops and encodes a clip in the child.

        Args:
            path: local path or ``file://`` URI.
            start_s: see ``decode_clip``; so are end_s, sample_fps and num_frames.
            end_s: end of the clip, seconds.
            sample_fps: samples per second.
            num_frames: F.
            image_size: pixels a side.
            encoding: of the frames.
            jpeg_quality: 1 to 100.
            deadline_s: seconds after which the child is killed.

        Raises:
            DecodeTimeoutError: at the deadline.
            DecoderCrashError: if the child dies.
            DataError: if the video is bad; the text is the child's.
        """
        request = {
            "path": _local_path(path),
            "clip": {
                "start_s": start_s,
                "end_s": end_s,
                "sample_fps": sample_fps,
                "num_frames": num_frames,
            },
            "image_size": image_size,
            "encoding": encoding,
            "jpeg_quality": jpeg_quality,
        }
        child = self._ready_child()
        try:
            child.send(request)
            header, frames = child.receive(time.monotonic() + deadline_s)
        except TimeoutError as error:
            self.close()
            raise DecodeTimeoutError(
                f"did not decode within its deadline of {deadline_s:g} s",
                where=path,
                accepted="a larger extract.deadline_s",
            ) from error
        except (EOFError, BrokenPipeError) as error:
            how = child.how_it_ended()
            self.close()
            raise DecoderCrashError(f"the decoder crashed: {how}", where=path) from error
        except BaseException:
            self.close()  # the answer to come must not be taken for the next video's
            raise
        if "error" in header:
            raise DataError(header["error"], where=header["where"], accepted=header["accepted"])
        header.pop("sizes")
        header["frame_idx"] = np.array(header["frame_idx"], dtype=np.int64)
        header["time_s"] = np.array(header["time_s"], dtype=np.float64)
        return ExtractedClip(frames=frames, **header)

    def _ready_child(self) -> _Child:
        if self._child and (self._num_videos >= self._max_videos or self._child.process.poll() is not None):
            self.close()
        if not self._child:
            self._child, self._num_videos = _Child(), 0
            try:
                self._child.receive(time.monotonic() + _START_DEADLINE_S)
            except (TimeoutError, EOFError) as error:
                how = self._child.how_it_ended()
                self.close()
                # No fault of the video: without a decoder every video would fail.
                raise RuntimeError(f"the decoding process does not start: {how}") from error
            except BaseException:
                self.close()
                raise
        self._num_videos += 1
        return self._child


def _local_path(uri: str) -> str:
    if "://" not in uri:
        return uri
    if not uri.startswith("file://"):
        raise DataError("is not on this machine", where=uri, accepted="a local path or a file:// URI")
    path = uri.removeprefix("file://")
    return path if Path(path).exists() else urllib.parse.unquote(path)


class _Child:
    """The process and the parent's ends of its pipes."""

    def __init__(self) -> None:
        request_read, self._requests = os.pipe()
        self._answers, answer_write = os.pipe()
        root = str(Path(gare.__file__).resolve().parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        ours = (request_read, answer_write)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gare.data.decode_child", *map(str, (*ours, os.getpid()))],
                pass_fds=ours,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        except BaseException:
            os.close(self._requests)
            os.close(self._answers)
            raise
        finally:
            os.close(request_read)
            os.close(answer_write)
        assert self.process.stderr is not None
        self._stderr = self.process.stderr.fileno()
        os.set_blocking(self._stderr, False)
        self._tail = b""

    def send(self, request: dict[str, Any]) -> None:
        """Writes one request; it fits the pipe's buffer, so this does not wait for a child that hangs."""
        data = json.dumps(request).encode()
        os.write(self._requests, len(data).to_bytes(LENGTH_BYTES, "big") + data)

    def receive(self, until: float) -> tuple[dict[str, Any], list[bytes]]:
        """One answer.

        Raises:
            TimeoutError: when ``time.monotonic()`` passes ``until``.
            EOFError: when the child ends.
        """
        buffer = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            selector.register(self._stderr, selectors.EVENT_READ)

            def take(count: int) -> bytes:
                while len(buffer) < count:
                    left_s = until - time.monotonic()
                    if left_s <= 0:
                        raise TimeoutError
                    for key, _ in selector.select(left_s):
                        if key.fd == self._stderr:
                            if not self._read_stderr():
                                selector.unregister(self._stderr)
                        elif data := os.read(self._answers, 1 << 20):
                            buffer.extend(data)
                        else:
                            raise EOFError
                taken = bytes(buffer[:count])
                del buffer[:count]
                return taken

            header = json.loads(take(int.from_bytes(take(LENGTH_BYTES), "big")))
            return header, [take(size) for size in header["sizes"]]

    def _read_stderr(self) -> bool:
        """Takes what there is; False at its end."""
        try:
            data = os.read(self._stderr, 1 << 16)
        except BlockingIOError:
            return True
        self._tail = (self._tail + data)[-_STDERR_BYTES:]
        return bool(data)

    def how_it_ended(self) -> str:
        """For a message: the signal or status, and the last line of stderr."""
        try:
            status = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "it closed its pipes"
        self._read_stderr()
        if status < 0:
            with contextlib.suppress(ValueError):
                return f"signal {-status} ({signal.Signals(-status).name}){self._last_words()}"
        return f"exit status {status}{self._last_words()}"

    def _last_words(self) -> str:
        lines = self._tail.decode(errors="replace").strip().splitlines()
        return f"; its last words: {lines[-1][:300]}" if lines else ""

    def kill(self) -> None:
        self.process.kill()
        os.close(self._requests)
        os.close(self._answers)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one stuck in the kernel ends when it can
            self.process.wait(timeout=5)
        if self.process.stderr:
            self.process.stderr.close()
