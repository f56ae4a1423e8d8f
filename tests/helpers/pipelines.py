"""Tiny benchmark and configuration for pipeline tests, and functions that run commands like a user."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.command import Flags, execute
from gare.config import Config, parse_config
from gare.train.checkpoint.history import History

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"benchmark": "synthetic", "num_train": 24, "num_val": 6, "num_test": 10},
    "extract": {
        "sample_fps": 2.0,
        "num_frames": 4,
        "image_size": 32,
        "encoding": "raw",
        "videos_per_part": 8,
    },
    "model": {
        "clip": {
            "image_size": 32,
            "patch_size": 16,
            "vision_width": 32,
            "vision_layers": 1,
            "vision_heads": 2,
            "text_width": 32,
            "text_layers": 1,
            "text_heads": 2,
            "embed_dim": 32,
        },
        "max_words": 24,
        "max_frames": 4,
        "temporal_layers": 1,
        "temporal_heads": 2,
    },
    "train": {
        "run": "first",
        "epochs": 8,
        "batch_size": 8,
        "captions_per_video": 1,
        "clip_lr": 1e-3,
        "lr": 1e-3,
    },
    "cluster": {"num_cpus": 2, "train_workers": 2, "cpus_per_worker": 0.5},
    # They would start a process for each run; test_watching turns them on.
    "tracking": {"system_metrics": False},
}
STEPS = 24  # 8 epochs of 3
#: Data set of the run ``first`` on poisoned labels of test.
POISONED = "name=poisoned"


def tiny(*overrides: str) -> Config:
    """Returns the tiny configuration with ``section.key=value`` overrides; outputs go below GARE_ROOT."""
    return parse_config(TINY, overrides)


def overrides_of(config: Config) -> list[str]:
    """Returns every key of a configuration as an override, so that no value of a file remains."""

    def flatten(tree: Mapping[str, Any], prefix: str) -> list[str]:
        lines: list[str] = []
        for key, value in tree.items():
            if isinstance(value, Mapping):
                lines += flatten(value, f"{prefix}{key}.")
            else:
                lines.append(f"{prefix}{key}={value if isinstance(value, str) else json.dumps(value)}")
        return lines

    return flatten(config.model_dump(mode="json"), "")


@dataclass(frozen=True)
class Answer:
    """Result of a command: exit status and both streams."""

    status: int
    stdout: str
    stderr: str

    def refused(self, status: int, *words: str) -> None:
        """Asserts one clear message with these words, no trace and an empty stdout."""
        assert self.status == status, self.stderr
        assert self.stdout == ""
        assert "Traceback" not in self.stderr
        messages = re.findall(r"^error: ", self.stderr, re.MULTILINE)
        assert len(messages) == 1, self.stderr
        message = self.stderr[self.stderr.index("error: ") :]
        for word in words:
            assert word in message


def in_process(
    capsys: pytest.CaptureFixture[str],
    run: Callable[[Config], Mapping[str, Any]],
    *arguments: str,
    flags: Flags | None = None,
) -> Answer:
    """Runs a command as ``main`` does, in this process, which shares the tests' Ray."""
    capsys.readouterr()
    # With pytest's handlers, the command would not add its own.
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        status = execute(run, "", arguments, flags or {})
    finally:
        logging.getLogger().removeHandler(handler)
    return Answer(status, *capsys.readouterr())


def command(repository: Path, step: str, arguments: Sequence[str], **environment: str) -> Answer:
    """Runs ``python pipelines/STEP.py`` as a process of its own."""
    done = subprocess.run(
        [sys.executable, f"pipelines/{step}.py", *arguments],
        cwd=repository,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def losses(run_folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Returns the points of every loss by name, from a run's record."""
    steps = History.read(f"{run_folder}/history.json").steps
    return {name: points for name, points in steps.items() if not name.startswith("time/")}


def snapshot(folder: str | Path) -> dict[str, tuple[bytes, int]]:
    """Returns content and modification time of every file below a folder."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(files)
    }
