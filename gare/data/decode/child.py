"""The child process of ``gare.data.decode.process``: decodes on request until its parent ends.

Started as ``python -m gare.data.decode.child``. It imports numpy, Pillow and the decoders, nothing heavier.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Sequence
from typing import Any, BinaryIO

from gare.data.decode.clip import decode_clip
from gare.data.decode.clip_request import ClipRequest
from gare.data.decode.decoded_clip import DecodedClip
from gare.data.decode.outdated import outdated_traits
from gare.data.decode.pipe import LENGTH_BYTES
from gare.data.images import encode_jpeg, fit_frame, prepare_frame
from gare.errors import GareError
from gare.storage.patience import is_machine_fault
from gare.storage.uris import local_path


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers each request, until the parent closes its end of the pipe."""
    _answer(answers, {"ready": True})
    while len(prefix := requests.read(LENGTH_BYTES)) == LENGTH_BYTES:
        request = json.loads(requests.read(int.from_bytes(prefix, "big")))
        _limit_memory(request["memory_mb"])
        try:
            header, frames = _do(request)
        except GareError as error:
            kind = type(error).__name__
            fault = {"error": error.what, "kind": kind, "where": error.where, "accepted": error.accepted}
            _answer(answers, {**fault, "is_transient": error.is_transient or is_machine_fault(error)})
        except (MemoryError, BlockingIOError):  # the latter: no memory for a thread's stack
            _answer(answers, {"error": "", "kind": "MemoryError"})
        except Exception as error:  # no fault of one video may end the process
            text = f"{type(error).__name__}: {error}"[:500]
            fault = {
                "error": text,
                "kind": "Unforeseen",
                "where": request["arguments"]["path"],
                "accepted": "",
            }
            _answer(answers, {**fault, "is_transient": is_machine_fault(error)})
        else:
            _answer(answers, header, frames)


def _limit_memory(memory_mb: float) -> None:
    """Makes allocations beyond a limit fail; Linux counts memory that the process may write to.

    Pages are counted when they are mapped, so that a picture of absurd size fails before it fills the
    machine; libraries, reserved addresses and shared memory do not count.
    """
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(memory_mb * 10**6)
    resource.setrlimit(
        resource.RLIMIT_DATA, (limit if most == resource.RLIM_INFINITY else min(limit, most), most)
    )


def _do(request: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
    """Carries out a request: decodes a clip, or names the outdated traits of a file."""
    if request["task"] == "outdated_traits":
        arguments = dict(request["arguments"])
        return {"traits": outdated_traits(local_path(arguments.pop("path")), **arguments)}, []
    clip = _extract(ClipRequest(**request["arguments"]))
    return clip.facts(), clip.frames


def _extract(request: ClipRequest) -> DecodedClip[bytes]:
    clip = decode_clip(
        local_path(request.path),
        start_s=request.start_s,
        end_s=request.end_s,
        sampling=request.sampling,
        sample_fps=request.sample_fps,
        num_frames=request.num_frames,
        decoder=request.decoder,
        prepare=lambda rgb: prepare_frame(rgb, request.image_size, request.crop),
    )
    if request.encoding == "raw":
        frames = [rgb.tobytes() for rgb in clip.frames]
    else:
        fitting = (fit_frame(rgb, clip.frames[0], request.image_size) for rgb in clip.frames)
        frames = [encode_jpeg(rgb, request.jpeg_quality) for rgb in fitting]
    return DecodedClip(**{**vars(clip), "frames": frames})


def _answer(answers: BinaryIO, header: dict[str, Any], payload: Sequence[bytes] = ()) -> None:
    data = json.dumps({**header, "sizes": [len(part) for part in payload]}).encode()
    answers.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)
    for part in payload:
        answers.write(part)
    answers.flush()


def _die_with_parent(parent: int) -> None:
    """Has Linux kill this process when its parent dies: a child that hangs does not see the closed pipe."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(0)


def main() -> None:
    """Runs the child; arguments: file descriptors of requests and answers, process id of the parent."""
    requests, answers, parent = map(int, sys.argv[1:4])
    _die_with_parent(parent)
    # Ctrl-C reaches the whole terminal group; the parent decides. A crash leaves no core file behind.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with os.fdopen(requests, "rb") as reader, os.fdopen(answers, "wb") as writer:
        _serve(reader, writer)


if __name__ == "__main__":
    main()
