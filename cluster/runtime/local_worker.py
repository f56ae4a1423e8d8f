"""Sets up processes of a local Ray: its address, the logs, and no proxy on the way to this machine."""

from __future__ import annotations

import os
from collections.abc import Callable

#: Names of this machine that no proxy can reach.
_HERE = ("127.0.0.1", "localhost")


def local_worker_setup() -> Callable[[], None]:
    """Returns a function that tells a worker process the address of its Ray; Ray calls it there.

    Ray Train's own threads ask for the state of actors by an address that they look for themselves. With two
    local Rays on a machine, such as two commands have, they find both, and end with an error.
    """

    # Inside another function it is sent by value. Where a worker cannot import this package, its actors say
    # so; Ray would start processes for ever whose setup it cannot import.
    def set_up() -> None:
        import os

        import ray

        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        if os.environ.get("GARE_LOG_FORMAT") == "json":
            from cluster.logs import set_up_worker

            set_up_worker()

    return set_up


def bypass_proxies() -> None:
    """Has this process and its children reach a local Ray directly where a proxy is set for the web.

    Ray Train's requests to the dashboard would go to the proxy, which refuses them.
    """
    if not any(
        os.environ.get(name) for proxy in ("http_proxy", "all_proxy") for name in (proxy, proxy.upper())
    ):
        return
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    names = [name.strip() for name in given.split(",") if name.strip()]
    if "*" not in names:
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(
            [*names, *(name for name in _HERE if name not in names)]
        )
