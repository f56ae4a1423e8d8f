"""The README's jobs on a cluster started by hand, with the token that Ray wants: a step, and the night."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from cluster.layout import Layout
from tests.cluster.deploy.support import IN_IMAGE, crontab_lines
from tests.helpers.pipelines import losses, overrides_of, tiny
from tests.helpers.services import free_port
from tests.helpers.waiting import answers, wait_until

RAY = str(Path(sys.executable).with_name("ray"))
UPLOAD_LIMIT_BYTES = 2_000_000


@dataclass(frozen=True)
class Head:
    """A private cluster: the environment in which its commands run, and its own folder."""

    environment: dict[str, str]
    temporary: Path


@pytest.fixture(scope="module")
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
        # Never `ray stop`: it ends every Ray of this machine. Asked to end, ours waits half a minute for its
        # own processes, of which nothing is wanted any more.
        ours = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in ours:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(60)
        psutil.wait_procs(ours, 60)
        shutil.rmtree(temporary, ignore_errors=True)


def wait_for(address: str, token: str, process: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    wait_until(lambda: answers(request), within_s=120, process=process, log=log)


def submit(repository: Path, head: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    def try_once() -> subprocess.CompletedProcess[str] | None:
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
        return None if "No available agent" in done.stderr + done.stdout else done

    done = wait_until(try_once, within_s=120, every_s=1)
    assert done is not None
    return done


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
    # Compiled modules came there by running the job.
    sources = (path for path in uploaded.rglob("*") if "__pycache__" not in path.parts)
    files = {path: path.stat().st_size for path in sources if path.is_file()}
    print(f"uploaded: {len(files)} files of {sum(files.values())} bytes")
    assert (uploaded / "pipelines" / "train.py").exists()
    assert sum(files.values()) < UPLOAD_LIMIT_BYTES

    refused = submit(repository, head, "pipelines/evaluate.py", "--config", "conf/none.yaml")
    assert refused.returncode == 1
    assert "exit code 2" in refused.stdout + refused.stderr
    assert "error: conf/none.yaml" in refused.stdout + refused.stderr


def nightly(
    repository: Path, environment: dict[str, str], logs: Path, *arguments: str
) -> tuple[subprocess.CompletedProcess[bytes], str]:
    """The crontab's script as cron starts it, with other arguments; returns it and the night's log."""
    [line] = crontab_lines()
    script = str(repository / line.split()[5].removeprefix(IN_IMAGE))
    done = subprocess.run(
        [script, *arguments],
        # cron starts in the home folder.
        cwd=logs.parent,
        env=environment | {"GARE_LOGS": str(logs)},
        capture_output=True,
        timeout=300,
        check=False,
    )
    [log] = logs.glob("extract-*.log")
    return done, log.read_text()


def stored(store: str) -> dict[str, dict[str, Any]]:
    """The rows of a store by id, without what tells when and where they were made."""
    rows = pq.read_table(Path(store) / "data").to_pylist()
    return {row["video_id"]: {key: row[key] for key in ("frames", "frame_time_s")} for row in rows}


def test_nightly_job_by_cron_extracts_and_tells_how_it_went(
    head: Head, benchmark: dict[str, Any], places: Layout, repository: Path, tmp_path: Path
) -> None:
    """Else the night's new videos are not in the store in the morning, and no mail says so."""
    logs = tmp_path / "logs"
    settings = overrides_of(tiny("name=nightly"))
    done, log = nightly(repository, head.environment, logs, "--config", "conf/demo.yaml", *settings)
    assert done.returncode == 0, log
    assert (done.stdout, done.stderr) == (b"", b""), "cron would send a mail for a good night"
    assert "ended with status 0" in log
    assert stored(places.frames.replace("/tiny/", "/nightly/")) == stored(places.frames)

    # A fault of the job's own, from inside the cluster, keeps its meaning.
    done, log = nightly(repository, head.environment, logs, "--config", "conf/none.yaml")
    assert done.returncode == 2, log
    assert "error: conf/none.yaml" in log
    assert b"error: conf/none.yaml" in done.stderr, "cron would send no mail for a bad night"

    # Two nights at once: the second leaves the first alone.
    with (logs / "extract.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done, log = nightly(repository, head.environment, logs, "--config", "conf/demo.yaml")
    assert done.returncode == 75
    assert "still running" in log.splitlines()[-1]
    assert b"still running" in done.stderr
    token = head.environment["RAY_AUTH_TOKEN"]
    assert token not in log


def test_nightly_job_without_a_cluster_fails(repository: Path, tmp_path: Path, head: Head) -> None:
    """Else a cluster that is down looks like a night without new videos."""
    away = head.environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{free_port()}"}
    done, log = nightly(repository, away, tmp_path / "logs", "--config", "conf/demo.yaml")
    assert done.returncode == 4, log
    assert "ended with status 4" in log
