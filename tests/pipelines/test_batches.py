"""Batches that actors load ahead of training: all of them, once, in order, whatever happens to an actor."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.layout import Layout
from cluster.runtime.batches import CHUNK_BYTES, BatchRequest, Load, ahead_bytes, stream_chunks
from cluster.runtime.devices import Answer, device_of_worker, explain_out_of_memory, refuse_unusable
from gare.config import ClusterConfig
from gare.errors import ConfigError, DataError, GareError
from tests.helpers.clusters import resolved_cluster
from tests.helpers.pipelines import tiny

#: So large that a batch of 5 rows comes in chunks of 2.
ROW_BYTES = CHUNK_BYTES // 2
BATCHES = [BatchRequest(number, 5, ROW_BYTES) for number in range(4, 12)]
ROWS = [(batch.number, first, min(first + 2, 5)) for batch in BATCHES for first in (0, 2, 4)]
CONFIG = ClusterConfig(prefetch_mb=4 * CHUNK_BYTES / 10**6)


def uneven() -> Load:
    def load(number: int, first: int, stop: int) -> dict[str, np.ndarray]:
        if (number + first) % 3 == 0:
            hashlib.sha256(bytes(30 * 10**6))  # takes a moment
        return {"rows": np.array([[number, first, stop]]), "pid": np.array([os.getpid()])}

    return load


def rows_of(found: list[dict[str, np.ndarray]]) -> list[tuple[int, ...]]:
    return [tuple(map(int, one["rows"][0])) for one in found]


def test_order_is_that_of_the_batches(ray_local: None) -> None:
    """A seed must give the same training again, though some clips take longer than others."""
    found = list(stream_chunks(uneven, BATCHES, loaders=2, config=CONFIG, workers=1))
    assert rows_of(found) == ROWS
    assert len({int(one["pid"][0]) for one in found}) == 2
    assert list(stream_chunks(uneven, [], loaders=1, config=CONFIG, workers=1)) == []


@pytest.mark.parametrize(("megabytes", "chunks"), [(1e-3, 1), (CHUNK_BYTES * 3.5 / 10**6, 3)])
def test_no_more_is_loaded_than_the_setting_says(
    ray_local: None, tmp_path: Path, megabytes: float, chunks: int
) -> None:
    """A training that reads slowly must not find the whole epoch in the memory of its node."""

    def noting() -> Load:
        def load(number: int, first: int, stop: int) -> dict[str, np.ndarray]:
            (tmp_path / f"{number}-{first}").touch()
            return {"rows": np.array([[number, first, stop]])}

        return load

    asked = [BatchRequest(number, 2, ROW_BYTES) for number in range(100)]
    config = ClusterConfig(prefetch_mb=megabytes)
    batches = stream_chunks(noting, asked, loaders=2, config=config, workers=1)
    for taken in range(1, 4):
        next(batches)
        deadline = time.monotonic() + 30
        while len(list(tmp_path.iterdir())) < taken + chunks - 1 and time.monotonic() < deadline:
            threading.Event().wait(0.02)
        assert taken <= len(list(tmp_path.iterdir())) <= taken + chunks
    batches.close()  # type: ignore[attr-defined]


def test_small_batches_are_not_loaded_for_ever(ray_local: None, tmp_path: Path) -> None:
    """A thousand tiny batches fit into the memory, and loading them first would take the step's CPUs."""

    def noting() -> Load:
        def load(number: int, first: int, stop: int) -> dict[str, np.ndarray]:
            (tmp_path / str(number)).touch()
            return {"rows": np.array([[number, first, stop]])}

        return load

    asked = [BatchRequest(number, 2, 10) for number in range(100)]
    batches = stream_chunks(noting, asked, loaders=1, config=ClusterConfig(), workers=1)
    for _ in range(5):
        next(batches)
    assert len(list(tmp_path.iterdir())) < 12
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

    found = list(stream_chunks(dying, BATCHES, loaders=1, config=CONFIG, workers=1))
    assert rows_of(found) == ROWS
    assert (tmp_path / "died").exists()


