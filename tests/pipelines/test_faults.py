"""Whatever is killed, and whenever: the store is that of an undisturbed run, id by id and value by value."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from cluster.layout import Layout, layout
from gare.data.store.contents import Store
from gare.storage.files import list_files
from pipelines import extract
from tests.helpers.pipelines import in_process, tiny
from tests.helpers.stores import stored_values

pytestmark = pytest.mark.faults

#: Long enough for a machine that is busy with other things.
PATIENCE_S = 240


@pytest.fixture
def name(request: pytest.FixtureRequest, places: Layout, benchmark: dict[str, Any]) -> str:
    """The name of a data set with the tiny benchmark's manifest and no store."""
    test = "".join(sign if sign.isalnum() else "-" for sign in request.node.name)
    copied = layout(tiny(f"name={test}"))
    Path(copied.data).mkdir()
    shutil.copy2(places.manifest, copied.manifest)
    return test


def wait_for(what: Callable[[], Any], still: Callable[[], bool] = lambda: True) -> Any:
    """What is waited for, as soon as it is there; nothing where it does not come."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := what()) and still() and time.monotonic() < deadline:
        threading.Event().wait(0.005)
    return found


def num_parts(store: str) -> int:
    return len(list_files(f"{store}/data"))


def assert_undisturbed(store: str, places: Layout) -> None:
    assert stored_values(store) == stored_values(places.frames)
    assert Store(store).read_failures({}) == {}
    meta = Store(store).read_meta()
    assert meta.complete
    assert meta.counts["videos"] == 40
    assert list_files(f"{store}/lock") == []


@pytest.mark.parametrize("what", ["ray::MapWorker", "gare.data.decode.child"], ids=["actor", "decoder"])
def test_a_killed_worker(what: str, name: str, places: Layout, rng: np.random.Generator) -> None:
    """The system kills what takes too much memory: neither its clips nor the job may be lost with it."""
    store = layout(tiny(f"name={name}")).frames
    after = int(rng.integers(1, 4))
    killed: list[int] = []
    done = threading.Event()

    def kill() -> None:
        def victims() -> list[psutil.Process]:
            family = psutil.Process().children(recursive=True)
            return [one for one in family if what in " ".join(one.cmdline())]

        def strike() -> bool:
            try:
                victim = victims()[0]
                victim.kill()
            except (psutil.Error, IndexError):
                return False
            killed.append(victim.pid)
            return True

        wait_for(lambda: num_parts(store) >= after, lambda: not done.is_set())
        wait_for(strike, lambda: not done.is_set())

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        result = extract.run(tiny(f"name={name}"))
    finally:
        done.set()
        thread.join()
    assert killed, f"{what} was to be killed after part {after}, but the job was faster"
    assert result["failed"] == {}
    assert_undisturbed(store, places)


def start_job(
    name: str, repository: Path, root: Path, tiny_yaml: str, *overrides: str
) -> subprocess.Popen[bytes]:
    """The command as a process of its own, in the Ray of these tests, as a job of a cluster would be."""
    with (root / f"{name}.log").open("wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "pipelines/extract.py", "--config", tiny_yaml, f"name={name}", *overrides],
            cwd=repository,
            env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            # A shell's background job ignores Ctrl-C, and hands that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_driver_that_ends(
    how: int,
    name: str,
    places: Layout,
    repository: Path,
    root: Path,
    tiny_yaml: str,
    rng: np.random.Generator,
) -> None:
    """A machine that loses power in the night, or Ctrl-C: the same command finishes the rest."""
    store = layout(tiny(f"name={name}")).frames
    after = int(rng.integers(1, 4))
    held: list[psutil.Process] = []
    process = start_job(name, repository, root, tiny_yaml)
    try:
        assert wait_for(lambda: num_parts(store) >= after, lambda: process.poll() is None)
        # Ray looks for a signal about once a second; these clips take no longer.
        for one in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "ray::MapWorker" in " ".join(one.cmdline()):
                    one.suspend()
                    held.append(one)
        process.send_signal(how)
        try:
            status = process.wait(20)
        except subprocess.TimeoutExpired:
            # It has heard by now, and its end may wait for those that are held.
            for one in held:
                with contextlib.suppress(psutil.Error):
                    one.resume()
            status = process.wait(PATIENCE_S)
    finally:
        process.kill()
        process.wait()
        for one in held:
            with contextlib.suppress(psutil.Error):
                one.resume()
    said = (root / f"{name}.log").read_text()
    assert not Store(store).read_meta().complete, f"done before it was ended after part {after}: {said}"
    assert status == (4 if how == signal.SIGINT else -how), said
    # Ctrl-C frees the store at once; what kill -9 leaves is taken over.
    assert len(list_files(f"{store}/lock")) == (0 if how == signal.SIGINT else 1)
    kept = {part: Path(part).stat().st_mtime_ns for part in list_files(f"{store}/data")}
    result = extract.run(tiny(f"name={name}", "upkeep.when_locked=refuse"))
    assert 0 < result["attempted"] < 40
    assert {part: Path(part).stat().st_mtime_ns for part in kept} == kept
    assert_undisturbed(store, places)


NODES = """
import json, os, signal, sys, threading
import ray
from ray.cluster_utils import Cluster
from cluster.layout import layout
from pipelines import extract
from tests.helpers.pipelines import tiny
from tests.pipelines.test_faults import num_parts, wait_for

