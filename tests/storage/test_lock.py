"""One writer at a time: waiting, refusing, taking over from the dead, and noticing to be taken for dead."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from gare.errors import DataError, GareError, LockLostError
from gare.storage import claims, generations
from gare.storage import lock as module
from gare.storage.claims import Claim, own_claim
from gare.storage.files import list_files, read_json, stat_file, write_json
from gare.storage.lock import StoreLock

ON_S3 = "s3://videos/store"


def take_turns(uri: str, *, jobs: int, times: int, within_s: float) -> list[int]:
    """The jobs that held a lock, in turn; asserts that no two held it at once."""
    inside: list[int] = []
    turns: list[int] = []

    def job(number: int) -> None:
        for _ in range(times):
            with StoreLock(uri) as lock:
                inside.append(number)
                assert inside == [number]
                lock.raise_if_lost()
                turns.append(number)
                inside.remove(number)

    threads = [threading.Thread(target=job, args=(number,)) for number in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(within_s)
    return turns


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks again at once, and settles at once."""
    monkeypatch.setattr(module, "_POLL_S", 0.005)
    monkeypatch.setattr(module, "_SETTLE_S", 0.1)


def put_claim(store: Path, **changes: Any) -> Path:
    """The file of another job, which claims the store."""
    claim = dataclasses.replace(own_claim(), claimed=True, **changes)
    path = store / "lock" / f"{claim.job}.json"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(dataclasses.asdict(claim)))
    return path


def test_the_store_is_free_afterwards(tmp_path: Path) -> None:
    """A lock that stays behind would stop every night's job after the first."""
    for _ in range(2):
        with StoreLock(str(tmp_path), when_locked="refuse") as lock:
            assert len(list((tmp_path / "lock").iterdir())) == 1
            lock.raise_if_lost()
        assert list((tmp_path / "lock").iterdir()) == []
    with pytest.raises(ZeroDivisionError), StoreLock(str(tmp_path)):
        raise ZeroDivisionError
    assert list((tmp_path / "lock").iterdir()) == []


def test_another_job_is_refused_by_name(tmp_path: Path) -> None:
    """Two writers would do all work twice; who is in the way must be said."""
    with StoreLock(str(tmp_path)) as first:
        with (
            pytest.raises(DataError, match=f"process {os.getpid()}"),
            StoreLock(str(tmp_path), when_locked="refuse"),
        ):
            pass
        first.raise_if_lost()
    # Neither is a job elsewhere overruled whose clock runs behind, so that it seems to have come later.
    put_claim(tmp_path, machine="elsewhere", host="other", since_ns=2**62)
    with pytest.raises(DataError, match="@other"), StoreLock(str(tmp_path), when_locked="refuse"):
        pass
    assert len(list((tmp_path / "lock").iterdir())) == 1


def this_machine() -> str:
    """Name of the machine in claims, as earlier versions wrote it: without the start of the process."""
    return own_claim().machine.partition(" start ")[0]


def test_many_at_once_take_turns(tmp_path: Path) -> None:
    """Jobs that start in the same moment must not both believe that they were first."""
    turns = take_turns(str(tmp_path), jobs=5, times=3, within_s=60)
    assert sorted(turns) == sorted([*range(5)] * 3)


def test_a_dead_job_is_succeeded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A kill -9 leaves the lock behind; the next night's job must not wait for ever."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    put_claim(tmp_path, pid=dead.pid, job="killed")
    # The same process id, used again by another process.
    put_claim(tmp_path, machine=f"{this_machine()} start 1", job="earlier")
    old = put_claim(tmp_path, machine="elsewhere", host="other", job="silent")
    os.utime(old, (1, 1))
    with StoreLock(str(tmp_path), when_locked="refuse", stale_s=0.06):
        assert len(list((tmp_path / "lock").iterdir())) == 1
    assert caplog.text.count("its process is gone") == 2
    assert "@other" in caplog.text
    assert "no sign of life" in caplog.text


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> list[float]:
    """Sets the clock by hours, both ways: psutil computes the start of a process from it, as here."""
    step_s = float(rng.uniform(3600, 36000))
    now, started = time.time_ns, psutil.Process.create_time
    steps = [step_s, -step_s]
    monkeypatch.setattr(claims.time, "time_ns", lambda: now() + int(steps[0] * 1e9))
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: started(process) + steps[0])
    return steps


