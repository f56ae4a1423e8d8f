"""Training when the disk, the store or the cluster fails: it is said clearly, and continued without loss."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import psutil
import pytest
import ray

from cluster.layout import Layout, layout
from cluster.tracking import resolve_tracking_uri
from gare.storage.files import read_json
from gare.storage.run_folder import RunFolder
from gare.train.checkpoint.index import Checkpoints
from pipelines import train
from tests.helpers.pipelines import in_process, losses, tiny
from tests.helpers.recovery import Recovery, assert_as_undisturbed, last_entry, resumed, send, workers
from tests.helpers.servers import DroppingProxy
from tests.pipelines.test_faults import PATIENCE_S, wait_for

pytestmark = pytest.mark.faults


def tracking(root: Path) -> str:
    """The tests' MLflow database, for a run whose storage is elsewhere."""
    return f"tracking.uri=sqlite:////{str(root / 'mlflow.db').lstrip('/')}"


def test_a_driver_that_is_told_to_end(
    calm: dict[str, Any],
    places: Layout,
    repository: Path,
    root: Path,
    tiny_yaml: str,
    rng: np.random.Generator,
) -> None:
    """SIGTERM is how schedulers preempt: what was learned until then is written before the job is gone."""
    folder, after = places.run("told"), int(rng.integers(1, 30))
    log = root / "told.log"
    overrides = ["train.run=told", "train.epochs=16"]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "pipelines/train.py", "--config", tiny_yaml, *overrides],
            cwd=repository,
            env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    held: list[psutil.Process] = []
    try:

        def there() -> bool:
            entry = last_entry(folder)
            return entry is not None and entry.step >= after

        assert wait_for(there, lambda: process.poll() is None), log.read_text()
        # Held until they have been asked, so that some of the run is left on any machine.
        held = workers()
        send(held, "suspend")
        process.terminate()
        assert wait_for(lambda: Path(RunFolder(folder).stop).exists(), lambda: process.poll() is None)
        send(held, "resume")
        status = process.wait(PATIENCE_S)
    finally:
        send(held, "resume")
        process.kill()
        process.wait()
    said = log.read_text()
    assert status == 4, said
    entry = last_entry(folder)
    assert entry
    assert f"stopped by SIGTERM after step {entry.step} of 48, and a checkpoint written" in said
    assert "the same command continues there" in said
    assert "Traceback" not in said.split("error: ")[-1]
    client = mlflow.MlflowClient(resolve_tracking_uri("sqlite:///mlflow.db", str(root)))
    run_id = json.loads((Path(folder) / "run.json").read_text())["mlflow_run_id"]
    assert client.get_run(run_id).info.status == "KILLED"
    Recovery("the driver gets SIGTERM: from the same command on", folder, entry.step)
    result = train.run(tiny(*overrides))
    assert resumed(folder) == [entry.step]
    assert_as_undisturbed(result, calm, places, root, folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own; only root can mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200m", "gare-test", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> None:
    """Takes all the space that is left, as other people's files do."""
    with (folder / "filler").open("wb") as file:
        block = bytes(1 << 20)
        try:
            while True:
                file.write(block)
                file.flush()
        except OSError:
            return


def test_a_full_disk(
    calm: dict[str, Any],
    places: Layout,
    root: Path,
    tiny_yaml: str,
    small_disk: Path,
    rng: np.random.Generator,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The disk that fills up in the night costs the steps since the last checkpoint, and says so."""
    own = layout(tiny(f"storage.root={small_disk}"))
    Path(own.data).mkdir()
    shutil.copy2(places.manifest, own.manifest)
    shutil.copytree(places.frames, own.frames)
    arguments = [
        *(f"storage.root={small_disk}", tracking(root), "train.run=full"),
        *("train.epochs=16", "train.checkpoint_every_steps=1"),
    ]
    folder, after = own.run("full"), int(rng.integers(3, 30))
    over = threading.Event()

    def strike() -> None:
        def there() -> bool:
            entry = last_entry(folder)
            return entry is not None and entry.step >= after

        if wait_for(there, lambda: not over.is_set()):
            fill(small_disk)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        answer = in_process(capsys, train.run, "--config", tiny_yaml, *arguments)
    finally:
        over.set()
        thread.join()
    entry = last_entry(folder)
    assert entry
    assert entry.step >= after
    assert answer.status == 4, answer.stderr
    assert answer.stdout == ""
    # Ray's processes may say more before it.
    [message] = re.findall(r"^error: (.*)$", answer.stderr, re.MULTILINE)
    for words in (
        "No space left on device",
        f"{own.data}/runs/full",
        f"the same command then continues from step {entry.step}, whose checkpoint is kept",
    ):
        assert words in message
    (small_disk / "filler").unlink()
    Recovery("the disk is full: from the same command on", folder, entry.step)
    result = train.run(tiny(*arguments))
    assert resumed(folder) == [entry.step]
    assert_as_undisturbed(result, calm, places, root, folder)


def test_a_store_that_fails_for_a_while(
    calm: dict[str, Any],
    places: Layout,
    root: Path,
    s3: Any,
    s3_proxy: DroppingProxy,
    rng: np.random.Generator,
) -> None:
    """Object stores answer 503 under load: checkpoints wait for them, training does not."""
    config = tiny(
        *("storage.root=s3://videos/root", tracking(root), "train.run=away"),
        *("train.epochs=16", "train.checkpoint_every_steps=1"),
    )
    own = layout(config)
    for file in [Path(places.manifest), *(path for path in Path(places.frames).rglob("*") if path.is_file())]:
        s3.upload_file(str(file), "videos", f"root/tiny/{file.relative_to(places.data)}")
    folder, after = own.run("away"), int(rng.integers(1, 20))
    events: list[int] = []
    over = threading.Event()

    def strike() -> None:
        def there() -> bool:
            entry = last_entry(folder)
            return entry is not None and entry.step >= after

        if wait_for(there, lambda: not over.is_set()):
            s3_proxy.refuse("/checkpoints/")
            wait_for(lambda: s3_proxy.refused >= 4, lambda: not over.is_set())
            events.append(s3_proxy.refused)
            s3_proxy.refuse("")

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        result = train.run(config)
    finally:
        over.set()
        thread.join()
        s3_proxy.refuse("")
    assert events
    assert events[0] >= 4
    # Neither a restart nor a step that was done twice.
    assert read_json(f"{folder}/history.json")["resumed"] == []
    assert losses(folder) == losses(places.run("calm"))
    assert result["val/t2v/R1"] == calm["val/t2v/R1"]
    assert [entry.step for entry in Checkpoints(f"{folder}/checkpoints").entries()][-1] == 48
