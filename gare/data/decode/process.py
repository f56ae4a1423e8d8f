"""Decoding in a child process that can be killed: a file that hangs or crashes the decoder costs one clip.

This is the parent's side; ``gare.data.decode.child`` is the child's, ``gare.data.decode.pipe`` connects them.
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Self

from gare.data.decode.clip_request import ClipRequest
from gare.data.decode.decoded_clip import DecodedClip
from gare.data.decode.pipe import Child
from gare.data.decode.sampling import Sampling
from gare.errors import ConfigError, DataError, without_secrets
from gare.storage.uris import scheme_of

#: FFmpeg's messages of damage within decord, which conceals it and goes on. swscale only reports formats.
_DAMAGE = re.compile(rb"^\[(?!swscaler)\w+ @ 0x\w+\] (?!Failed to parse extradata)", re.MULTILINE)
#: Seconds to import the decoders on a busy machine; not part of a video's deadline.
_START_DEADLINE_S = 120.0


class DecodeTimeoutError(DataError):
    """A video that did not decode within its deadline."""

    # The cause may be an overloaded node or a hanging mount. A file that never ends costs its deadline once a
    # run, up to extract.max_attempts.
    is_transient = True


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
        self, request: ClipRequest, *, deadline_s: float = 60.0, memory_mb: float = 2000.0
    ) -> DecodedClip[bytes]:
        """Decodes, resizes, crops and encodes a clip in the child.

        Args:
            request: the clip, and the form of its frames.
            deadline_s: seconds after which the child is killed.
            memory_mb: MB of private memory that the child may use, on Linux.

        Raises:
            DecodeTimeoutError: at the deadline.
            DecodeMemoryError: beyond ``memory_mb``.
            DecoderCrashError: if the child dies.
            DataError: if the video is bad, with the child's message.
            ConfigError: if the decoder is not installed.
        """
        until = time.monotonic() + deadline_s
        facts, frames = self._ask("clip", asdict(request), deadline_s, memory_mb)
        if facts["decoder"] == "decord" and self._child and self._child.has_printed(_DAMAGE):
            request = replace(request, decoder="pyav")
            left_s = max(until - time.monotonic(), 0.1)
            facts, frames = self._ask("clip", asdict(request), left_s, memory_mb)
        return DecodedClip.from_facts(facts, frames)

    def find_outdated_traits(
        self,
        path: str,
        *,
        sampling: Sampling,
        complete: bool | None,
        deadline_s: float = 60.0,
        memory_mb: float = 2000.0,
    ) -> str:
        """Calls ``gare.data.decode.outdated.outdated_traits`` in the child.

        Args:
            path: local path or ``file://`` URI.
            sampling: see ``outdated_traits``, also for ``complete``.
            complete: True if the file was taken to be whole.
            deadline_s: see ``extract``, also for ``memory_mb``.
            memory_mb: MB of private memory that the child may use.

        Raises:
            DataError: as ``extract``, except for a bad video.
        """
        arguments = {"path": path, "sampling": sampling, "complete": complete}
        return str(self._ask("outdated_traits", arguments, deadline_s, memory_mb)[0]["traits"])

    def _ask(
        self, task: str, arguments: dict[str, Any], deadline_s: float, memory_mb: float
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Sends a request about a file to the child and returns its answer."""
        path = _checked(arguments["path"])
        child = self._ready_child()
        try:
            child.send({"task": task, "arguments": arguments, "memory_mb": memory_mb})
            header, frames = child.receive(time.monotonic() + deadline_s)
        except TimeoutError as error:
            self.close()
            raise DecodeTimeoutError(
                f"did not decode within its deadline of {deadline_s:g} s",
                where=path,
                accepted="a larger extract.deadline_s",
            ) from error
        except (EOFError, BrokenPipeError) as error:
            how, by_others = child.describe_end(), child.was_killed_from_outside()
            self.close()
            if re.search("bad_alloc|cannot allocate memory", how, re.IGNORECASE):  # as C++ reports it
                raise _beyond(memory_mb, path) from error
            crash = DecoderCrashError(f"the decoder crashed: {how}", where=path)
            raise crash.as_transient() if by_others else crash from error
        except BaseException:
            self.close()  # a late answer must not be taken for the next video's
            raise
        if header.get("kind") == "MemoryError":
            self.close()  # libraries that ran out of memory may be in an undefined state
            raise _beyond(memory_mb, path)
        if "error" in header:
            kind = _KINDS.get(header["kind"], DataError)
            fault = kind(header["error"], where=header["where"], accepted=header["accepted"])
            raise fault.as_transient() if header["is_transient"] else fault
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
                how = self._child.describe_end()
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
        raise DataError(
            "is not on this machine", where=without_secrets(uri), accepted="a local path or a file:// URI"
        )
    return uri


def _beyond(memory_mb: float, path: str) -> DecodeMemoryError:
    return DecodeMemoryError(
        f"needs more memory to decode than its {memory_mb:g} MB",
        where=path,
        accepted="a smaller picture or a larger extract.memory_mb",
    )
