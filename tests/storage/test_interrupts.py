"""An interrupt at any moment of a write leaves the old file or the whole new one, locally and on S3."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gare.data.store.parts import write_table
from gare.errors import StoppedError
from gare.storage.files import copy_files, join, read_bytes, write_atomically, write_json
from tests.helpers.servers import DroppingProxy

#: Requests of an upload: its beginning, a part and its end.
REQUESTS = {"begin": r"\?uploads", "part": r"partNumber=", "end": r"^POST .*\?uploadId="}


def by_bytes(uri: str) -> None:
    write_atomically(uri, b"new content")


def by_part(uri: str) -> None:
    folder, data, _ = uri.rsplit("/", 2)
    write_table(folder, data, pa.table({"video_id": ["a"]}), ["a"])


def by_json(uri: str) -> None:
    write_json(uri, {"new": "content"})


def by_copy(uri: str) -> None:
    write_atomically(join(uri.rsplit("/", 2)[0], "source", uri.rsplit("/", 1)[1]), b"copied")
    copy_files(join(uri.rsplit("/", 2)[0], "source"), uri.rsplit("/", 1)[0])


@contextmanager
def stopping_by(number: signal.Signals) -> Iterator[type[BaseException]]:
    """The exception that the signal raises, as in a driver."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedError("stopped")

    before = signal.signal(number, stop) if number == signal.SIGTERM else None
    try:
        yield StoppedError if before is not None else KeyboardInterrupt
    finally:
        if before is not None:
            signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("write", [by_bytes, by_part, by_json, by_copy])
def test_a_signal_within_a_request_leaves_whole_objects(
    s3: Any, s3_proxy: DroppingProxy, write: Callable[[str], None], request_: str, number: signal.Signals
) -> None:
    """An empty description, part or checkpoint in the place of the old one ends all that reads it."""
    uri = "s3://videos/store/data/" + ("part-ca978112ca1bbdcafac2.parquet" if write is by_part else "file")
    write(uri)
    whole = read_bytes(uri)
    write_atomically(uri, b"old content")
    sent: list[int] = []

    def interrupt() -> None:
        sent.append(number)
        os.kill(os.getpid(), number)

    with stopping_by(number) as kind:
        s3_proxy.when(REQUESTS[request_], interrupt)
        with pytest.raises(kind):
            write(uri)
    assert sent
    at_once = read_bytes(uri)
    assert at_once in ((b"old content", whole) if write is by_copy else (whole,))
    write(uri)
    assert read_bytes(uri) == whole


@pytest.mark.parametrize("where", ["local", "s3"])
def test_interrupts_at_random_moments_leave_whole_files(
    rng: np.random.Generator, tmp_path: Path, s3: Any, where: str
) -> None:
    """A run that is stopped must go on from what is there: nothing half written, nothing left over."""
    folder = str(tmp_path / "folder") if where == "local" else "s3://videos/folder"
    location, old, new = f"{folder}/file", rng.bytes(10), rng.bytes(100_000)

    def moments(raise_at: int) -> int:
        """Writes, and raises at an instruction of the main thread; the number of instructions till then."""
        seen = 0

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal seen
            frame.f_trace_opcodes = True
            seen += event == "opcode"
            if event == "opcode" and seen == raise_at:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        # Threads that are not the main one are never interrupted.
        sys.settrace(trace)
        try:
            write_atomically(location, new)
        finally:
            sys.settrace(None)
        return seen

    tracer = sys.gettrace()
    try:
        total = moments(0)
        for moment in sorted(
            {1, total - 1, *rng.integers(1, total, 150 if where == "local" else 30).tolist()}
        ):
            write_atomically(location, old)
            with pytest.raises(KeyboardInterrupt):
                moments(moment)
            assert read_bytes(location) in (old, new), moment
            if where == "local":
                assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file"], moment
    finally:
        sys.settrace(tracer)
