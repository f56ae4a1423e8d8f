"""Who can be reached from where while a pipeline runs on a machine of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

LISTENERS = """
import json, os, sys
import psutil
from cluster.runtime.session import ray_session
from gare.config import parse_config

with ray_session(parse_config({"cluster": {"num_cpus": 1}}).cluster):
    import ray

    @ray.remote
    class Worker:
        def ready(self):
            return True

    worker = Worker.remote()
    assert ray.get(worker.ready.remote())
    me = psutil.Process()
    found = [
        (" ".join(process.cmdline())[:200], connection.laddr.ip)
        for process in [me, *me.children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
print(json.dumps(found))
"""


def test_a_local_session_listens_on_this_machine_alone(repository: Path, root: Path) -> None:
    """Ray runs whatever it is sent: on a shared machine or a laptop in a café nobody else may reach it."""
    without = ("RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    done = subprocess.run(
        [sys.executable, "-c", LISTENERS],
        cwd=repository,
        env={name: value for name, value in os.environ.items() if name not in without}
        | {"PYTHONPATH": str(repository), "RAY_raylet_start_wait_time_s": "240"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    named = " ".join(command for command, _ in found)
    # GCS, raylet, dashboard, agents, worker and driver: else the test looks at too little.
    assert len(found) >= 8
    for process in ("gcs_server", "raylet", "dashboard", "DashboardAgent", "RuntimeEnvAgent", "ray::Worker"):
        assert process in named, named
    assert {ip.removeprefix("::ffff:") for _, ip in found} <= {"127.0.0.1", "::1"}, found


def test_the_ui_listens_on_this_machine_alone(repository: Path) -> None:
    """MLflow has no accounts: whoever reaches it reads, changes and deletes all runs."""
    done = subprocess.run(["make", "-n", "ui"], cwd=repository, capture_output=True, text=True, check=True)
    [line] = [line for line in done.stdout.splitlines() if "mlflow ui" in line]
    assert "--host 127.0.0.1 " in line