def test_a_fault_comes_out_as_itself(ray_local: None) -> None:
    """What is wrong with a store must be said as when this process had read it."""

    def broken() -> Load:
        def load(number: int, first: int, stop: int) -> dict[str, np.ndarray]:
            raise DataError("has no rows", where=f"part {number}")

        return load

    with pytest.raises(DataError) as raised:
        list(stream_chunks(broken, BATCHES, loaders=1, config=CONFIG, workers=1))
    assert str(raised.value) == "part 4: has no rows"


def test_what_waits_fits_into_the_object_store(ray_local: None, caplog: pytest.LogCaptureFixture) -> None:
    """Batches that do not fit are spilled to the disk and read again, slower than they were loaded."""
    all_of_it = 1e15
    assert ahead_bytes(ClusterConfig(prefetch_mb=1.5), 2, 10**6, all_of_it) == 1.5e6
    everything = ClusterConfig(prefetch_mb=1e9)
    assert ahead_bytes(everything, 2, 0, 1000) == 1000
    assert caplog.text == ""
    with caplog.at_level("INFO"):
        room = ahead_bytes(everything, 2, 0, all_of_it)
    assert 1e8 < room < 1e11
    assert ahead_bytes(everything, 4, 0, all_of_it) == pytest.approx(room / 2)
    # The batch that is put together takes some of it, perhaps all.
    assert ahead_bytes(everything, 2, 10**7, all_of_it) == pytest.approx(room - 10**7)
    assert "object store" in caplog.text
    assert "WARNING" not in caplog.text
    assert ahead_bytes(everything, 2, 10**12, all_of_it) == 0
    assert "WARNING" in caplog.text
    assert "batches of 1000000 MB" in caplog.text


def test_gpus_that_cannot_be_used_are_refused() -> None:
    """Training on the CPU by accident takes a hundred times as long; NCCL's message names no setting."""
    refuse_unusable([])
    refuse_unusable([Answer("GPU-1"), Answer("GPU-2")])
    with pytest.raises(ConfigError, match="1 of 2 GPUs cannot be used: no kernel image") as raised:
        refuse_unusable([Answer("GPU-1"), Answer("", "no kernel image")])
    assert (raised.value.where, raised.value.exit_code) == ("cluster.use_gpu", 2)
    with pytest.raises(ConfigError, match="would share one GPU, GPU-1") as raised:
        refuse_unusable([Answer("GPU-1"), Answer("GPU-1")])
    assert raised.value.where == "cluster.train_workers"


WITH_A_GPU = """
import json, sys
import ray
from gare.config import parse_config
from gare.errors import ConfigError
from pipelines import train
# Ray believes what it is told of GPUs.
ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, logging_level="error", log_to_driver=False)
try:
    train.run(parse_config(json.loads(sys.argv[1])))
except ConfigError as error:
    sys.exit(f"{error.exit_code} {error}")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU of this machine")
def test_a_gpu_that_is_not_there_ends_with_2(
    benchmark: dict[str, Any], places: Layout, repository: Path
) -> None:
    """It is found before anything of the run is written, and not by the third restart of its workers."""
    config = tiny("train.run=on-a-gpu", "cluster.train_workers=1", "cluster.use_gpu=true")
    done = subprocess.run(
        [sys.executable, "-c", WITH_A_GPU, json.dumps(config.model_dump(mode="json"))],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("2 cluster.use_gpu: 1 of 1 GPUs cannot be used: torch finds none"), last
    assert "Traceback" not in done.stderr
    assert not Path(places.run("on-a-gpu")).exists()


def test_a_worker_without_its_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that joins later may have another driver."""
    import ray.train.torch

    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    assert device_of_worker(resolved_cluster()).type == "cpu"
    with pytest.raises(ConfigError, match="no GPU that torch can use"):
        device_of_worker(resolved_cluster(use_gpu=True))


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

    with pytest.raises(GareError) as raised, explain_out_of_memory(128, 256):
        grow()
    assert raised.value.exit_code == 4
    assert raised.value.where == "train.micro_batch"
    assert said in raised.value.what
    assert "train.micro_batch=64" in raised.value.accepted
    with pytest.raises(GareError) as raised, explain_out_of_memory(1, 1):
        grow()
    assert raised.value.where == "train.batch_size"
    assert "micro_batch" not in raised.value.accepted
