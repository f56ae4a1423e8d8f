"""A training that goes on with fewer workers where a node is lost, and with all of them once it is back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.layout import Layout
from tests.helpers.pipelines import losses, tiny
from tests.helpers.recovery import remember
from tests.pipelines.test_faults import PATIENCE_S

pytestmark = [pytest.mark.faults, pytest.mark.long, pytest.mark.timeout(1500)]

#: Relative difference of a loss over the workers' other order of sums, in float32, after so many steps.
TOLERANCE = 1e-3
EPOCHS = 200

SCRIPT = """
import json, signal, sys, threading
import ray
from ray.cluster_utils import Cluster
from cluster.layout import layout
from gare.config import parse_config
from pipelines import train
from tests.helpers.recovery import SECONDS, Recovery, last_step, send, training_actors, workers
from tests.pipelines.test_faults import wait_for

after, config = int(sys.argv[1]), parse_config(json.loads(sys.argv[2]))
folder = layout(config).run(config.train.run)
# Too small for a worker.
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
ray.init(address=cluster.address, logging_level="warning")
cluster.wait_for_nodes()

def strike():
    assert wait_for(lambda: last_step(folder) >= after)
    held = workers()
    send(held, "suspend")
    lost = nodes[0]
    here = {one["Pid"] for one in training_actors() if one["Address"]["NodeID"] == lost.node_id}
    assert len(here) == 1, here
    cluster.remove_node(lost, allow_graceful=False)
    send([process for process in held if process.pid in here], "kill")
    send([process for process in held if process.pid not in here], "resume")
    saved = last_step(folder)
    Recovery("a node is killed, elastic: to go on with fewer", folder, saved)
    assert wait_for(lambda: last_step(folder) > saved + 3)
    print("went on with", len(training_actors()), file=sys.stderr)
    signal.signal = lambda *_: None  # a node wants one, which a thread cannot have
    cluster.add_node(num_cpus=2)
    # Linux ends what a thread has started with the thread.
    done.wait()

done = threading.Event()
thread = threading.Thread(target=strike, daemon=True)
thread.start()
result = train.run(config)
done.set()
thread.join(60)
ray.shutdown()
cluster.shutdown()
print(json.dumps(SECONDS))
"""


def settings(run: str, *overrides: str) -> Any:
    return tiny(
        *(f"train.run={run}", f"train.epochs={EPOCHS}", "train.checkpoint_every_steps=1"),
        # So small that rounding stays rounding over all these steps.
        *("train.clip_lr=1e-4", "train.lr=1e-4", "model.increment_dropout=0.3"),
        *("train.max_failures=3", *overrides),
    )


def test_fewer_workers_make_the_same_run(
    benchmark: dict[str, Any], places: Layout, repository: Path, rng: np.random.Generator
) -> None:
    """The negatives are those of the global batch, whoever computes it: no loss may tell how many did."""
    from pipelines import train

    after = int(rng.integers(5, 30))
    config = settings(
        "elastic",
        *("cluster.train_workers=2", "cluster.min_workers=1", "cluster.cpus_per_worker=1.5"),
        *("cluster.resize_every_s=3", "cluster.wait_s=240"),
    )
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(after), json.dumps(config.model_dump(mode="json"))],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository), "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"},
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, f"after step {after}: {done.stderr[-5000:]}"
    assert "went on with 1" in done.stderr
    remember(json.loads(done.stdout.splitlines()[-1]))
    train.run(settings("fixed", "cluster.train_workers=1"))
    elastic, fixed = losses(places.run("elastic")), losses(places.run("fixed"))
    workers = [int(value) for _, value in elastic.pop("train/workers")]
    assert [number for number, _ in groupby(workers)] == [2, 1, 2], done.stderr[-5000:]
    assert elastic.keys() == fixed.keys()
    for name in ("loss/total", "loss/nce_t2v", "loss/nce_v2t", "loss/bottleneck", "loss/direction"):
        steps, values = zip(*elastic[name], strict=True)
        expected_steps, expected = zip(*fixed[name], strict=True)
        assert steps == expected_steps
        np.testing.assert_allclose(values, expected, rtol=TOLERANCE, atol=1e-4, err_msg=name)
