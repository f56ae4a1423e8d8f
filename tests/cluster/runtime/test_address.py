"""A cluster that is gone: an evening's command must not hang for a quarter of an hour without a word."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from cluster.runtime import address
from cluster.runtime.address import check_cluster
from cluster.runtime.resources import cluster_address
from cluster.runtime.session import ray_session
from gare.config import ClusterConfig
from gare.errors import ConfigError, GareError

SETTINGS = b"\0\0\6\4\0\0\0\0\0" + b"\0\3\0\0\0\x64"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_USE_TLS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def closed() -> str:
    """The address of a port at which nothing listens any more."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def listening() -> Iterator[Callable[[bytes | None], str]]:
    """Starts a server that answers with some bytes, or with nothing, and returns its address."""
    servers: list[socket.socket] = []
    held: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start(answer: bytes | None) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def serve() -> None:
            connection, _ = server.accept()
            held.append(connection)
            if answer is not None:
                connection.recv(64)
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)

        threads.append(threading.Thread(target=serve, daemon=True))
        threads[-1].start()
        return f"127.0.0.1:{server.getsockname()[1]}"

    yield start
    for thread in threads:
        thread.join(10)
    for one in (*servers, *held):
        one.close()


def fault(config: ClusterConfig) -> GareError:
    with pytest.raises(GareError) as caught:
        check_cluster(config)
    return caught.value


@pytest.mark.parametrize("host", ["no..host", "h" * 70])
def test_what_is_no_name_of_a_host_is_one_message(host: str) -> None:
    """Python has an error of its own for such names, before anything is asked."""
    assert str(fault(ClusterConfig(address=f"{host}:6379"))).startswith(
        f"cluster.address: no Ray answers at {host}:6379: "
    )


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_is_gone_is_one_message(
    scheme: str, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable is set in a profile, and forgotten: the message has to name it."""
    monkeypatch.setenv("RAY_ADDRESS", scheme + closed)
    found = fault(ClusterConfig())
    assert str(found).startswith(f"RAY_ADDRESS: no Ray answers at {scheme}{closed}: Connection refused")
    assert "RAY_ADDRESS unset" in str(found)
    assert found.exit_code == 4
    assert fault(ClusterConfig(address=scheme + closed)).where == "cluster.address"


def test_ray_is_not_asked_before(closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is Ray that would try for a quarter of an hour."""
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("it was asked"))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(GareError, match="no Ray answers"), ray_session(ClusterConfig(address=closed)):
        pytest.fail("it was joined")


def test_what_listens_there_may_be_no_ray(
    listening: Callable[[bytes | None], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program has taken the port, or the port is that of the dashboard."""
    monkeypatch.setattr(address, "ANSWER_S", 0.2)
    for answer in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"\0", None):
        found = fault(ClusterConfig(address=listening(answer)))
        assert "is no Ray cluster" in str(found), answer
        assert found.exit_code == 4


def test_a_cluster_that_answers_is_joined(
    listening: Callable[[bytes | None], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look must not refuse what works: with a token, by TLS, or as a client."""
    check_cluster(ClusterConfig(address=listening(SETTINGS)))
    check_cluster(ClusterConfig(address=f"ray://{listening(SETTINGS)}"))
    monkeypatch.setenv("RAY_ADDRESS", listening(SETTINGS))
    check_cluster(ClusterConfig())
    monkeypatch.setenv("RAY_USE_TLS", "1")
    check_cluster(ClusterConfig(address=listening(None)))


@pytest.mark.parametrize(
    "given", ["http://127.0.0.1:8265", "https://ray", "host", "host:", ":6379", "host:x", "h:0"]
)
def test_what_is_no_address_is_refused(given: str) -> None:
    """RAY_ADDRESS is also where ``ray job submit`` looks for an http:// address."""
    found = fault(ClusterConfig(address=given))
    assert isinstance(found, ConfigError)
    assert "HOST:PORT" in str(found)


def test_a_name_that_nobody_knows_is_one_message() -> None:
    """The cluster's name of yesterday."""
    assert "no Ray answers at no-such-host.invalid:6379" in str(
        fault(ClusterConfig(address="no-such-host.invalid:6379"))
    )


def test_auto_finds_one_or_says_that_there_is_none(
    listening: Callable[[bytes | None], str], closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that names the machine's cluster outlives the cluster."""

    def none() -> str:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(address, "address_on_this_machine", none)
    assert "auto finds no Ray" in str(fault(ClusterConfig()))
    monkeypatch.setattr(address, "address_on_this_machine", lambda: closed)
    assert f"no Ray answers at {closed}" in str(fault(ClusterConfig()))
    monkeypatch.setattr(address, "address_on_this_machine", lambda: listening(SETTINGS))
    check_cluster(ClusterConfig())


def test_no_address_is_a_local_ray() -> None:
    """The usual case: nothing is looked at."""
    check_cluster(ClusterConfig())
    os.environ["RAY_ADDRESS"] = "local"
    check_cluster(ClusterConfig())
    assert cluster_address(ClusterConfig()) == "", "Ray's own word for it"
