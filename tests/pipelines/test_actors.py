"""The pool of actors, and its like on Ray Data: whatever dies, a task has one result or one clear error."""

from __future__ import annotations

import json
import os
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

from cluster.runtime.actors import RETRIES, ActorPool
from cluster.runtime.parts import run_parts
from gare.errors import DataError, GareError

Numbers = Iterator[tuple[int]]
#: Long enough for a machine that is busy with other things.
PATIENCE_S = 240


def wait_for(is_so: Callable[[], bool]) -> bool:
    """True as soon as it is so; False where it never is."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := is_so()) and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    return found


def numbers(count: int) -> Numbers:
    return ((number,) for number in range(count))


def doubling() -> Callable[[int], int]:
    return lambda number: 2 * number


def by_pool(load: Callable[[], Any], count: int) -> list[Any]:
    with ActorPool(load, count=2) as pool:
        return list(pool.map(numbers(count)))


def by_parts(load: Callable[[], Any], count: int) -> list[Any]:
    return sorted(run_parts(load, range(count), workers=2))


#: Both ways to do tasks, of which the same is expected.
WAYS = pytest.mark.parametrize("do_all", [by_pool, by_parts], ids=["pool", "parts"])


def test_results_come_in_the_order_of_the_tasks(ray_local: None, tmp_path: Path) -> None:
    """An evaluation puts them together by their place: a slow task must not move them."""

    def uneven() -> Callable[[int], tuple[int, int]]:
        def work(number: int) -> tuple[int, int]:
            (tmp_path / str(number)).touch()
            if number == 0:  # ends after another one has begun
                wait_for((tmp_path / "2").exists)
            return number, os.getpid()

        return work

    with ActorPool(uneven, count=2) as pool:
        found = list(pool.map(numbers(9)))
        assert [number for number, _ in found] == list(range(9))
        assert len({pid for _, pid in found}) == 2
        assert sorted(number for number, _ in pool.map(numbers(5), ordered=False)) == list(range(5))
        assert list(pool.map([])) == []


def test_each_actor_loads_once(ray_local: None, tmp_path: Path) -> None:
    """Loading a model takes longer than a task."""

    def load() -> Callable[[int], int]:
        with (tmp_path / "loaded").open("a") as log:
            log.write(f"{os.getpid()}\n")
        return doubling()

    with ActorPool(load, count=2) as pool:
        for _ in range(3):
            assert list(pool.map(numbers(6))) == [0, 2, 4, 6, 8, 10]
    pids = (tmp_path / "loaded").read_text().split()
    assert len(pids) == len(set(pids)) <= 2


def test_references_arrive_as_their_objects(ray_local: None, rng: np.random.Generator) -> None:
    """What all tasks share is sent to each node once, however many tasks there are."""
    import ray

    table = rng.normal(size=(1000, 50))
    held = ray.put(table)

    def load() -> Callable[[int, np.ndarray], np.ndarray]:
        return lambda row, whole: whole[row:] * 2

    with ActorPool(load, count=2) as pool:
        for row, found in enumerate(pool.map((row, held) for row in range(3))):
            np.testing.assert_array_equal(found, table[row:] * 2)


def test_no_more_is_taken_ahead_than_asked_for(ray_local: None) -> None:
    """A training that reads slowly must not find the whole epoch in the memory of its node."""
    drawn: list[int] = []

    def tasks() -> Numbers:
        for number in range(100):
            drawn.append(number)
            yield (number,)

    with ActorPool(doubling, count=2) as pool:
        results = pool.map(tasks(), ahead=3)
        for number in range(20):
            assert next(results) == 2 * number
            assert len(drawn) == number + 3


@WAYS
def test_a_dead_actor_loses_and_doubles_nothing(
    do_all: Callable[..., list[Any]], ray_local: None, tmp_path: Path, rng: np.random.Generator
) -> None:
    """The system kills what takes too much memory, and nodes vanish: the work of a night goes on."""
    fatal, grave = int(rng.integers(8)), tmp_path / "grave"

    def mortal() -> Callable[[int], int]:
        def work(number: int) -> int:
            if number == fatal and not grave.exists():
                grave.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return 2 * number

        return work

    assert do_all(mortal, 8) == [2 * number for number in range(8)]
    assert grave.exists()


@WAYS
def test_a_task_that_always_kills_ends_the_work(
    do_all: Callable[..., list[Any]], ray_local: None, tmp_path: Path
) -> None:
    """One video that takes all memory must not keep a cluster busy for the rest of the night."""

    def deadly() -> Callable[[int], int]:
        def work(number: int) -> int:
            if number == 2:
                with (tmp_path / "tries").open("a") as log:
                    log.write("x")
                os.kill(os.getpid(), signal.SIGKILL)
            return number

        return work

    with pytest.raises(GareError) as raised:
        do_all(deadly, 4)
    assert raised.value.exit_code == 4
    name = "task" if do_all is by_pool else "part"
    assert str(raised.value).startswith(f"{name} 2 (the first is 0) has ended {RETRIES + 1} actors")
    assert "more memory" in str(raised.value)
    assert (tmp_path / "tries").read_text() == "x" * (RETRIES + 1)


def test_actors_that_died_idle_are_not_held_against_a_task(ray_local: None) -> None:
    """With its node a whole pool may be gone: the next task has killed none of its actors."""

    def load() -> Callable[[int], int]:
        return lambda number: os.getpid()

    with ActorPool(load, count=RETRIES + 3, num_cpus=0.1) as pool:
        pids = set(pool.map(numbers(500)))
        while len(pids) <= RETRIES:  # on a busy machine the first have done all before the last are there
            pids |= set(pool.map(numbers(500)))
        for pid in pids:
            psutil.Process(pid).kill()
        assert wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids))
        (again,) = pool.map(numbers(1))
    assert again not in pids


@WAYS
@pytest.mark.parametrize("where", ["load", "work"])
def test_a_fault_leaves_as_itself(where: str, do_all: Callable[..., list[Any]], ray_local: None) -> None:
    """A person must read what is wrong with a store as if no cluster were between."""

    def broken() -> Callable[[int], int]:
        def work(number: int) -> int:
            raise DataError("has no rows", where=f"part {number}", accepted="another one")

        if where == "load":
            raise DataError("is not there", where="a/b.pt")
        return work

    with pytest.raises(GareError) as raised:
        do_all(broken, 1)
    fault = raised.value
    assert type(fault) is DataError
    assert str(fault) == ("a/b.pt: is not there" if where == "load" else "part 0: has no rows (another one)")
    assert (fault.where, fault.exit_code) == ("a/b.pt" if where == "load" else "part 0", 3)
    assert fault.__cause__ is None
    assert fault.__context__ is None


@WAYS
def test_what_nobody_foresaw_ends_the_work(
    do_all: Callable[..., list[Any]], ray_local: None, caplog: pytest.LogCaptureFixture
) -> None:
    """A mistake of ours in a worker must end the job with its name; the log says where it is."""

    def wrong() -> Callable[[int], int]:
        return lambda number: [][number]

    with pytest.raises(GareError) as raised:
        do_all(wrong, 3)
    assert type(raised.value) is GareError
    assert str(raised.value) == "IndexError: list index out of range"
    (trace,) = [record.getMessage() for record in caplog.records if record.name == "cluster.runtime.actors"]
    assert f'{Path(__file__).name}", line' in trace


def held_up(folder: Path) -> Callable[[], Callable[[int], int]]:
    """Loads work whose tasks but the first never end."""

    def load() -> Callable[[int], int]:
        def work(number: int) -> int:
            (folder / str(os.getpid())).touch()
            if number:
                signal.pause()
            return number

        return work

    return load


@pytest.mark.parametrize("how", ["closed", "failed", "left"])
def test_actors_end_with_the_work(how: str, ray_local: None, tmp_path: Path) -> None:
    """An actor that stays holds a GPU until somebody looks."""

    def left() -> None:
        with ActorPool(held_up(tmp_path), count=2) as pool:
            results = pool.map(numbers(3))
            assert next(results) == 0
            assert wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
            if how == "closed":
                results.close()
                gone()
            if how == "failed":
                raise DataError("a fault of the driver's")

    def gone() -> None:
        pids = [int(path.name) for path in tmp_path.iterdir()]
        assert wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids))

    if how == "failed":
        with pytest.raises(DataError, match="of the driver's"):
            left()
    else:
        left()
    gone()


def test_work_goes_on_while_the_driver_does_something_else(ray_local: None, tmp_path: Path) -> None:
    """Encoders on GPUs must not wait until the driver has done with decoding."""

    def noting() -> Callable[[int], int]:
        def work(number: int) -> int:
            (tmp_path / str(number)).touch()
            return number

        return work

    with ActorPool(noting, count=1) as pool:
        pool.submit(numbers(4))
        pool.submit([(4,)])
        assert wait_for(lambda: len(list(tmp_path.iterdir())) == 5)
        assert sorted(pool.finish()) == [0, 1, 2, 3, 4]
        assert list(pool.finish()) == []
        pool.submit([(5,)])
        assert list(pool.finish()) == [5]


def test_a_pool_larger_than_the_cluster(ray_local: None) -> None:
    """Other jobs hold CPUs: those that are free are enough, and nothing waits for the others."""
    with ActorPool(doubling, count=3, num_cpus=2) as pool:
        assert list(pool.map(numbers(12))) == [2 * number for number in range(12)]


LOST = """
import json, os, sys
from pathlib import Path
import numpy as np
import ray
from ray.cluster_utils import Cluster
from cluster.runtime.actors import ActorPool
from tests.pipelines.test_actors import wait_for

