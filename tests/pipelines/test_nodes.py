"""Several nodes: one configuration gives one store and one model, and what cannot fit is refused.

The cluster is Ray's own of several node managers on this machine, each with its own workers and object store.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.layout import Layout, layout
from tests.helpers.pipelines import in_process, losses, tiny
from tests.helpers.stores import stored_values

PATIENCE_S = 500
#: Relative difference of a loss over the workers' other order of sums, in float32.
TOLERANCE = 2e-4

SCRIPT = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from cluster.runtime.resources import extraction_cpus, nodes
from gare.errors import ConfigError
from pipelines import extract, train
from tests.helpers.pipelines import tiny

name, count, overrides = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
head = {"num_cpus": 1, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": 0}
cluster = Cluster(initialize_head=True, head_node_args=head)
for _ in range(count - 1):
    cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, logging_level="warning")
cluster.wait_for_nodes()
config = tiny(f"name={name}", *overrides)
found = {"nodes": len(nodes()), "extraction_cpus": extraction_cpus(config.cluster)}
found["extract"] = extract.run(config)
try:
    train.run(tiny(f"name={name}", *overrides, "cluster.cpus_per_worker=1.25", "cluster.train_workers=1"))
except ConfigError as error:
    found["refused"] = str(error)
found["train"] = train.run(config)
ray.shutdown()
cluster.shutdown()
print(json.dumps(found))
"""


def on_nodes(count: int, places: Layout, repository: Path) -> tuple[dict[str, Any], Layout]:
    """What a cluster of so many nodes of one CPU made: a store, and a run with a worker on each."""
    copied = layout(tiny(f"name=nodes{count}"))
    Path(copied.data).mkdir()
    shutil.copy2(places.manifest, copied.manifest)
    settings = (
        "cluster.train_workers=auto",
        "cluster.placement=strict_spread",
        "cluster.cpus_per_worker=0.5",
    )
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, f"nodes{count}", str(count), *settings, "train.epochs=2"],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found, copied


def assert_same(count: int, places: Layout, repository: Path) -> None:
    found, copied = on_nodes(count, places, repository)
    assert found["nodes"] == count
    assert found["extraction_cpus"] == count
    assert f"the nodes can hold 0: {', '.join(['1 CPU, 0 GPU'] * count)}" in found["refused"]
    assert stored_values(copied.frames) == stored_values(places.frames)
    run = json.loads((Path(copied.run("first")) / "run.json").read_text())
    assert run["mlflow_run_id"] == found["train"]["mlflow_run_id"]
    of_nodes, of_one = losses(copied.run("first")), losses(places.run("short"))
    assert of_nodes.keys() == of_one.keys()
    for name in ("loss/total", "loss/nce_t2v", "loss/nce_v2t", "loss/bottleneck", "train/grad_norm"):
        values = [[value for _, value in points[name]] for points in (of_nodes, of_one)]
        assert len(values[0]) == 6
        np.testing.assert_allclose(*values, rtol=TOLERANCE, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def of_one_node(benchmark: dict[str, Any], places: Layout) -> dict[str, Any]:
    """The same run by one worker on the one node of these tests' Ray."""
    from pipelines import train

    return train.run(tiny("train.run=short", "train.epochs=2", "cluster.train_workers=1"))


def test_two_nodes(of_one_node: dict[str, Any], places: Layout, repository: Path) -> None:
    """A result that depends on where the work was done is none."""
    assert_same(2, places, repository)


def test_a_cluster_that_can_grow(
    benchmark: dict[str, Any], places: Layout, capsys: pytest.CaptureFixture[str], tiny_yaml: str
) -> None:
    """On a cluster that adds nodes when asked, more than there is now must be asked for, not refused."""
    from pipelines import train

    many = ("train.run=grown", "cluster.train_workers=64", "train.batch_size=64", "cluster.wait_s=0")
    settings = ("--config", tiny_yaml, *many, "train.captions_per_video=0")
    refused = in_process(capsys, train.run, *settings, "cluster.max_cpus=40")
    refused.refused(2, "need 48 CPU, the cluster has 2 and can grow to 40")
    waited = in_process(capsys, train.run, *settings, "cluster.max_cpus=48")
    waited.refused(4, "the autoscaler has not added", "CPU", "cluster.wait_s")
    assert not Path(places.run("grown")).exists()


@pytest.mark.cluster
def test_four_nodes(of_one_node: dict[str, Any], places: Layout, repository: Path) -> None:
    """As with two; this many need minutes on a small machine."""
    assert_same(4, places, repository)
