"""Starts or joins Ray, and unwraps our errors from Ray's."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from cluster.logs import runtime_env
from cluster.runtime._compat import PROGRESS_LOGGER
from cluster.runtime.address import check_cluster
from cluster.runtime.local_worker import bypass_proxies, local_worker_setup
from cluster.runtime.resources import cluster_address, object_store_bytes
from cluster.runtime.signals import handlers_kept, shielded
from gare.config import ClusterConfig
from gare.config.cpus import usable_cpus
from gare.config.home import absolute_path, require_home
from gare.errors import ConfigError, GareError

#: Ray's switch for machines that are no cluster. If off, Ray uses 127.0.0.1 as this node's address, as it
#: does by default on macOS and Windows. Ray reads it when it is imported.
_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def listen_here_alone() -> None:
    """Makes a local Ray listen on this machine only; call it before Ray is imported.

    By default all of its processes (GCS, raylet, object manager, workers, driver, agents) listen on all
    addresses, protected only by the token, which travels unencrypted. A user's own setting wins.

    This does not cover the rendezvous of ``torch.distributed`` and gloo's connections between training
    workers: they listen on addresses of PyTorch's choice, without a password, while a training runs.
    """
    os.environ.setdefault(_SWITCH, "0")


logger = logging.getLogger(__name__)

#: Bytes of the longest name of a Unix socket on Linux; macOS has three fewer.
_LONGEST_SOCKET = 107 if sys.platform == "linux" else 103


@contextmanager
def ray_session(config: ClusterConfig) -> Iterator[None]:
    """Joins the cluster in the configuration or RAY_ADDRESS, else starts a local Ray; ends it on exit.

    A session that is open already is used and left open, so that the demo's steps share one.

    A ``GareError`` that comes back wrapped in Ray's exceptions is raised unwrapped.

    Raises:
        GareError: if a named cluster cannot be joined.
    """
    require_home()
    address = cluster_address(config)
    _set_environment(local=not address)
    import ray

    if ray.is_initialized():
        quiet_data()
        with _unwrapped_errors():
            yield
        return
    check_cluster(config)
    try:
        # A half-started local Ray could not be ended; a cluster that does not answer is left at once.
        with nullcontext() if address else shielded(), handlers_kept(below_python=True):
            _begin(config, address)
        quiet_data()
        with _unwrapped_errors():
            yield
    finally:
        with shielded(), handlers_kept(below_python=True):
            ray.shutdown()


def _begin(config: ClusterConfig, address: str) -> None:
    """Joins a cluster, or starts a local Ray."""
    import ray

    if not address:
        _require_room_for_sockets()
    quiet: dict[str, Any] = {
        "logging_level": logging.WARNING,
        "log_to_driver": True,
        "configure_logging": False,
    }
    quiet |= runtime_env() if address else _local_runtime_env()
    try:
        if address:
            if config.non_default("num_cpus", "object_store_mb", "spill_dir"):
                logger.warning(
                    "ignoring cluster.num_cpus, object_store_mb and spill_dir: they apply to a local Ray only"
                )
            ray.init(address=address, **quiet)
        else:
            # "local" never joins another cluster that happens to run on this machine.
            ray.init(
                address="local",
                num_cpus=max(2, usable_cpus()) if config.num_cpus == "auto" else config.num_cpus,
                # Ray Train asks the dashboard's state service if its controller is alive.
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=0,
                object_store_memory=object_store_bytes(config),
                **_spilling(config),
                **quiet,
            )
    except GareError:
        raise
    except Exception as error:  # Ray raises plain Exception if one of its processes does not start
        raise GareError(
            f"Ray cannot be {'reached' if address else 'started'}: {error}",
            where=address or "cluster.address is empty",
            accepted="a running cluster (ray start --head) with its token in RAY_AUTH_TOKEN or ~/.ray"
            if address
            else "a machine that is less busy, or the address of a running cluster",
        ) from error


def _local_runtime_env() -> dict[str, Any]:
    """Builds the runtime environment with which every worker of a local Ray knows its address."""
    given = runtime_env().get("runtime_env", {})
    return {"runtime_env": given | {"worker_process_setup_hook": local_worker_setup()}}


def _require_room_for_sockets() -> None:
    """Checks that the names of a local Ray's sockets are no longer than the system allows.

    Raises:
        ConfigError: for a longer folder of temporary files than Ray can use.
    """
    name = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    folder = os.environ.get(name) or "/tmp"
    socket = f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/dash_MetricsHead"
    most = _LONGEST_SOCKET - len(socket)
    if (length := len(os.fsencode(folder))) > most:
        raise ConfigError(
            f"is {length} bytes long, and the names of Ray's sockets in it would be longer than the system "
            f"allows: {folder}",
            where=name,
            accepted=f"{most} bytes at most, such as RAY_TMPDIR=/tmp for Ray alone",
        )


def _spilling(config: ClusterConfig) -> dict[str, Any]:
    """Chooses where a local Ray spills objects for which its store has no room.

    Raises:
        ConfigError: if that folder cannot be written.
    """
    if not config.spill_dir:
        return {}
    folder = Path(absolute_path(config.spill_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"cannot be written: {error}", where="cluster.spill_dir", accepted="a folder of this machine"
        ) from error
    return {"object_spilling_directory": str(folder)}


@contextmanager
def _unwrapped_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        fault = unwrap_gare_error(error)
        if fault is None or fault is error:
            raise
        # Not chained: Ray's message holds the worker's trace, and our error says what a user needs.
        raise fault from None


def unwrap_gare_error(error: BaseException) -> GareError | None:
    """Returns the ``GareError`` inside an exception from Ray, which wraps the errors of its workers."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    wrapped: GareError | None = None
    while pending:
        inner = pending.pop(0)
        if inner is None or id(inner) in seen:
            continue
        seen.add(id(inner))
        # Ray makes classes derived from the cause's class whose text is a trace: unwrap the cause itself.
        cause = getattr(inner, "cause", None)
        if isinstance(inner, GareError) and not isinstance(cause, BaseException):
            return inner
        wrapped = wrapped or (inner if isinstance(inner, GareError) else None)
        pending += [cause] if isinstance(cause, BaseException) else []
        pending += [inner.__cause__, *getattr(inner, "worker_failures", {}).values()]
    return wrapped


def _set_environment(*, local: bool) -> None:
    """Sets variables that Ray reads when it is imported; keeps those that the user has set."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    if local:
        bypass_proxies()
    # Ray read its mode when it was imported; if its children read another one, they are locked out.
    if not local or "ray" in sys.modules:
        return
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    listen_here_alone()
    has_token = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if not has_token and not Path("~/.ray/auth_token").expanduser().exists():
        # A token for this session only; Ray would otherwise write one to the home folder, readable by all.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def watches_preemption() -> bool:
    """Returns True if Ray Train watches for nodes that are about to be preempted; not on a local Ray."""
    return os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") not in ("0", "false", "False")


def quiet_data() -> None:
    """Silences Ray Data's log below warnings; the pipelines print one line of their own."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Importing Ray Data set these up again. The file in Ray's session folder still gets everything.
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
    logging.getLogger(PROGRESS_LOGGER).setLevel(logging.ERROR)