def test_a_clock_that_is_set_does_not_kill(tmp_path: Path, stepped: list[float]) -> None:
    """NTP, or a virtual machine that resumes, sets the clock by hours: the owner lives and writes on."""
    with StoreLock(str(tmp_path)) as lock:
        claim = json.loads(next((tmp_path / "lock").iterdir()).read_text())
        for _ in range(2):
            stepped.reverse()
            with (
                pytest.raises(DataError, match=f"process {os.getpid()}"),
                StoreLock(str(tmp_path), when_locked="refuse"),
            ):
                pass
            lock.raise_if_lost()
            # An owner of an earlier version, which has no other start than one by the clock.
            earlier = Claim(**claim | {"machine": this_machine()})
            assert not earlier.is_dead()
        assert not Claim(**claim).is_dead()


@pytest.mark.parametrize("hours", [-9, 9])
def test_clocks_that_disagree_do_not_kill(tmp_path: Path, hours: float) -> None:
    """A storage whose clock is set makes a claim look hours old, or of tomorrow; its owner writes on."""
    other = put_claim(tmp_path, machine="elsewhere", host="other", since_ns=0)
    at_s = time.time() + hours * 3600
    os.utime(other, (at_s, at_s))
    ended = threading.Event()

    def live() -> None:
        beat = 0
        while not ended.wait(0.01):
            beat += 1
            os.utime(other, (at_s + beat, at_s + beat))

    owner = threading.Thread(target=live)
    owner.start()
    try:
        with pytest.raises(DataError, match="@other"), StoreLock(str(tmp_path), when_locked="refuse"):
            pass
        assert other.exists()
    finally:
        ended.set()
        owner.join()


def test_time_in_which_nobody_looked_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs that were suspended together go on together: neither may take the other for dead."""
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    silence = module._Silence(stale_s=60.0)
    seen = []
    for step_s in (0.5, 0.5, 9.0, 10000.0):
        now += step_s
        silence.look()
        seen.append(silence.of("claim", "as it was"))
    assert seen == [(0.0, False), (0.5, False), (9.5, False), (19.5, False)]
    silence.look()
    assert silence.of("claim", "renewed") == (0.0, True)


def test_a_job_that_was_succeeded_stops(tmp_path: Path) -> None:
    """One that slept too long must not go on writing beside its successor."""
    with StoreLock(str(tmp_path), stale_s=0.06) as lock:
        next((tmp_path / "lock").iterdir()).unlink()
        next(thread for thread in threading.enumerate() if thread.name == "store lock").join(60)
        with pytest.raises(GareError, match="the lock was lost"):
            lock.raise_if_lost()


def test_a_waiting_job_is_told_for_whom(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A command that does nothing visible for hours would be killed, or started a third time."""
    other = put_claim(tmp_path, machine="elsewhere", host="other", since_ns=0)
    told = threading.Event()

    class Listener(module.logging.Handler):
        def emit(self, record: Any) -> None:
            other.unlink(missing_ok=True)
            told.set()

    listener = Listener()
    module.logger.addHandler(listener)
    try:
        with StoreLock(str(tmp_path)):
            assert told.is_set()
    finally:
        module.logger.removeHandler(listener)
    assert "waiting for another job" in caplog.text
    assert "@other" in caplog.text


def test_claims_are_ordered_by_their_start() -> None:
    """The elder goes first, whatever else they hold."""
    one = own_claim()
    assert one < dataclasses.replace(one, since_ns=one.since_ns + 1, job="0", claimed=True)
    assert isinstance(one, Claim)
    assert not one.is_dead()


