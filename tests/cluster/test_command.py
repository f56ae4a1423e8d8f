"""The contract of a pipeline's command line, run as a person runs it: as a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gare.config import describe_keys

COMMAND = """
import logging, sys
from cluster.command import Flag, main
from gare.errors import CheckpointError, ConfigError, DataError, GareError

def run(config):
    '''An example.'''
    logging.getLogger("gare.example").info("progress of %s", config.name)
    print("chatter of a library")
    fault = FAULTS.get(config.train.run)
    if fault is not None:
        raise fault
    if config.train.run == "nan":
        return {"metric": float("nan")}
    if config.train.run == "tensor":
        return {"metric": object()}
    return {"name": config.name, "seeds": config.demo.seeds, "text": "é"}

FAULTS = {
    "config": ConfigError("is wrong", where="train.lr", accepted="a number"),
    "data": DataError("is gone", where="/a/video.mp4"),
    "checkpoint": CheckpointError("is cut", where="/a/best"),
    "run": GareError("MLflow cannot be reached"),
    "bug": ZeroDivisionError("division by zero"),
    "interrupt": KeyboardInterrupt(),
}
FAULTS["told"] = DataError("has faults")
FAULTS["told"].result = {"faults": ["é"]}
flags = {"--seeds": Flag("demo.seeds", "how many"), "--two-seeds": Flag("demo.seeds", "two of them", "2")}
main(run, "An example. 100 % of it.", flags)
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text("name: mine\n")
    return path


def execute(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    lines = done.stdout.splitlines()
    assert len(lines) == 1, done.stdout
    tree: dict[str, Any] = json.loads(lines[0])
    return tree


def test_the_result_is_all_of_stdout(repository: Path, config: Path) -> None:
    """Scripts read stdout; a line of a library's chatter there breaks them."""
    done = execute(repository, "--config", str(config), "--seeds", "3", "name=other")
    assert done.returncode == 0, done.stderr
    assert result_of(done) == {"name": "other", "seeds": 3, "text": "é"}
    assert "progress of other" in done.stderr
    assert "chatter" in done.stderr


def test_a_flag_without_a_value_sets_one(repository: Path, config: Path) -> None:
    """Else ``--verify`` would extract."""
    done = execute(repository, "--config", str(config), "--two-seeds")
    assert done.returncode == 0, done.stderr
    assert result_of(done)["seeds"] == 2


def test_a_check_that_finds_faults_prints_them(repository: Path, config: Path) -> None:
    """A script that reads stdout gets the list of faults, and the exit status says that there are any."""
    done = execute(repository, "--config", str(config), "train.run=told")
    assert done.returncode == 3
    assert result_of(done) == {"faults": ["é"]}
    assert done.stderr.strip().splitlines()[-1] == "error: has faults"


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        ("config", 2, "error: train.lr: is wrong (a number)"),
        ("data", 3, "error: /a/video.mp4: is gone"),
        ("checkpoint", 3, "error: /a/best: is cut"),
        ("run", 4, "error: MLflow cannot be reached"),
        ("bug", 4, "error: ZeroDivisionError: division by zero"),
        ("interrupt", 4, "error: interrupted"),
        ("nan", 4, "error: "),
        ("tensor", 4, "error: "),
    ],
)
def test_exit_status_says_whose_fault_it_was(
    repository: Path, config: Path, fault: str, status: int, said: str
) -> None:
    """A scheduler decides by the status whether to try again; a person reads the last line."""
    done = execute(repository, "--config", str(config), f"train.run={fault}")
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert done.stderr.strip().splitlines()[-1].startswith(said)
    # A trace belongs to faults that nobody foresaw, and to no other.
    assert ("Traceback" in done.stderr) == (fault in ("bug", "nan", "tensor"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--config"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "dmeo"], "own, paper; nearest: demo"),
        (["--config", "demo", "model.clip=auto"], "model.clip: auto"),
        (["--config", "{config}", "--sedes", "3"], "--sedes"),
        (["--config", "{config}", "--seeds", "none"], "demo.seeds"),
        (
            ["--config", "{config}", "--seeds", "3", "--two-seeds"],
            "--seeds and --two-seeds exclude each other",
        ),
        (["--config", "{config}", "train.lr"], "section.key=value"),
        (["--config", "{config}", "train.lrr=1"], "train.lr"),
    ],
)
def test_bad_arguments_are_one_message(
    repository: Path, config: Path, arguments: list[str], said: str
) -> None:
    """A person who mistypes gets a line to act on, not a trace, and nothing has started."""
    done = execute(repository, *(argument.format(config=config) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("error: ")
    assert said in done.stderr
    # Faults of the configuration come one a line below the first.
    assert all(line.startswith("  - ") for line in lines[1:])


def test_help_shows_every_key(repository: Path) -> None:
    """A key that --help leaves out can only be found in the source."""
    done = execute(repository, "--help")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    for key, default, meaning in describe_keys():
        assert f"  {key} = {default}".rstrip() in [line.rstrip() for line in lines], key
        assert f"      {meaning}" in lines, key
    assert "An example. 100 % of it." in lines
    for said in ("the name of one in conf/, such as demo", "extends: FILE", "model.clip=auto"):
        assert said in " ".join(done.stdout.split())


def test_a_shipped_file_goes_by_its_name(repository: Path) -> None:
    """Nobody should have to know where the repository lies to run what it ships."""
    done = execute(repository, "--config", "demo")
    assert done.returncode == 0, done.stderr
    assert result_of(done)["name"] == "demo"
