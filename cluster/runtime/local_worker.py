"""Sets up processes of a local Ray: its address, the logs, and no proxy on the way to this machine."""

from __future__ import annotations

import os

from cluster.logs import FORMAT_VARIABLE, set_up_worker

#: Names of this machine that no proxy can reach.
_HERE = ("127.0.0.1", "localhost")


def set_up_local_worker() -> None:
    """Tells a worker process the address of its Ray; called by Ray when the process starts.

    Ray Train's own threads ask for the state of actors by an address that they look for themselves. With two
    local Rays on a machine, such as two commands have, they find both, and end with an error.
    """
    import ray

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    if os.environ.get(FORMAT_VARIABLE) == "json":
        set_up_worker()


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
