"""Batches that actors load ahead of training: all of them, once, in order, whatever happens to an actor."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.runtime.batches import CHUNK_BYTES, Load, ahead_bytes, stream
from cluster.runtime.devices import device_of_worker, explained_memory
from gare.config import ClusterConfig
from gare.errors import ConfigError, DataError, GareError

#: So large that a batch of 5 rows comes in chunks of 2.
ROW_BYTES = CHUNK_BYTES // 2
BATCHES = [(number, 5) for number in range(4, 12)]
ROWS = [(number, first, min(first + 2, 5)) for number, _ in BATCHES for first in (0, 2, 4)]


def uneven() -> Load:
    def load(number: int, first: int, stop: int) -> dict[str, np.ndarray]:
        time.sleep(0.05 if (number + first) % 3 == 0 else 0)
        return {"rows": np.array([[number, first, stop]]), "pid": np.array([os.getpid()])}

    return load


def rows_of(found: list[dict[str, np.ndarray]]) -> list[tuple[int, ...]]:
    return [tuple(map(int, one["rows"][0])) for one in found]


def test_order_is_that_of_the_batches(ray_local: None) -> None:
    """A seed must give the same training again, though some clips take longer than others."""
    found = list(stream(uneven, BATCHES, row_bytes=ROW_BYTES, loaders=2, ahead_bytes=4 * CHUNK_BYTES))
    assert rows_of(found) == ROWS
    assert len({int(one["pid"][0]) for one in found}) == 2
    assert list(stream(uneven, [], row_bytes=1, loaders=1, ahead_bytes=1)) == []


@pytest.mark.parametrize(("megabytes", "chunks"), [(0, 1), (CHUNK_BYTES * 3.5 / 10**6, 3)])
def test_no_more_is_loaded_than_the_setting_says(
    ray_local: None, tmp_path: Path, megabytes: float, chunks: int
) -> None:
    """A training that reads slowly must not find the whole epoch in the memory of its node."""

    def noting() -> Load:
        def load(number: int, first: int, stop: int) -> dict[str, np.ndarray]:
            (tmp_path / f"{number}-{first}").touch()
            return {"rows": np.array([[number, first, stop]])}

        return load

    batches = stream(
        noting, [(number, 2) for number in range(100)], row_bytes=ROW_BYTES, loaders=2,
        ahead_bytes=megabytes * 10**6,
    )  # fmt: skip
    for taken in range(1, 4):
        next(batches)
        deadline = time.monotonic() + 30
        while len(list(tmp_path.iterdir())) < taken + chunks - 1 and time.monotonic() < deadline:
            threading.Event().wait(0.02)
        assert taken <= len(list(tmp_path.iterdir())) <= taken + chunks
    batches.close()  # type: ignore[attr-defined]


def test_an_actor_that_is_killed_loads_again(ray_local: None, tmp_path: Path) -> None:
    """The system kills what takes too much memory, and nodes vanish: no clip may be lost or come twice."""

    def dying() -> Load:
        def load(number: int, first: int, stop: int) -> dict[str, np.ndarray]:
            died = tmp_path / "died"
            if number == 6 and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return {"rows": np.array([[number, first, stop]])}

        return load

    found = list(stream(dying, BATCHES, row_bytes=ROW_BYTES, loaders=1, ahead_bytes=4 * CHUNK_BYTES))
    assert rows_of(found) == ROWS
    assert (tmp_path / "died").exists()


def test_a_fault_comes_out_as_itself(ray_local: None) -> None:
    """What is wrong with a store must be said as when this process had read it."""

    def broken() -> Load:
        def load(number: int, first: int, stop: int) -> dict[str, np.ndarray]:
            raise DataError("has no rows", where=f"part {number}")

        return load

    with pytest.raises(DataError) as raised:
        list(stream(broken, BATCHES, row_bytes=ROW_BYTES, loaders=1, ahead_bytes=CHUNK_BYTES))
    assert str(raised.value) == "part 4: has no rows"


def test_what_waits_fits_into_the_object_store(ray_local: None, caplog: pytest.LogCaptureFixture) -> None:
    """Batches that do not fit are spilled to the disk and read again, slower than they were loaded."""
    assert ahead_bytes(ClusterConfig(prefetch_mb=1.5), 2) == 1.5e6
    with caplog.at_level("INFO"):
        room = ahead_bytes(ClusterConfig(prefetch_mb=1e9), 2)
    assert 1e8 < room < 1e11
    assert ahead_bytes(ClusterConfig(prefetch_mb=1e9), 4) == pytest.approx(room / 2)
    assert "cluster.prefetch_mb" in caplog.text


def test_a_gpu_that_torch_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training on the CPU by accident takes a hundred times as long, and nothing says why."""
    import ray.train.torch

    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    assert device_of_worker(ClusterConfig(cpus_per_worker=1)).type == "cpu"
    with pytest.raises(ConfigError, match="torch sees none") as raised:
        device_of_worker(ClusterConfig(cpus_per_worker=1, use_gpu=True))
    assert raised.value.where == "cluster.use_gpu"

    def no_kernel() -> torch.device:
        raise RuntimeError("CUDA error: no kernel image is available for execution\nmore")

    monkeypatch.setattr(ray.train.torch, "get_device", no_kernel)
    with pytest.raises(ConfigError, match="no kernel image"):
        device_of_worker(ClusterConfig(cpus_per_worker=1, use_gpu=True))


MESSAGE = (
    "CUDA out of memory. Tried to allocate 882.00 MiB. GPU 0 has a total capacity of 79.18 GiB of which "
    "512.00 MiB is free. Including non-PyTorch memory, this process has 78.60 GiB memory in use. Of "
    "the allocated"
)


@pytest.mark.parametrize(
    ("message", "said"),
    [(MESSAGE, "882.00 MiB more are needed, 78.60 GiB are held, the GPU has 79.18 GiB"), ("other", "other")],
)
def test_memory_that_does_not_suffice_names_the_setting(message: str, said: str) -> None:
    """A trace of the allocator does not say what to change."""

    def grow() -> None:
        raise torch.OutOfMemoryError(message)

    with pytest.raises(GareError) as raised, explained_memory(128, 256):
        grow()
    assert raised.value.exit_code == 4
    assert raised.value.where == "train.micro_batch"
    assert said in raised.value.what
    assert "train.micro_batch=64" in raised.value.accepted
