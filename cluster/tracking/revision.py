"""Version of the running code."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def git_revision(folder: str | Path) -> str:
    """Returns the commit of a working copy, with ``-dirty`` if tracked files differ from it.

    ``GARE_GIT_REVISION`` overrides it, for jobs whose copy of the code has no git history.

    Args:
        folder: any folder of the working copy.

    Returns:
        40 hexadecimal digits, maybe with ``-dirty``; ``unknown`` without git or a commit.
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
            # Otherwise status would refresh the index, and wait for a process that is writing it.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
