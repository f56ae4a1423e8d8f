"""Decoding in a child process that can be killed: a file that hangs or crashes the decoder costs one clip.

This is the parent's side; ``gare.data.decode.child`` is the child's, ``gare.data.decode.pipe`` connects them.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from gare.data.decode.pipe import Child
from gare.data.decode.sampling import Sampling
from gare.data.images import Crop
from gare.errors import ConfigError, DataError, shown
from gare.storage.uris import scheme_of

#: FFmpeg's messages of damage within decord, which conceals it and goes on. swscale only reports formats.
_DAMAGE = re.compile(rb"^\[(?!swscaler)\w+ @ 0x\w+\] (?!Failed to parse extradata)", re.MULTILINE)
#: Seconds to import the decoders on a busy machine; not part of a video's deadline.
_START_DEADLINE_S = 120.0


class DecodeTimeoutError(DataError):
    """A video that did not decode within its deadline."""

    # The cause may be an overloaded node or a hanging mount. A file that never ends costs its deadline once a
    # run, up to extract.max_attempts.
    may_pass = True


class DecoderCrashError(DataError):
    """A video that crashed the decoding process."""


class DecodeMemoryError(DataError):
    """A video that needs more memory to decode than allowed."""

    # Final: the limit is the process's own and the same every time. If the machine is short of memory, the
    # process is killed instead.


class DecoderFaultError(DataError):
    """A video that met an exception which nobody foresaw."""


#: Kinds of errors as the child names them, but for those that are of the file.
_KINDS = {"ConfigError": ConfigError, "Unforeseen": DecoderFaultError}


@dataclass(frozen=True, eq=False)
class ExtractedClip:
    """A decoded clip in the form of the frame store.

    Attributes:
        frames: JPEGs of one size, or size × size × 3 raw RGB bytes each.
        frame_idx: as in ``DecodedClip``, like all further attributes.
    """

    frames: list[bytes]
    frame_idx: NDArray[np.int64]
    time_s: NDArray[np.float64]
    sampling: str
    container: str
    codec: str
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
    bounds what decoders leak. It ends with its parent; on Linux, already with the thread that started it, and
    the next video starts another child.

    Args:
        max_videos: videos that one child decodes.
    """

    def __init__(self, max_videos: int = 500) -> None:
        self._max_videos = max_videos
        self._child: Child | None = None
        self._num_videos = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the child; None if no child runs."""
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
        sampling: Sampling = "released",
        sample_fps: float = 1.0,
        num_frames: int = 12,
        decoder: Literal["auto", "pyav", "torchcodec"] = "auto",
        image_size: int = 224,
        crop: Crop = "center",
        encoding: Literal["jpeg", "raw"] = "jpeg",
        jpeg_quality: int = 95,
        deadline_s: float = 60.0,
        memory_mb: float = 2000.0,
    ) -> ExtractedClip:
        """Decodes, resizes, crops and encodes a clip in the child.

        Args:
            path: local path or ``file://`` URI.
            start_s: see ``decode_clip`` for this and all up to ``decoder``.
            end_s: end of the clip, seconds.
            sampling: policy.
            sample_fps: samples per second.
            num_frames: F.
            decoder: decoder to use.
            image_size: pixels of the short side.
            crop: center, or none for whole pictures (JPEG only).
            encoding: of the frames.
            jpeg_quality: 1 to 100.
            deadline_s: seconds after which the child is killed.
            memory_mb: MB of private memory that the child may use, on Linux.

        Raises:
            DecodeTimeoutError: at the deadline.
            DecodeMemoryError: beyond ``memory_mb``.
            DecoderCrashError: if the child dies.
            DataError: if the video is bad, with the child's message.
            ConfigError: if the decoder is not installed.
        """
        request: dict[str, Any] = {
            "path": _checked(path),
            "clip": {
                "start_s": start_s,
                "end_s": end_s,
                "sampling": sampling,
                "sample_fps": sample_fps,
                "num_frames": num_frames,
                "decoder": decoder,
            },
            "memory_mb": memory_mb,
            "image_size": image_size,
            "crop": crop,
            "encoding": encoding,
            "jpeg_quality": jpeg_quality,
        }
        until = time.monotonic() + deadline_s
        header, frames = self._ask(request, path, deadline_s, memory_mb)
        if header["decoder"] == "decord" and self._child and self._child.has_said(_DAMAGE):
            request["clip"] |= {"decoder": "pyav"}
            left_s = max(until - time.monotonic(), 0.1)
            header, frames = self._ask(request, path, left_s, memory_mb)
        header["frame_idx"] = np.array(header["frame_idx"], dtype=np.int64)
        header["time_s"] = np.array(header["time_s"], dtype=np.float64)
        return ExtractedClip(frames=frames, **header)

    def look(
        self,
        path: str,
        *,
        sampling: Sampling,
        complete: bool | None,
        deadline_s: float = 60.0,
        memory_mb: float = 2000.0,
    ) -> str:
        """Calls ``gare.data.decode.mended.mended_trait`` in the child.

        Args:
            path: local path or ``file://`` URI.
            sampling: see ``mended_trait``, also for ``complete``.
            complete: True if the file was taken to be whole.
            deadline_s: see ``extract``, also for ``memory_mb``.
            memory_mb: MB of private memory that the child may use.

        Raises:
            DataError: as ``extract``, except for a bad video.
        """
        look = {"sampling": sampling, "complete": complete}
        request = {"path": _checked(path), "look": look, "memory_mb": memory_mb}
        return str(self._ask(request, path, deadline_s, memory_mb)[0]["trait"])

    def _ask(
        self, request: dict[str, Any], path: str, deadline_s: float, memory_mb: float
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Sends a request about a file to the child and returns its answer."""
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
            how, by_others = child.how_it_ended(), child.was_ended_by_others()
            self.close()
            if re.search("bad_alloc|cannot allocate memory", how, re.IGNORECASE):  # as C++ reports it
                raise _beyond(memory_mb, path) from error
            crash = DecoderCrashError(f"the decoder crashed: {how}", where=path)
            raise crash.passing() if by_others else crash from error
        except BaseException:
            self.close()  # a late answer must not be taken for the next video's
            raise
        if header.get("kind") == "MemoryError":
            self.close()  # libraries that ran out of memory may be in an undefined state
            raise _beyond(memory_mb, path)
        if "error" in header:
            kind = _KINDS.get(header["kind"], DataError)
            fault = kind(header["error"], where=header["where"], accepted=header["accepted"])
            raise fault.passing() if header["may_pass"] else fault
        header.pop("sizes")
        return header, frames

    def _ready_child(self) -> Child:
        if self._child and (self._num_videos >= self._max_videos or self._child.process.poll() is not None):
            self.close()
        if not self._child:
            self._child, self._num_videos = Child(), 0
            try:
                self._child.receive(time.monotonic() + _START_DEADLINE_S)
            except (TimeoutError, EOFError) as error:
                how = self._child.how_it_ended()
                self.close()
                # Not a fault of the video: without a decoder every video would fail.
                raise RuntimeError(f"the decoding process does not start: {how}") from error
            except BaseException:
                self.close()
                raise
        self._num_videos += 1
        return self._child


def _checked(uri: str) -> str:
    if scheme_of(uri) != "file":
        raise DataError("is not on this machine", where=shown(uri), accepted="a local path or a file:// URI")
    return uri


def _beyond(memory_mb: float, path: str) -> DecodeMemoryError:
    return DecodeMemoryError(
        f"needs more memory to decode than its {memory_mb:g} MB",
        where=path,
        accepted="a smaller picture or a larger extract.memory_mb",
    )
