"""Odd surroundings of a command, such as an encoding or no home: one message, or it works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.layout import layout
from cluster.runtime import session
from cluster.runtime.session import ray_session
from cluster.tracking import connect
from gare.config import parse_config
from gare.errors import ConfigError

PREPARE = ("data.benchmark=synthetic", "data.num_train=2", "data.num_val=1", "data.num_test=2")


def prepare(repository: Path, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "own.yaml").write_text("name: own\n")
    return subprocess.run(
        [sys.executable, "pipelines/prepare.py", "--config", str(tmp_path / "own.yaml"), *PREPARE],
        cwd=repository,
        env={"GARE_ROOT": str(tmp_path / "root"), **os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_result_that_stdout_cannot_encode_has_escapes(repository: Path, tmp_path: Path) -> None:
    """All work was done, and then the command ended with a trace and status 1."""
    root = tmp_path / "für 日本"
    done = prepare(repository, tmp_path, PYTHONIOENCODING="ascii", GARE_ROOT=str(root))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["manifest"] == f"{root}/own/manifest.parquet"
    assert done.stdout.isascii()


def test_another_module_of_the_same_name_is_not_taken(repository: Path, tmp_path: Path) -> None:
    """PYTHONPATH is set for another project, which has a cluster.py."""
    for name in ("cluster", "gare", "pipelines"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    done = prepare(repository, tmp_path, PYTHONPATH=str(tmp_path), GARE_ROOT=str(tmp_path / "root"))
    assert done.returncode == 0, done.stderr


def test_a_temporary_folder_whose_name_is_too_long_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's advice was about a machine that is too busy; its sockets have names of 107 bytes at most."""
    monkeypatch.setattr("ray.init", lambda **_: None)
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    session._begin(parse_config({}).cluster, "")
    monkeypatch.setenv("TMPDIR", "/" + "t" * 97)
    with pytest.raises(ConfigError, match=r"TMPDIR: is 98 bytes long.*RAY_TMPDIR=/tmp"):
        session._begin(parse_config({}).cluster, "")
    session._begin(parse_config({}).cluster, "10.0.0.1:6379")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    session._begin(parse_config({}).cluster, "")


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No HOME, and a user whom passwd does not know."""

    def unknown(_: object) -> None:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_a_path_below_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default root is below the home folder."""
    monkeypatch.delenv("GARE_ROOT", raising=False)
    with pytest.raises(ConfigError, match=r"~/\.gare: is below a home folder .*GARE_ROOT"):
        layout(parse_config({}))
    assert layout(parse_config({"storage": {"root": "/data"}})).root == "/data"


@pytest.mark.usefixtures("homeless")
def test_what_needs_a_home_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow and Ray end with a trace of their own."""
    config = parse_config({})
    with pytest.raises(ConfigError, match=r"HOME: is not set, .*a folder of your own"):
        connect(config.tracking, str(tmp_path))
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("it was started"))
    with pytest.raises(ConfigError, match="HOME: is not set"), ray_session(config.cluster):
        pytest.fail("it was started")
