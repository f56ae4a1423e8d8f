"""CPUs that may be used: a container of four CPUs on a machine of 128 must not start 128 decoders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.runtime import session
from gare.config import ClusterConfig
from gare.config.cpus import usable_cpus

MACHINE = 128


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 128 CPUs, all of which this process may run on."""
    monkeypatch.setattr(os, "cpu_count", lambda: MACHINE)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(MACHINE)), raising=False)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)


def _files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1 = "/sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, MACHINE, id="no control groups"),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, MACHINE, id="no limit"
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4, id="version 2"
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2, id="rounded up"
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "20000 100000\n"}, 1, id="at least one"
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/kubepods/pod1/box\n",
                "sys/fs/cgroup/kubepods/pod1/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/kubepods/pod1/box/cpu.max": "max 100000\n",
            },
            3,
            id="limit of a parent",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "12:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n",
                # A container's own group is its mount's root; the host's path to it is not there.
                f"{V1[1:]}/cpu.cfs_quota_us": "600000\n",
                f"{V1[1:]}/cpu.cfs_period_us": "100000\n",
            },
            6,
            id="version 1 in a container",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "1:cpu:/slurm/job\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/slurm/job/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu/slurm/job/cpu.cfs_period_us": "50000\n",
            },
            5,
            id="version 1 of a job",
        ),
        pytest.param(
            {"proc/self/cgroup": "nonsense\n0::/../x\n", "sys/fs/cgroup/cpu.max": "many 0\n"},
            MACHINE,
            id="files of another form",
        ),
    ],
)
def test_quotas_of_control_groups(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    """Docker and Kubernetes limit CPUs by a quota, which os.cpu_count does not know."""
    assert usable_cpus(_files(tmp_path, files)) == expected


def test_affinity_and_slurm_count_whichever_is_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``taskset`` and a Slurm job each give away a part of the machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert usable_cpus(tmp_path) == 3
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    assert usable_cpus(tmp_path) == 2
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "9")
    assert usable_cpus(tmp_path) == 3
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "x")
    assert usable_cpus(tmp_path) == 3


def test_a_local_ray_counts_the_cpus_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Actors and decoders are made for each CPU that Ray is told of."""
    started = {}
    monkeypatch.setattr("ray.init", lambda **options: started.update(options))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    session._begin(ClusterConfig(), "")
    assert started["num_cpus"] == 3
    session._begin(ClusterConfig(num_cpus=7), "")
    assert started["num_cpus"] == 7, "what is asked for is given"


def test_threads_of_a_command_keep_to_the_cpus_that_may_be_used(tmp_path: Path) -> None:
    """128 threads on four CPUs wait for each other."""
    (tmp_path / "own.yaml").write_text("name: own\n")
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "--config", str(tmp_path / "own.yaml")],
        env=os.environ | {"OMP_NUM_THREADS": "4", "SLURM_CPUS_PER_TASK": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"torch": 1, "arrow": 1}


COMMAND = """
import pyarrow, torch
from cluster.command import main

main(lambda config: {"torch": torch.get_num_threads(), "arrow": pyarrow.cpu_count()}, "")
"""
