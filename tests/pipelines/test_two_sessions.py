"""Two commands on one machine, each with a Ray of its own, behind a proxy for the web."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

#: What Ray's helpers print that have found another command's Ray, or a proxy in place of their own.
COMPLAINTS = ("Traceback", "multiple active Ray instances", "Failed to query", "Unhandled error")


def test_two_trainings_side_by_side_print_no_trace(
    benchmark: dict[str, Any], root: Path, repository: Path, tiny_yaml: str
) -> None:
    """Both printed 25 lines of a trace, and what frees their workers' places when they are killed was dead.

    This process's Ray is the third. Nothing listens at the proxy's address.
    """
    environment = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    environment |= {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    started = {
        name: subprocess.Popen(
            [
                *(sys.executable, "pipelines/train.py", "--config", tiny_yaml, f"train.run={name}"),
                *("train.epochs=4", "cluster.train_workers=1", "cluster.loaders_per_worker=1"),
            ],
            cwd=repository,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("left", "right")
    }
    outputs = {name: process.communicate(timeout=300) for name, process in started.items()}
    for name, (stdout, stderr) in outputs.items():
        assert started[name].returncode == 0, stderr
        assert json.loads(stdout)["run"] == name
        assert not [complaint for complaint in COMPLAINTS if complaint in stderr], stderr
