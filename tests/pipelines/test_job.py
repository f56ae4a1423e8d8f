"""The README's job: a cluster started by hand, with the token that Ray wants, and a submitted script."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Layout
from tests.pipelines.support import losses, overrides_of, tiny

RAY = str(Path(sys.executable).with_name("ray"))
UPLOAD_LIMIT_BYTES = 2_000_000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Head:
    """A private cluster: the environment in which its commands run, and its own folder."""

    environment: dict[str, str]
    temporary: Path


@pytest.fixture
def head(root: Path) -> Iterator[Head]:
    """A cluster as ``ray start --head`` makes it."""
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "GARE_ROOT": str(root),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    dashboard = free_port()
    # A short path: it holds sockets.
    temporary = Path(f"/tmp/gare-{secrets.token_hex(4)}")
    log = root / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                RAY,
                "start",
                "--head",
                "--block",
                f"--port={free_port()}",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={dashboard}",
                # Two clusters on one machine: without an agent of its own this one takes no jobs.
                f"--dashboard-agent-listen-port={free_port()}",
                "--num-cpus=2",
                "--object-store-memory=100000000",
                f"--temp-dir={temporary}",
                "--disable-usage-stats",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=root,
            env=environment,
        )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        wait_for(address, environment["RAY_AUTH_TOKEN"], process, log)
        yield Head(environment | {"RAY_API_SERVER_ADDRESS": address}, temporary)
    finally:
        # Never `ray stop`: it ends every Ray of this machine.
        process.terminate()
        process.wait(60)
        shutil.rmtree(temporary, ignore_errors=True)


def wait_for(address: str, token: str, process: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5):
            return
        time.sleep(0.2)
    pytest.fail(f"the cluster does not answer: {log.read_text()}")


def submit(repository: Path, head: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(
            [RAY, "job", "submit", "--working-dir", ".", "--", "python", *arguments],
            cwd=repository,
            env=head.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        # The cluster answers some seconds before it takes jobs.
        if "No available agent" not in done.stderr + done.stdout or time.monotonic() > deadline:
            return done
        time.sleep(1)


def test_job_does_what_the_plain_command_does(
    head: Head, trained: dict[str, Any], places: Layout, repository: Path
) -> None:
    """Whoever has a cluster must get the result of the laptop, and find its outputs beside the others."""
    settings = overrides_of(tiny("train.run=job"))
    done = submit(repository, head, "pipelines/train.py", "--config", "conf/demo.yaml", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    result = json.loads(lines[-1])
    assert result == json.loads(Path(places.run("job"), "result.json").read_text())
    assert losses(places.run("job")) == losses(places.run("first"))
    assert result["loss"] == trained["loss"]

    [uploaded] = head.temporary.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    files = {path: path.stat().st_size for path in uploaded.rglob("*") if path.is_file()}
    print(f"uploaded: {len(files)} files of {sum(files.values())} bytes")
    assert (uploaded / "pipelines" / "train.py").exists()
    assert sum(files.values()) < UPLOAD_LIMIT_BYTES

    refused = submit(repository, head, "pipelines/evaluate.py", "--config", "conf/none.yaml")
    assert refused.returncode == 1
    assert "exit code 2" in refused.stdout + refused.stderr
    assert "error: conf/none.yaml" in refused.stdout + refused.stderr