folder = Path(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
node = cluster.add_node(num_cpus=1)
lost = node.node_id
ray.init(address=cluster.address, logging_level="warning")
cluster.wait_for_nodes()

def load():
    here = ray.get_runtime_context().get_node_id()
    def work(number):
        (folder / f"{number}-{here}").touch()
        # Two at a time, so that each node does one of 2 and 3, whose result stays there, and of 4 and 5.
        wait_for(lambda: list(folder.glob(f"{number ^ 1}-*")))
        if number >= 4 and here == lost:
            wait_for((folder / "never").exists)
        return np.full(10**6, number)
    return work

with ActorPool(load, count=2) as pool:
    results = pool.map((number,) for number in range(6))
    found = [next(results)]
    wait_for(lambda: len(list(folder.iterdir())) == 6)
    cluster.remove_node(node, allow_graceful=False)
    found += results
    right = [bool((array == number).all()) and len(array) == 10**6 for number, array in enumerate(found)]
done = [path.name[0] for path in folder.iterdir()]
ray.shutdown()
cluster.shutdown()
print(json.dumps({"right": right, "again": sorted({name for name in done if done.count(name) > 1})}))
"""


@pytest.mark.faults
def test_results_on_a_lost_node(repository: Path, tmp_path: Path) -> None:
    """A machine takes with it what it made and nobody has fetched yet: that is made again elsewhere."""
    done = subprocess.run(
        [sys.executable, "-c", LOST, str(tmp_path)],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["right"] == [True] * 6
    assert len([number for number in result["again"] if number in "23"]) == 1
    assert len([number for number in result["again"] if number in "45"]) == 1
