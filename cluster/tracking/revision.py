"""The version of the code that ran."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def git_revision(folder: str | Path) -> str:
    """The commit of a working copy, with ``-dirty`` where tracked files differ from it.

    ``GARE_GIT_REVISION`` overrides it, for jobs whose copy of the code comes without its history.

    Args:
        folder: any folder of the working copy.

    Returns:
        40 hexadecimal digits, maybe with ``-dirty``; ``unknown`` where there is no git or no commit.
    """
    override = os.environ.get("GARE_GIT_REVISION", "").strip()
    if override:
        return override
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if not commit:
        return "unknown"
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def _git(folder: str | Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            # Status would otherwise refresh the index, and wait for whoever is writing it.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
