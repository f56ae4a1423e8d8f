"""Replaces storage, clocks and processes so that threads stop before each storage operation.

The code under test, all of gare.storage and gare.data, is not replaced. Parts are read one after the other,
so that a history is the same whenever it is repeated.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pyarrow as pa
import pytest
from pyarrow import fs as pafs

from gare.data.store import parts
from gare.storage import claims, conditional, exclusive, files, lock, object_store
from tests.helpers.servers import CREDENTIALS, empty_bucket, s3_server
from tests.writers.scheduling import Process, Scheduler

EPOCH_S = 1.7e9


def install(patch: pytest.MonkeyPatch, scheduler: Scheduler, server: S3Server | None = None) -> None:
    """Replaces the system calls that gare uses.

    Args:
        patch: undoes the replacements.
        scheduler: scheduler of the history.
        server: S3 server; None for local files.
    """
    _replace_clocks(patch, scheduler)
    _replace_processes(patch, scheduler)
    patch.setattr(parts, "ThreadPoolExecutor", _OneByOne)
    # Longer polling, so fewer checks before a claim expires.
    patch.setattr(lock, "_POLL_S", 5.0)
    if server:
        server.install(patch, scheduler)
    else:
        _replace_local_files(patch, scheduler)


class _OneByOne:
    """Thread pool that runs its tasks one after the other."""

    def __init__(self, threads: int) -> None:
        del threads

    def __enter__(self) -> _OneByOne:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, action: Callable[[Any], Any], values: Iterable[Any]) -> Iterable[Any]:
        return map(action, values)


def _replace_clocks(patch: pytest.MonkeyPatch, scheduler: Scheduler) -> None:
    def lost_s() -> float:
        process = scheduler.process
        return process.lost_s if process else 0.0

    def sleep(seconds: float) -> None:
        scheduler.stop("sleep", due_s=scheduler.now_s + seconds)

    clocks = SimpleNamespace(
        monotonic=lambda: scheduler.now_s - lost_s(),
        sleep=sleep,
        CLOCK_MONOTONIC="monotonic",
        CLOCK_BOOTTIME="boottime",
        clock_gettime=lambda kind: scheduler.now_s - (lost_s() if kind == "monotonic" else 0.0),
    )
    patch.setattr(lock, "time", clocks)

    class Event:
        def __init__(self) -> None:
            self.is_set = False

        def set(self) -> None:
            self.is_set = True

        def wait(self, timeout: float = math.inf) -> bool:
            scheduler.stop("wait", due_s=scheduler.now_s + timeout, ready=lambda: self.is_set)
            return self.is_set

    class Thread:
        def __init__(self, *, target: Callable[[], None], daemon: bool, name: str) -> None:
            assert daemon
            self._target = target

        def start(self) -> None:
            assert scheduler.process
            self._actor = scheduler.start(scheduler.process, "renewal", self._target)

        def join(self) -> None:
            while not self._actor.is_over:
                scheduler.stop("join", ready=lambda: self._actor.is_over)

    patch.setattr(lock, "threading", SimpleNamespace(Event=Event, Thread=Thread))


def _replace_processes(patch: pytest.MonkeyPatch, scheduler: Scheduler) -> None:
    numbers = itertools.count()

    def own() -> Process:
        assert scheduler.process
        return scheduler.process

    def find(pid: int) -> Process | None:
        here = own()
        same = (one for one in scheduler.processes if (one.machine, one.boot) == (here.machine, here.boot))
        return next((one for one in same if one.pid == pid and not one.is_dead), None)

    def create_time() -> float:
        return _day_s(scheduler)

    patch.setattr(claims, "_machine", lambda: f"{own().machine.name} boot {own().boot}")
    patch.setattr(claims, "_start_ticks", lambda pid: str(found.start) if (found := find(pid)) else "")
    patch.setattr(claims, "_owner", lambda _: "somebody")
    patch.setattr(
        claims,
        "psutil",
        SimpleNamespace(
            Process=lambda: SimpleNamespace(pid=own().pid, create_time=create_time),
            pid_exists=lambda pid: find(pid) is not None,
        ),
    )
    patch.setattr(claims, "uuid", SimpleNamespace(uuid4=lambda: uuid.UUID(int=next(numbers))))
    day = SimpleNamespace(
        time_ns=lambda: int(_day_s(scheduler) * 1e9),
        strftime=time.strftime,
        localtime=lambda _: time.gmtime(0),
    )
    patch.setattr(claims, "time", day)


def _day_s(scheduler: Scheduler) -> float:
    process = scheduler.process
    return EPOCH_S + scheduler.now_s + (process.machine.offset_s if process else 0.0)


def _storage_ns(scheduler: Scheduler) -> int:
    return int((EPOCH_S + scheduler.now_s + scheduler.storage_offset_s) * 1e9)


def _replace_local_files(patch: pytest.MonkeyPatch, scheduler: Scheduler) -> None:
    class Local(pafs.LocalFileSystem):
        def get_file_info(self, what: Any) -> Any:
            scheduler.operation("look", str(getattr(what, "base_dir", what)))
            return super().get_file_info(what)

        def delete_file(self, path: str) -> None:
            scheduler.operation("delete", path)
            super().delete_file(path)

        def open_input_file(self, path: str) -> Any:
            scheduler.operation("read", path)
            return super().open_input_file(path)

    replaced = files._replace_local

    def replace_local(path: Path, data: Any, private: bool) -> None:
        scheduler.stop("write", str(path))
        replaced(path, data, private)

    def fsync(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            scheduler.stop("written")
            return
        # Right before the rename.
        scheduler.operation("rename", str(Path(f"/proc/self/fd/{number}").readlink()))
        os.utime(number, ns=(now := _storage_ns(scheduler), now))

    def link(source: str, target: str) -> None:
        scheduler.operation("link", target)
        os.link(source, target)

    def utime(path: str) -> None:
        scheduler.operation("renew", path)
        os.utime(path, ns=(now := _storage_ns(scheduler), now))

    patch.setattr(
        files,
        "pafs",
        SimpleNamespace(
            LocalFileSystem=Local,
            FileSystem=pafs.FileSystem,
            FileSelector=pafs.FileSelector,
            FileType=pafs.FileType,
        ),
    )
    patch.setattr(files, "_replace_local", replace_local)
    patch.setattr(
        files,
        "os",
        SimpleNamespace(
            fsync=fsync, open=os.open, close=os.close, O_RDONLY=os.O_RDONLY, strerror=os.strerror
        ),
    )
    patch.setattr(exclusive, "os", SimpleNamespace(link=link))
    patch.setattr(lock, "os", SimpleNamespace(utime=utime))


class S3Server:
    """S3 server that honours, refuses or ignores conditional requests.

    Args:
        host: host with port.
        conditions: ``kept``, ``refused`` or ``unseen``.
    """

    KINDS: ClassVar = ("kept", "refused", "unseen")

    def __init__(self, host: str, conditions: str) -> None:
        import boto3

        assert conditions in self.KINDS
        self.host, self.conditions = host, conditions
        self.client = boto3.client("s3", region_name="us-east-1", endpoint_url=f"http://{host}")

    def empty(self, bucket: str) -> None:
        """Deletes all objects."""
        empty_bucket(self.client, bucket)

    def install(self, patch: pytest.MonkeyPatch, scheduler: Scheduler) -> None:
        """Installs the server, as the function ``install`` does."""
        client, written = self.client, dict[str, tuple[int, bytes]]()

        def note(path: str, data: bytes) -> None:
            written[path] = _storage_ns(scheduler), data

        class Stream:
            """An upload that becomes visible only with its last request."""

            def __init__(self, path: str) -> None:
                self._path, self._data = path, b""

            def write(self, data: bytes | memoryview) -> None:
                self._data += bytes(data)

            def close(self) -> None:
                scheduler.operation("put", self._path)
                bucket, _, key = self._path.partition("/")
                # One request instead of three, the first two of which are invisible to others.
                client.put_object(Bucket=bucket, Key=key, Body=self._data)
                note(self._path, self._data)

        class Objects(pafs.S3FileSystem):
            """File system of jobs; between two of their operations it answers from what was written."""

            def get_file_info(self, what: Any) -> Any:
                scheduler.operation("look", str(getattr(what, "base_dir", what)))
                if scheduler.process is None:
                    return _look_up(written, what)
                found = super().get_file_info(what)
                if isinstance(found, list) or found.type != pafs.FileType.File:
                    return found
                # S3 has times in whole seconds.
                second = written[found.path][0] // 10**9
                return pafs.FileInfo(found.path, found.type, mtime_ns=second * 10**9, size=found.size)

            def delete_file(self, path: str) -> None:
                scheduler.operation("delete", path)
                bucket, _, key = path.partition("/")
                client.delete_object(Bucket=bucket, Key=key)
                written.pop(path, None)

            def open_input_file(self, path: str) -> Any:
                if scheduler.process is None:
                    return pa.BufferReader(written[path][1])
                scheduler.operation("read", path)
                opened = super().open_input_file(path)
                # An open object may be deleted before it is read.
                scheduler.operation("read on", path)
                return opened

            def open_output_stream(self, path: str, **_: Any) -> Any:
                scheduler.stop("upload", path)
                return Stream(path)

        def head_object(**asked: Any) -> Any:
            scheduler.operation("head", f"{asked['Bucket']}/{asked['Key']}")
            return client.head_object(**asked)

        def put_object(**asked: Any) -> Any:
            path = f"{asked['Bucket']}/{asked['Key']}"
            fault = scheduler.operation("conditional put", path)
            if self.conditions == "refused":
                raise _refusal()
            if self.conditions == "unseen":
                asked = {name: asked[name] for name in ("Bucket", "Key", "Body")}
            done = client.put_object(**asked)
            note(path, asked["Body"])
            if fault == "answer lost":  # so the client repeats the request
                done = client.put_object(**asked)
            return done

        objects = Objects(region="us-east-1", scheme="http", endpoint_override=self.host)
        patch.setattr(object_store, "_file_system", lambda *_: objects)
        wrapped = SimpleNamespace(head_object=head_object, put_object=put_object)
        patch.setattr(conditional, "_client", lambda _: wrapped)
        patch.setattr(conditional, "_refusing", set())
        patch.setattr(conditional, "_tried", set())


@contextmanager
def serve(conditions: str) -> Iterator[S3Server]:
    """Yields a server with the empty bucket ``videos``; the environment points to it."""
    with s3_server() as (host, port), pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"):
            patch.delenv(name, raising=False)
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        # It would log each request.
        patch.setattr(logging.getLogger("werkzeug"), "disabled", True)
        server = S3Server(f"{host}:{port}", conditions)
        server.client.create_bucket(Bucket="videos")
        yield server
        # All moto servers of a process share their objects.
        server.empty("videos")
        server.client.delete_bucket(Bucket="videos")


def _look_up(written: Mapping[str, tuple[int, bytes]], what: Any) -> Any:
    """Answers like an object store's ``get_file_info``, except for folders."""
    if isinstance(what, str):
        kind = pafs.FileType.File if what in written else pafs.FileType.NotFound
        return pafs.FileInfo(what, kind, size=len(written[what][1]) if what in written else None)
    folder = what.base_dir.rstrip("/") + "/"
    there = [path for path in written if path.startswith(folder) and "/" not in path.removeprefix(folder)]
    return [pafs.FileInfo(path, pafs.FileType.File, size=len(written[path][1])) for path in there]


def _refusal() -> Exception:
    from botocore.exceptions import ClientError

    answer = {"Error": {"Code": "NotImplemented"}, "ResponseMetadata": {"HTTPStatusCode": 501}}
    return ClientError(answer, "PutObject")
