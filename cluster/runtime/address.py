"""The address of a Ray cluster, looked at before it is trusted.

Ray itself tries for a quarter of an hour to join a cluster that is gone, and says nothing meanwhile.
"""

from __future__ import annotations

import os
import socket

from cluster.runtime._compat import address_on_this_machine
from cluster.runtime.resources import cluster_address
from gare.config import ClusterConfig
from gare.errors import ConfigError, GareError

#: Seconds to connect, and for the first bytes of an answer.
ANSWER_S = 5.0
#: What begins a connection of HTTP/2, which gRPC and so Ray speak: the preface and empty settings. The answer
#: is a frame of settings, which needs no token.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
_FRAME_TYPE, _SETTINGS = 3, 4
_ACCEPTED = (
    "HOST:PORT of a running cluster, as ray start --head prints it (6379 by default); with RAY_ADDRESS unset "
    "and cluster.address empty a local Ray is started"
)


def check_cluster(config: ClusterConfig) -> None:
    """Checks within seconds that a Ray answers at the configured address, or at RAY_ADDRESS.

    Raises:
        ConfigError: for what is no address of a cluster.
        GareError: if nothing answers there, or something that is no Ray.
    """
    name = "cluster.address" if config.address else "RAY_ADDRESS"
    address = cluster_address(config)
    if not address:
        return
    if address == "auto":
        try:
            found = address_on_this_machine()
        except ConnectionError:
            found = ""
        if not found:
            raise GareError("auto finds no Ray on this machine", where=name, accepted=_ACCEPTED)
        address = found
    host, port = _parts(address, name)
    try:
        is_ray = _greets(host, port)
    except (OSError, UnicodeError) as error:  # the latter for "a..b", which is no name of a host
        reason = (
            "no answer in time"
            if isinstance(error, TimeoutError)
            else getattr(error, "strerror", "") or str(error)
        )
        raise GareError(f"no Ray answers at {address}: {reason}", where=name, accepted=_ACCEPTED) from error
    if not is_ray:
        raise GareError(f"what listens at {address} is no Ray cluster", where=name, accepted=_ACCEPTED)


def _parts(address: str, name: str) -> tuple[str, int]:
    """Splits ``HOST:PORT``, ``[IPV6]:PORT`` or ``ray://HOST:PORT``."""
    scheme, separator, rest = address.rpartition("://")
    if separator and scheme != "ray":
        raise ConfigError(
            f"{address} is no address of a cluster",
            where=name,
            accepted=f"{_ACCEPTED}; an http:// address is for ray job submit: give it there as --address",
        )
    host, colon, port = rest.rpartition(":")
    is_port = port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 65536
    if not colon or not host or not is_port:
        raise ConfigError(f"{address} is no HOST:PORT", where=name, accepted=_ACCEPTED)
    return host.removeprefix("[").removesuffix("]"), int(port)


def _greets(host: str, port: int) -> bool:
    """Returns True if a server of gRPC answers.

    Raises:
        OSError: if nothing listens there.
    """
    with socket.create_connection((host, port), ANSWER_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
            return True  # it answers to a handshake alone
        try:
            connection.sendall(_GREETING)
            answer = b""
            while len(answer) <= _FRAME_TYPE and (more := connection.recv(64)):
                answer += more
        except OSError:
            return False
    return len(answer) > _FRAME_TYPE and answer[_FRAME_TYPE] == _SETTINGS
