"""Conditional writes on S3: one job creates, and what was deleted or replaced meanwhile stays so."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gare.errors import DataError, LockLostError
from gare.storage import conditional, exclusive, generations
from gare.storage.conditional import create_object, etag_of, replace_object
from gare.storage.exclusive import create_file, renew_object, replace_file
from gare.storage.files import delete_file, exists, list_files, read_bytes, write_atomically
from gare.storage.lock import StoreLock
from gare.storage.object_store import address_of
from tests.helpers.servers import DroppingProxy

FOLDER = "s3://videos/store"


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server could not do in one test says nothing of another."""
    monkeypatch.setattr(conditional, "_refusing", set())
    monkeypatch.setattr(conditional, "_tried", set())


@pytest.mark.parametrize("store", ["local", "s3"])
def test_one_of_many_creates(tmp_path: Path, store: str, request: pytest.FixtureRequest) -> None:
    """Two jobs that both believed to have begun the same generation would both write."""
    if store == "s3":
        request.getfixturevalue("s3")
    folder = str(tmp_path) if store == "local" else FOLDER
    start = threading.Barrier(8)

    def create(job: int) -> bool:
        start.wait(60)
        return create_file(folder, "7.json", str(job).encode())

    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(create, range(8)))
    # The server of these tests looks and writes in two steps; locally there is one winner.
    assert any(created)
    if store == "local":
        assert [str(created.index(True)).encode()] == [read_bytes(f"{folder}/7.json")]
        assert sum(created) == 1
    assert not create_file(folder, "7.json", b"later")
    assert read_bytes(f"{folder}/7.json") != b"later"


@pytest.mark.parametrize(("number", "has_links"), [(errno.EIO, True), (errno.EPERM, False)])
def test_a_disk_that_fails_is_not_one_without_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, has_links: bool
) -> None:
    """After a fault that passes, a write without conditions could replace another job's file."""

    def link(*_: str) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(exclusive, "os", SimpleNamespace(link=link))
    with pytest.raises(DataError, match="cannot be written") if has_links else contextlib.nullcontext():
        assert create_file(str(tmp_path), "7.json", b"one")
    assert [path.name for path in tmp_path.iterdir()] == ([] if has_links else ["7.json"])


@pytest.mark.usefixtures("s3")
def test_conditions_are_kept() -> None:
    """They are what an owner that was paused inside a request stumbles over."""
    uri = f"{FOLDER}/_META.json"
    assert etag_of(uri) == ""
    assert create_object(uri, b"one") is True
    assert create_object(uri, b"two") is False
    etag = etag_of(uri)
    assert replace_object(uri, b"three", etag) is True
    assert replace_object(uri, b"four", etag) is False
    assert read_bytes(uri) == b"three"
    etag = etag_of(uri)
    delete_file(uri)
    assert replace_object(uri, b"five", etag) is False
    assert not exists(uri)


@pytest.mark.usefixtures("s3")
def test_a_renewal_does_not_bring_a_claim_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paused inside a renewal, an owner would come back beside its successor, and neither would learn it."""
    with StoreLock(FOLDER, stale_s=1000.0) as sleeper:
        real = conditional._put
        (claim,) = list_files(f"{FOLDER}/lock")

        def pause(uri: str, data: bytes, **condition: str) -> bool | None:
            delete_file(claim)  # a successor takes it over meanwhile
            return real(uri, data, **condition)

        with monkeypatch.context() as patch:
            patch.setattr(conditional, "_put", pause)
            assert not sleeper._renew()
        assert not exists(claim)
        assert not renew_object(claim, b"{}")
        with pytest.raises(LockLostError):
            sleeper.raise_if_lost()


@pytest.mark.usefixtures("s3")
def test_a_description_is_not_put_over_a_newer_one() -> None:
    """An owner that sleeps between its look at the lock and its write would replace its successor's."""
    uri = f"{FOLDER}/_META.json"
    write_atomically(uri, b"before")
    looks = 0

    def check() -> None:
        nonlocal looks
        looks += 1
        if looks == 1:  # finds all well, and sleeps; the successor writes
            write_atomically(uri, b"of the successor")
        else:
            raise LockLostError("lost")

    with pytest.raises(LockLostError):
        replace_file(uri, b"late", check)
    assert read_bytes(uri) == b"of the successor"
    # One that still holds the lock has its way, over what a sleeper left there at the same moment.
    looks = 0

    def disturbed() -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            write_atomically(uri, b"late")

    replace_file(uri, b"mine", disturbed)
    assert read_bytes(uri) == b"mine"
    writes = itertools.count()
    with pytest.raises(DataError, match="is written by others"):
        replace_file(uri, b"never", lambda: write_atomically(uri, b"%d" % next(writes)))


def _refusing(code: str, status: int) -> Callable[..., Any]:
    from botocore.exceptions import ClientError

    def put_object(**arguments: Any) -> None:
        assert {"IfMatch", "IfNoneMatch"} & arguments.keys()
        answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
        raise ClientError(answer, "PutObject")

    return put_object


@pytest.mark.usefixtures("s3")
def test_a_server_without_conditions_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A person has to know that two jobs are only kept apart by looking; and the work has to go on."""
    client = conditional._client(address_of(FOLDER))
    monkeypatch.setattr(client, "put_object", _refusing("NotImplemented", 501))
    for _ in range(2):
        with StoreLock(FOLDER) as lock:
            lock.raise_if_lost()
            replace_file(f"{FOLDER}/_META.json", b"{}", lock.raise_if_lost)
            assert lock._renew()
    assert read_bytes(f"{FOLDER}/_META.json") == b"{}"
    assert generations.newest_number(FOLDER) == 2
    assert caplog.text.count("does not support conditional writes") == 1


@pytest.mark.usefixtures("s3")
def test_a_server_that_takes_no_notice_of_conditions_is_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Older servers let every write through, and would be believed to have kept two jobs apart."""
    client = conditional._client(address_of(FOLDER))
    put = client.put_object

    def heedless(**arguments: Any) -> Any:
        return put(**{name: arguments[name] for name in ("Bucket", "Key", "Body")})

    monkeypatch.setattr(client, "put_object", heedless)
    with StoreLock(FOLDER) as lock:
        lock.raise_if_lost()
        (claim,) = list_files(f"{FOLDER}/lock")
        assert etag_of(claim) == ""
    assert "takes no notice of conditions" in caplog.text


def test_an_outage_leaves_tries_for_later(
    s3: Any, s3_proxy: DroppingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that was renewed in vain through an outage would be lost at the next lost connection."""
    monkeypatch.setattr(conditional, "TRIES", 3)
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda seconds: None))
    conditional._client_of.cache_clear()
    uri = f"{FOLDER}/there"
    try:
        write_atomically(uri, b"content")
        s3_proxy.disturb(drops=10**6, most_bytes=2, share=1.0)
        for _ in range(60):
            with pytest.raises(DataError):
                etag_of(uri)
        for _ in range(3):
            s3_proxy.disturb(drops=1, most_bytes=2, share=1.0)
            assert etag_of(uri)
            assert sum(s3_proxy.dropped.values()) == 1
    finally:
        s3_proxy.disturb(0)
        conditional._client_of.cache_clear()
