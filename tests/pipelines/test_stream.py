"""Batches that actors load ahead of training: all of them, once, in order, whatever happens to an actor."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray

from cluster.session import fault_of
from cluster.stream import AHEAD, stream
from gare.errors import DataError

Load = Callable[[int], dict[str, np.ndarray]]


def uneven() -> Load:
    def load(number: int) -> dict[str, np.ndarray]:
        time.sleep(0.05 if number % 3 == 0 else 0)
        return {"frames": np.full((2, 3), number), "pid": np.array([os.getpid()])}

    return load


@pytest.mark.parametrize("reserved", [False, True])
def test_order_is_that_of_the_numbers(ray_local: None, reserved: bool) -> None:
    """A seed must give the same training again, though some clips take longer than others."""
    found = list(stream(uneven, range(4, 16), actors=2, reserved=reserved))
    assert [int(batch["frames"][0, 0]) for batch in found] == list(range(4, 16))
    assert len({int(batch["pid"][0]) for batch in found}) == 2
    found[0]["frames"] += 1  # a transform may work in place
    assert list(stream(uneven, range(0))) == []


def test_no_more_is_loaded_than_is_needed_soon(ray_local: None, tmp_path: Path) -> None:
    """A training that reads slowly must not find the whole epoch in the memory of its node."""

    def noting() -> Load:
        def load(number: int) -> dict[str, np.ndarray]:
            (tmp_path / str(number)).touch()
            return {"frames": np.zeros(1)}

        return load

    batches = stream(noting, range(100))
    next(batches)
    time.sleep(1)
    assert len(list(tmp_path.iterdir())) == 1 + AHEAD


def test_an_actor_that_is_killed_loads_again(ray_local: None, tmp_path: Path) -> None:
    """The system kills what takes too much memory, and nodes vanish: no batch may be lost or come twice."""

    def dying() -> Load:
        def load(number: int) -> dict[str, np.ndarray]:
            died = tmp_path / "died"
            if number == 5 and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return {"number": np.array([number])}

        return load

    assert [int(batch["number"][0]) for batch in stream(dying, range(10))] == list(range(10))
    assert (tmp_path / "died").exists()


def test_a_fault_comes_out_as_itself(ray_local: None) -> None:
    """What is wrong with a store must be said as when this process had read it."""

    def broken() -> Load:
        def load(number: int) -> dict[str, np.ndarray]:
            raise DataError("has no rows", where=f"part {number}")

        return load

    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        list(stream(broken, range(2)))
    fault = fault_of(raised.value)
    assert isinstance(fault, DataError)
    assert str(fault) == "part 0: has no rows"
