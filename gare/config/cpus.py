"""Number of CPUs that this process may use: in a container or a Slurm job fewer than the machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def usable_cpus(root: Path = Path("/")) -> int:
    """Returns the number of CPUs that this process may use, at least 1.

    That is the least of the machine's CPUs, the affinity (``taskset``, a cpuset), the quotas of this
    process's control groups and all above them (versions 1 and 2, rounded up), and SLURM_CPUS_PER_TASK.

    Args:
        root: folder below which ``proc`` and ``sys`` are.
    """
    limits = [os.cpu_count() or 1, *_quotas(root)]
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        limits.append(len(os.sched_getaffinity(0)))
    if (slurm := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdecimal():
        limits.append(int(slurm))
    return max(1, min(limits))


def _quotas(root: Path) -> Iterator[int]:
    """Yields the limit of each control group that has one, in whole CPUs."""
    mounts = root / "sys/fs/cgroup"
    for controllers, group in _groups(root / "proc/self/cgroup"):
        if not controllers:
            for mount in (mounts, mounts / "unified"):
                for folder in _with_parents(mount, group):
                    yield from _cpus(*_words(folder / "cpu.max"))
        elif "cpu" in controllers.split(","):
            for mount in (mounts / controllers, mounts / "cpu"):
                for folder in _with_parents(mount, group):
                    quota, period = folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"
                    yield from _cpus(*_words(quota), *_words(period))


def _groups(file: Path) -> Iterator[tuple[str, str]]:
    """Yields the controllers and the path of each control group; no controllers for version 2's."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, colon, group = rest.partition(":")
        if colon:
            yield controllers, group


def _with_parents(mount: Path, group: str) -> Iterator[Path]:
    """Yields the folder of a control group and those above it, up to the mount.

    A container may see its own group at the mount, and the host's path to it in ``/proc``: folders that are
    missing have no limit.
    """
    path = PurePosixPath(group.lstrip("/"))
    for folder in (path, *path.parents):
        if ".." not in folder.parts:
            yield mount / folder


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except (OSError, ValueError):
        return []


def _cpus(*quota_and_period: str) -> Iterator[int]:
    """Yields a quota in microseconds a period as CPUs; nothing without a limit (``max``, -1, no file)."""
    match quota_and_period:
        case [quota, period] if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):
            yield math.ceil(int(quota) / int(period))
