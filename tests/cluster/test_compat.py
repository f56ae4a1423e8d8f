"""Private interfaces of libraries that are used: what vanishes with a new version must be seen here first."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from pathlib import Path

import pytest

#: Library → version in which they were seen, and what is used: of Ray in ``cluster.runtime._compat``, of
#: urllib3 in ``cluster.sources.web`` and of MLflow in ``cluster.tracking.client``.
USED = {
    "ray": (
        "2.60",
        [
            "ray._private.state:state.get_max_resources_from_cluster_config",
            "ray._private.services:canonicalize_bootstrap_address",
        ],
    ),
    "ray data": (
        "2.60",
        ["ray.data.extensions:ArrowPythonObjectArray.from_objects", "ray.data._internal.progress:"],
    ),
    "urllib3": ("2.", ["urllib3.connection:HTTPConnection._new_conn"]),
    "mlflow": (
        "3.",
        [
            "mlflow.store.tracking.sqlalchemy_store:SqlAlchemyStore",
            "mlflow.utils.credentials:get_default_host_creds",
            "mlflow.utils.rest_utils:http_request",
            "mlflow.system_metrics.system_metrics_monitor:SystemMetricsMonitor",
        ],
    ),
}


@pytest.mark.parametrize(
    ("library", "place"), [(name, one) for name, (_, all) in USED.items() for one in all]
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_used_is_there(library: str, place: str) -> None:
    """A cluster that fails after an upgrade, in the middle of the night, would be the first to tell."""
    module, _, names = place.partition(":")
    found = importlib.import_module(module)
    for name in filter(None, names.split(".")):
        found = getattr(found, name)
    assert version(library.split()[0]).startswith(USED[library][0])


def test_a_connection_has_the_name_that_is_resolved() -> None:
    """Without it no address could be looked at before it is connected to."""
    from urllib3.connection import HTTPConnection

    assert HTTPConnection("example.org")._dns_host == "example.org"


def test_ray_is_reached_privately_in_one_place(repository: Path) -> None:
    """The next upgrade would forget uses that are spread over the tree."""
    users = [
        path.relative_to(repository).as_posix()
        for room in ("gare", "cluster", "pipelines")
        for path in sorted((repository / room).rglob("*.py"))
        if "ray._private" in (text := path.read_text("utf-8")) or "ray.data._internal" in text
    ]
    assert users == ["cluster/runtime/_compat.py"]