def test_what_killed_jobs_leave_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each kill leaves up to a part of a hundred megabytes; nights with kills would fill the disk."""
    caplog.set_level("INFO")
    old, fresh, other = ".gare-0a.tmp", ".gare-0b.tmp", "part-0.parquet"
    folders = [tmp_path, *(tmp_path / name for name in ("data", "failures", "lock", "passing/data"))]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (old, fresh, other):
            (folder / name).write_bytes(b"half a part")
            if name != fresh:
                os.utime(folder / name, (1, 1))
    with StoreLock(str(tmp_path)):
        for folder in folders:
            # Not one that a job may be writing which has only just lost the lock, nor anything with a name.
            assert {path.name for path in folder.iterdir() if path.is_file()} >= {fresh, other}
            assert not (folder / old).exists()
    assert f"removed {len(folders)} temporary files" in caplog.text


def test_nothing_is_removed_while_another_job_has_the_store(tmp_path: Path) -> None:
    """A slow disk may keep a temporary file for longer than the lock allows."""
    put_claim(tmp_path, machine="elsewhere", host="other", since_ns=0)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".gare-0a.tmp").touch()
    os.utime(tmp_path / "data" / ".gare-0a.tmp", (1, 1))
    with pytest.raises(DataError, match="@other"), StoreLock(str(tmp_path), when_locked="refuse"):
        pass
    assert (tmp_path / "data" / ".gare-0a.tmp").exists()


def suspend(lock: StoreLock) -> None:
    """Makes a job one of another machine, whose signs of life alone can tell; its thread does not renew."""
    (location,) = list_files(f"{lock.uri}/lock")
    write_json(location, read_json(location) | {"machine": "elsewhere", "host": "other"})


@pytest.mark.parametrize("store", ["local", "s3"])
def test_a_suspended_owner_is_told_before_it_writes(
    tmp_path: Path, store: str, request: pytest.FixtureRequest
) -> None:
    """It wakes up in the middle of its work: its next write must not wait for a thread that renews."""
    if store == "s3":
        request.getfixturevalue("s3")
    uri = str(tmp_path) if store == "local" else ON_S3
    with StoreLock(uri, stale_s=1000.0) as sleeper:
        sleeper.raise_if_lost()
        suspend(sleeper)
        with StoreLock(uri, stale_s=0.5) as successor:
            assert successor.held.generation == sleeper.held.generation + 1
            with pytest.raises(LockLostError, match="the lock was lost"):
                sleeper.held.raise_if_lost()
            assert sleeper.owned.is_lost()
            # On S3 it may have been paused inside a renewal, which brings its claim back.
            sleeper._lost = False
            sleeper._write(claimed=True)
            assert not sleeper._is_ours()
            successor.raise_if_lost()
            assert not successor.owned.is_lost()
        sleeper._lost = False
        with pytest.raises(LockLostError):
            sleeper.raise_if_lost()
    assert list_files(f"{uri}/lock") == []


def test_one_who_was_suspended_while_it_claimed_starts_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saw no other job and slept before it began: its successor must not lose the store to it."""
    begin, others = module.begin_generation, []

    def slowly(uri: str, job: str, may: Callable[[], bool]) -> generations.Generation | None:
        if not others:
            others.append(job)
            (tmp_path / "lock" / f"{job}.json").unlink()  # a successor took it away, and is done
            generations.begin_generation(uri, "successor")
        return begin(uri, job, may)

    monkeypatch.setattr(module, "begin_generation", slowly)
    with StoreLock(str(tmp_path)) as lock:
        lock.raise_if_lost()
        assert lock.held.generation == 2


def test_a_storage_that_does_not_answer_for_a_moment_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage of seconds would end hours of work; one so long that the lock may be gone has to."""
    now = module._steady_s()
    with StoreLock(str(tmp_path), stale_s=60.0) as lock:
        lock.raise_if_lost()

        def fail(uri: str) -> int:
            raise DataError("503", where=uri)

        with monkeypatch.context() as patch:
            patch.setattr(module, "newest_number", fail)
            lock.raise_if_lost()
            patch.setattr(module, "_steady_s", lambda: now + 100.0)
            with pytest.raises(DataError, match="503"):
                lock.raise_if_lost()
        lock.raise_if_lost()


@pytest.mark.usefixtures("s3")
def test_jobs_on_s3_take_turns() -> None:
    """A cluster without a shared disk has nothing else that could keep two nights apart."""
    turns = take_turns(ON_S3, jobs=3, times=2, within_s=120)
    assert sorted(turns) == [0, 0, 1, 1, 2, 2]
    assert list_files(f"{ON_S3}/lock") == []


@pytest.mark.usefixtures("s3")
def test_a_living_job_on_s3_is_refused_by_name_however_long_it_takes() -> None:
    """Else the second job of a night takes the store over from the first, which is still at work."""
    with StoreLock(ON_S3, stale_s=3.0) as first:
        (location,) = list_files(f"{ON_S3}/lock")
        started = stat_file(location)
        deadline = time.monotonic() + 60
        # Until it has shown more signs of life than it may be silent for.
        while stat_file(location)[1] - started[1] < 4e9 and time.monotonic() < deadline:
            threading.Event().wait(0.1)
        with (
            pytest.raises(DataError, match=f"process {os.getpid()}"),
            StoreLock(ON_S3, when_locked="refuse", stale_s=3.0),
        ):
            pass
        first.raise_if_lost()


@pytest.mark.usefixtures("s3")
def test_a_silent_job_on_s3_is_succeeded_and_notices(caplog: pytest.LogCaptureFixture) -> None:
    """A machine that is taken away leaves its claim behind; the next night must not wait for ever."""
    with StoreLock(ON_S3, stale_s=1000.0) as silent:
        suspend(silent)
        with StoreLock(ON_S3, stale_s=1.5) as lock:
            lock.raise_if_lost()
            assert len(list_files(f"{ON_S3}/lock")) == 1
        assert "@other" in caplog.text
        assert "no sign of life" in caplog.text
        assert not silent._renew()
    assert list_files(f"{ON_S3}/lock") == []
