"""Setup of the processes of a local Ray, so that Ray's own threads find it and nothing else."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

from cluster.runtime import local_worker, session
from gare.config import ClusterConfig

PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"http_proxy": "http://proxy:3128"}, "127.0.0.1,localhost"),
        ({"HTTP_PROXY": "http://proxy:3128", "NO_PROXY": "corp.example"}, "corp.example,127.0.0.1,localhost"),
        ({"ALL_PROXY": "socks5://proxy", "no_proxy": "localhost, 10.0.0.1"}, "localhost,10.0.0.1,127.0.0.1"),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "*"}, "*"),
    ],
)
def test_a_proxy_is_not_asked_for_this_machine(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train warned once a second, for hours, that its dashboard did not answer."""
    for name in PROXIES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    local_worker.bypass_proxies()
    assert os.environ.get("no_proxy") == expected
    if expected != "*":
        assert os.environ.get("NO_PROXY") == expected


def test_a_worker_learns_the_address_of_its_own_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two local Rays on a machine: a thread that looks around finds both."""
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.delenv("GARE_LOG_FORMAT", raising=False)
    context = SimpleNamespace(gcs_address="127.0.0.1:6399")
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    # As in a process that cannot import this package.
    set_up = cloudpickle.loads(cloudpickle.dumps(local_worker.local_worker_setup()))
    set_up()
    assert os.environ["RAY_ADDRESS"] == "127.0.0.1:6399"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_local_ray_sets_up_its_workers(log_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A joined cluster's nodes have an environment of their own."""
    monkeypatch.setenv("GARE_LOG_FORMAT", log_format)
    options: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.init", lambda **given: options.append(given))
    session._begin(ClusterConfig(), "")
    session._begin(ClusterConfig(), "10.0.0.1:6379")
    local, joined = (one.get("runtime_env", {}) for one in options)
    assert callable(local["worker_process_setup_hook"])
    is_json = log_format == "json"
    assert joined.get("worker_process_setup_hook") == ("cluster.logs.set_up_worker" if is_json else None)
    assert ("GARE_LOG_FORMAT" in local.get("env_vars", {})) == is_json
