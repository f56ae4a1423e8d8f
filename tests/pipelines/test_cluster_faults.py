"""Training on a cluster that loses a node, is told of it in time, or loses its head."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.layout import Layout
from tests.helpers.recovery import (
    Recovery,
    assert_as_undisturbed,
    last_entry,
    recovering,
    remember,
    resumed,
)
from tests.helpers.services import free_port
from tests.pipelines.test_faults import PATIENCE_S, wait_for

pytestmark = [pytest.mark.faults, pytest.mark.long, pytest.mark.timeout(1500)]

NODES = """
import json, subprocess, sys, threading
import ray
from ray.cluster_utils import Cluster
from cluster.layout import layout
from gare.config import parse_config
from pipelines import train
from tests.helpers.recovery import SECONDS, Recovery, last_step, send, training_actors, workers
from tests.pipelines.test_faults import wait_for

how, after, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
config = parse_config(settings)
folder = layout(config).run(config.train.run)
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
ray.init(address=cluster.address, logging_level="warning")
cluster.wait_for_nodes()
events = {}

def strike():
    wait_for(lambda: last_step(folder) >= after)
    # Held meanwhile, so that some of the run is left on any machine.
    held = workers()
    send(held, "suspend")
    # A node with a training worker, the head excepted: that is another test.
    at = {one["Address"]["NodeID"] for one in training_actors()}
    lost = next(node for node in nodes if node.node_id in at)
    if how == "drained":
        drain = ["drain-node", "--address", cluster.address, "--node-id", lost.node_id]
        drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        drain += ["--deadline-remaining-seconds", "120"]
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *drain], check=True)
        threading.Event().wait(2)
        send(held, "resume")
        # Checkpoints are written at the ends of epochs, and now.
        wait_for(lambda: last_step(folder) % 3)
        send(held, "suspend")
    events["saved"] = last_step(folder)
    here = {one["Pid"] for one in training_actors() if one["Address"]["NodeID"] == lost.node_id}
    cluster.remove_node(lost, allow_graceful=False)
    Recovery(f"a node is {how}", folder, events["saved"])
    send([process for process in held if process.pid in here], "kill")
    send([process for process in held if process.pid not in here], "resume")

thread = threading.Thread(target=strike)
thread.start()
result = train.run(config)
thread.join()
ray.shutdown()
cluster.shutdown()
print(json.dumps(result | events | {"seconds": SECONDS}))
"""


def on_nodes(how: str, after: int, repository: Path, **environment: str) -> dict[str, Any]:
    """The result of a run, on a cluster of three nodes of which one is lost."""
    every = "1" if how == "killed" else "0"
    config = recovering(
        f"node-{how}",
        "cluster.cpus_per_worker=1",
        f"train.checkpoint_every_steps={every}",
        "cluster.wait_s=240",
    )
    settings = json.dumps(config.model_dump(mode="json"))
    done = subprocess.run(
        [sys.executable, "-c", NODES, how, str(after), settings],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository)} | environment,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, f"{how} after step {after}: {done.stderr[-5000:]}"
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    remember(result.pop("seconds"))
    return result | {"stderr": done.stderr}


def test_a_killed_node(
    calm: dict[str, Any], places: Layout, root: Path, repository: Path, rng: np.random.Generator
) -> None:
    """Spot machines are taken away without a word: the others go on from the last checkpoint."""
    after = int(rng.integers(1, 30))
    result = on_nodes("killed", after, repository)
    folder = places.run("node-killed")
    steps = resumed(folder)
    assert len(steps) == 1
    assert steps[0] >= after
    assert_as_undisturbed(result, calm, places, root, folder)


def test_a_node_that_is_about_to_be_taken_away(
    calm: dict[str, Any], places: Layout, root: Path, repository: Path
) -> None:
    """With a notice nothing has to be done again but the steps after it: a checkpoint is written at once."""
    result = on_nodes("drained", 3, repository, RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.2")
    assert "is about to be preempted: writing a checkpoint after step" in result["stderr"]
    assert result["saved"] % 3
    folder = places.run("node-drained")
    assert resumed(folder)[0] >= result["saved"]
    assert_as_undisturbed(result, calm, places, root, folder)


class Head:
    """A cluster's head as ``ray start --head`` makes it, on ports of its own."""

    def __init__(self, root: Path) -> None:
        self.log, self.port = root / "lost-head.log", free_port()
        # A short path: it holds sockets.
        self.temporary = Path(f"/tmp/gare-{secrets.token_hex(4)}")
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": f"127.0.0.1:{self.port}",
            # By default a driver waits a minute for a head that is gone.
            "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
        }

    def start(self) -> None:
        """Starts it and waits until a driver could join."""
        command = [
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"),
            *(f"--port={self.port}", f"--dashboard-port={free_port()}", "--num-cpus=2"),
            *(f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=100000000"),
            *(f"--temp-dir={self.temporary}", "--disable-usage-stats"),
        ]
        environment = {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        said = self.log.read_text().count("Ray runtime started")
        assert wait_for(
            lambda: self.log.read_text().count("Ray runtime started") > said,
            lambda: self.process.poll() is None,
        ), self.log.read_text()

    def kill(self) -> None:
        """What a machine that loses power does to it and to all that it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)


def test_a_lost_head(
    calm: dict[str, Any],
    places: Layout,
    repository: Path,
    root: Path,
    tiny_yaml: str,
    rng: np.random.Generator,
) -> None:
    """The cluster itself may be gone in the morning: the same command on a new one goes on."""
    folder, after = places.run("headless"), int(rng.integers(1, 30))
    log, head = root / "headless.log", Head(root)
    overrides = ["train.run=headless", "train.epochs=16", "train.checkpoint_every_steps=1"]
    command = [sys.executable, "pipelines/train.py", "--config", tiny_yaml, *overrides]

    def begin() -> subprocess.Popen[bytes]:
        with log.open("ab") as stderr:
            return subprocess.Popen(
                command, cwd=repository, env=head.environment, stdout=subprocess.PIPE, stderr=stderr
            )

    def there() -> bool:
        entry = last_entry(folder)
        return entry is not None and entry.step >= after

    head.start()
    process = begin()
    try:
        assert wait_for(there, lambda: process.poll() is None), log.read_text()
        head.kill()
        process.communicate(timeout=PATIENCE_S)
        assert process.returncode != 0
        assert not (Path(folder) / "result.json").exists(), "it was done before its head could be lost"
        entry = last_entry(folder)
        assert entry
        Recovery("the head is lost: from a new one's start on", folder, entry.step)
        head.start()
        process = begin()
        answer, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
        head.kill()
        shutil.rmtree(head.temporary, ignore_errors=True)
    assert resumed(folder) == [entry.step]
    assert_as_undisturbed(json.loads(answer.splitlines()[-1]), calm, places, root, folder)
