"""What a run tells of itself: its profile, the nodes' system metrics, and what automatic settings came to."""

from __future__ import annotations

import gzip
import json
import threading
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from cluster.layout import Layout
from cluster.tracking import connect, resolve_tracking_uri, system_metrics
from gare.report.pictures import LINES
from tests.helpers.pictures import count_colour, pixels_of
from tests.helpers.pipelines import losses, tiny


@pytest.fixture(scope="module")
def store(root: Path, trained: dict[str, Any]) -> Any:
    return mlflow.MlflowClient(resolve_tracking_uri("sqlite:///mlflow.db", str(root)))


def test_a_profile_is_among_the_artifacts(watched: dict[str, Any], store: Any, tmp_path: Path) -> None:
    """Where the seconds went must be found in the UI, beside the run's curves."""
    folder = Path(store.download_artifacts(watched["mlflow_run_id"], "profile", str(tmp_path)))
    assert {path.name for path in folder.iterdir()} == {
        "profile.json",
        "profile.png",
        "profile.txt",
        "trace.json.gz",
    }
    found = json.loads((folder / "profile.json").read_text())
    assert len(found["by_step"]) == watched["steps"]
    assert found["steps"] == watched["steps"] - len(found["left_out"])
    assert {"data_wait", "normalise", "towers", "head", "backward", "optimizer"} <= set(found["mean_s"][0])
    assert json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    text = (folder / "profile.txt").read_text()
    assert "slowest worker" in text
    # Raw frames: read, and brought to the device.
    assert found["loading_s"]["fetch"] > 0
    assert found["loading_s"]["jpeg"] == 0
    assert found["loading_s"]["augment"] < found["loading_s"]["fetch"]
    assert "loading a batch took, beside the steps" in text
    drawn = pixels_of((folder / "profile.png").read_bytes())
    assert min(count_colour(drawn, colour) for colour in LINES[:3]) > 50


def test_watching_changes_nothing(watched: dict[str, Any], places: Layout) -> None:
    """A run that learns otherwise when it is looked at cannot be looked at; one worker is as two."""
    plain, found = losses(places.run("first")), losses(places.run("watched"))
    for name in ("loss/total", "train/grad_norm"):
        np.testing.assert_allclose(
            [value for _, value in found[name]], [value for _, value in plain[name]], rtol=2e-4, atol=1e-5
        )


def test_automatic_settings_are_logged_as_what_they_came_to(watched: dict[str, Any], store: Any) -> None:
    """Runs on 1 and on 8 workers that both say ``auto`` cannot be compared."""
    run = store.get_run(watched["mlflow_run_id"]).data
    assert run.params["cluster.train_workers"] == run.tags["world_size"] == "1"
    assert run.params["cluster.use_gpu"] == "False"
    assert float(run.params["cluster.cpus_per_worker"]) == 1.0
    assert run.params["cluster.loaders_per_worker"] == "1"
    assert run.tags["ray.job"] != "none"


def test_system_metrics_of_the_node(watched: dict[str, Any], trained: dict[str, Any], store: Any) -> None:
    """A node that swaps or idles is seen in the UI; off, nothing of it is there."""
    of_node: dict[str, set[str]] = {}
    for name in store.get_run(watched["mlflow_run_id"]).data.metrics:
        if name.startswith("system/"):
            _, node, metric = name.split("/")
            of_node.setdefault(node, set()).add(metric)
    assert len(of_node) == 1
    (metrics,) = of_node.values()
    assert {"cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage"} <= metrics
    assert {"network_receive_megabytes", "network_transmit_megabytes"} <= metrics
    assert not [name for name in store.get_run(trained["mlflow_run_id"]).data.metrics if "system/" in name]


def test_system_metrics_go_on_where_they_were(trained: dict[str, Any], root: Path, store: Any) -> None:
    """A resumed run whose samples start at 0 again draws its curve twice over itself."""
    config = tiny("tracking.system_metrics=true", "tracking.system_metrics_every_s=0.1").tracking
    handle = connect(config, str(root)).start_run("sampled")

    def samples() -> list[Any]:
        names = [
            name
            for name in store.get_run(handle.run_id).data.metrics
            if name.endswith("cpu_utilization_percentage")
        ]
        return store.get_metric_history(handle.run_id, names[0]) if names else []

    for _ in range(2):
        before = len(samples())
        with system_metrics(handle, config):
            deadline = time.monotonic() + 240
            while len(samples()) < before + 3 and time.monotonic() < deadline:
                threading.Event().wait(0.1)
    after = len(samples())
    assert after >= 6
    assert sorted(sample.step for sample in samples()) == list(range(after))
    handle.finish()
    assert len(samples()) == after


def test_a_store_that_is_lost_does_not_end_the_run(trained: dict[str, Any], root: Path) -> None:
    """Nobody's training may end for want of a curve of its memory."""
    config = tiny("tracking.system_metrics=true", "tracking.system_metrics_every_s=0.1").tracking
    handle = connect(config, str(root)).start_run("lost")
    lost = type(handle)("sqlite:////nowhere/at/all.db", handle.experiment_id, handle.run_id)
    with system_metrics(lost, config):
        threading.Event().wait(0.5)
    handle.finish()