name, after = sys.argv[1], int(sys.argv[2])
config = tiny(f"name={name}")
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
lost = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, logging_level="warning")
cluster.wait_for_nodes()

def kill():
    wait_for(lambda: num_parts(layout(config).frames) >= after)
    cluster.remove_node(lost, allow_graceful=False)

thread = threading.Thread(target=kill)
thread.start()
result = extract.run(config)
thread.join()
alive = lambda: sum(node["Alive"] for node in ray.nodes())
wait_for(lambda: alive() == 1)  # the cluster notices a little later than the work is done
alive = alive()
ray.shutdown()
cluster.shutdown()
print(json.dumps(result | {"alive": alive}))
"""


def test_a_killed_node(name: str, places: Layout, repository: Path, rng: np.random.Generator) -> None:
    """Cheap machines are taken away at any moment; what they were at must be done by others."""
    after = int(rng.integers(1, 4))
    done = subprocess.run(
        [sys.executable, "-c", NODES, name, str(after)],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, f"killed after part {after}: {done.stderr[-3000:]}"
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["alive"], result["failed"], result["videos"]) == (1, {}, 40)
    assert_undisturbed(layout(tiny(f"name={name}")).frames, places)


def test_two_jobs_at_once(name: str, places: Layout) -> None:
    """The night's job starts while yesterday's still runs: the work is done once."""
    results: list[dict[str, Any]] = []
    jobs = [
        threading.Thread(target=lambda: results.append(extract.run(tiny(f"name={name}")))) for _ in range(2)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(PATIENCE_S)
    assert sorted(result["attempted"] for result in results) == [0, 40]
    assert_undisturbed(layout(tiny(f"name={name}")).frames, places)


@pytest.fixture
def small_disk(name: str, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The folder of a data set's frame store, on a disk of its own with room for some of its parts."""
    folder = Path(layout(tiny(f"name={name}")).frames)
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk cannot be mounted here, which takes root: {error}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(
    small_disk: Path, name: str, places: Layout, tiny_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commonest end of a night: said in a line, nothing half there, gone on with once there is room."""
    store = str(small_disk)
    answer = in_process(capsys, extract.run, "--config", tiny_yaml, f"name={name}")
    answer.refused(4, store, "No space left on device", "make room there, then run the same command again")
    kept = {part: Path(part).read_bytes() for part in list_files(f"{store}/data")}
    assert 0 < len(Store(store).ids()) < 40
    assert not Store(store).read_meta().complete
    assert not [path for path in small_disk.rglob("*") if path.suffix == ".tmp" or path.parent.name == "lock"]
    # Still full: the same again, and what is there stays.
    answer = in_process(capsys, extract.run, "--config", tiny_yaml, f"name={name}")
    answer.refused(4, "No space left on device")
    assert {part: Path(part).read_bytes() for part in kept} == kept

    subprocess.run(["mount", "-o", "remount,size=16m", store], check=True)
    result = extract.run(tiny(f"name={name}"))
    assert 0 < result["attempted"] < 40
    assert {part: Path(part).read_bytes() for part in kept} == kept
    assert_undisturbed(store, places)
