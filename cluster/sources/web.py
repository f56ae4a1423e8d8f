"""Server class for http and https, on urllib3: checks each redirect and each address."""

from __future__ import annotations

import socket
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any
from urllib.request import getproxies

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from cluster.sources.addresses import check_address, is_address
from cluster.sources.attempts import TransientError, is_refused, is_transient
from cluster.sources.contract import CHUNK_BYTES, Answer, RemoteVersion, md5_in, start_in, total_in
from gare.config import SourcesConfig
from gare.errors import FetchError, GoneError, without_secrets

_MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_LONGEST_ASKED_PAUSE_S = 60.0


class WebServer:
    """Videos named by their URL. Sends no credentials; a presigned URL has its own in its query.

    Args:
        sources: settings of schemes, time limits and allowed addresses.
        connections: maximum number of concurrent requests to one host.
    """

    def __init__(self, sources: SourcesConfig, connections: int) -> None:
        self._sources = sources
        self._connections = connections

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._sources, self._connections)

    @cached_property
    def _pools(self) -> urllib3.PoolManager:
        pools = urllib3.PoolManager(maxsize=self._connections, retries=False)
        pools.pool_classes_by_scheme = _checked_pools(private=self._sources.private_addresses)
        return pools

    def stat(self, uri: str, timeout_s: float) -> RemoteVersion:
        """Returns size and version, from a request for one byte: URLs presigned for GET refuse HEAD."""
        with self._answer(uri, {"Range": "bytes=0-0"}, timeout_s) as response:
            content_range = response.headers.get("Content-Range", "")
            size_bytes = total_in(content_range) if content_range else _length(response)
            if size_bytes is None:
                raise FetchError("the server does not state its size", where=without_secrets(uri))
            return RemoteVersion(size_bytes, _version(response.headers))

    @contextmanager
    def get(self, uri: str, start: int, version: str, timeout_s: float) -> Iterator[Answer]:
        """Yields the body from ``start`` if the server can and it is unchanged, else the whole body."""
        # A weak ETag, W/"…", does not promise the same bytes.
        ask = (
            {"Range": f"bytes={start}-", "If-Range": version}
            if start and version[:2] not in ("W/", "")
            else {}
        )
        with self._answer(uri, ask, timeout_s) as response:
            headers = response.headers
            if headers.get("Content-Encoding", "identity") != "identity":
                raise FetchError(
                    "the server sends it compressed, which was not requested", where=without_secrets(uri)
                )
            content_range = headers.get("Content-Range", "") if response.status == 206 else ""
            size_bytes = total_in(content_range) if content_range else _length(response)
            if size_bytes is None and not response.chunked:
                raise FetchError("the server does not state its size", where=without_secrets(uri))
            yield Answer(
                start=(start_in(content_range) or 0) if content_range else 0,
                size_bytes=size_bytes,
                version=_version(headers),
                md5=_md5(headers),
                chunks=_chunks(response, uri),
            )

    @contextmanager
    def _answer(
        self, uri: str, headers: Mapping[str, str], timeout_s: float
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        url = uri
        for _ in range(_MAX_REDIRECTS + 1):
            self._check_url(url, uri)
            with _faults(uri):
                response = self._pools.request(
                    "GET",
                    url,
                    headers={"Accept-Encoding": "identity", **headers},
                    timeout=urllib3.Timeout(connect=timeout_s, read=timeout_s),
                    preload_content=False,
                    decode_content=False,
                    redirect=False,
                )
            try:
                if response.status not in _REDIRECTS:
                    _check_status(response, uri)
                    yield response
                    return
                with _faults(uri):
                    url = urllib.parse.urljoin(url, response.headers.get("Location", ""))
            finally:
                response.close()  # it was not read to its end, so the connection cannot be reused
        raise FetchError(f"is redirected more than {_MAX_REDIRECTS} times", where=without_secrets(uri))

    def _check_url(self, url: str, uri: str) -> None:
        with _faults(uri):
            parts = urllib.parse.urlsplit(url)
        redirected = f"is redirected to {without_secrets(url)}, which " if url != uri else ""
        if parts.scheme not in self._sources.schemes or parts.scheme not in ("http", "https"):
            fault = f"has the scheme {parts.scheme!r}"
        elif redirected and parts.scheme == "http" and urllib.parse.urlsplit(uri).scheme == "https":
            fault = "is not encrypted"
        elif parts.username is not None or parts.password is not None:
            fault = "holds a name or password"
        elif not parts.hostname:
            fault = "names no host"
        else:
            # Names are checked once they are resolved; an address can be checked without a connection.
            if is_address(parts.hostname):
                private = self._sources.private_addresses
                check_address(parts.hostname, private=private, where=without_secrets(uri))
            return
        raise FetchError(
            redirected + fault,
            where=without_secrets(uri),
            accepted="an http or https URL of sources.schemes, without credentials",
        )


def _checked_pools(*, private: bool) -> dict[str, type[HTTPConnectionPool]]:
    """Returns urllib3's pools with connections that go only to checked addresses."""

    class Plain(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return _connect(self, super()._new_conn, private=private)

    class Encrypted(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return _connect(self, super()._new_conn, private=private)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class EncryptedPool(HTTPSConnectionPool):
        ConnectionCls = Encrypted

    return {"http": PlainPool, "https": EncryptedPool}


def _connect(
    connection: HTTPConnection, connect: Callable[[], socket.socket], *, private: bool
) -> socket.socket:
    """Connects to an allowed address of the host.

    The name is resolved once and the checked address is the one connected to, so that no name can lead
    elsewhere in between. No packet goes to a refused address, so that nobody learns what answers there.
    """
    name = connection._dns_host
    allowed, refused = [], None
    for address in _addresses(connection, name):
        try:
            check_address(address, private=private, where=name)
            allowed.append(address)
        except FetchError as error:
            refused = refused or error
    if refused and not allowed:
        raise refused
    try:
        for address in allowed[:-1]:
            connection.host = address
            with suppress(urllib3.exceptions.HTTPError):  # for example no route to that address family
                return connect()
        connection.host = allowed[-1]
        return connect()
    finally:
        connection.host = name  # the request and the server's certificate are for the name


def _addresses(connection: HTTPConnection, name: str) -> list[str]:
    """Returns all addresses of a name; numbers in any notation that the system knows are addresses too."""
    try:
        found = socket.getaddrinfo(name.strip("[]"), connection.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: an impossible name, such as 300 letters
        fault = socket.gaierror(str(error))
        raise urllib3.exceptions.NameResolutionError(name, connection, fault) from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _check_status(response: urllib3.BaseHTTPResponse, uri: str) -> None:
    if response.status in (200, 206):
        return
    # An empty file has no first byte; its length is in the answer.
    if response.status == 416 and total_in(response.headers.get("Content-Range", "")) == 0:
        return
    words = f"the server answers {response.status} {response.reason or ''}".strip()
    if is_transient(response.status):
        asked = response.headers.get("Retry-After", "")
        pause_s = float(asked) if asked.isascii() and asked.isdigit() else 0.0
        raise TransientError(words, pause_s=min(pause_s, _LONGEST_ASKED_PAUSE_S))
    kind = GoneError if response.status in (404, 410) else FetchError
    error = kind(words, where=without_secrets(uri), accepted="a URL that can be read without a login")
    raise error.as_transient() if is_refused(response.status) else error


def _length(response: urllib3.BaseHTTPResponse) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isascii() and length.isdigit() else None


def _version(headers: Mapping[str, str]) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def _md5(headers: Mapping[str, str]) -> str:
    """Returns the MD5 from S3's ETag; other servers do not say how they make theirs."""
    if "x-amz-request-id" not in headers or "x-amz-server-side-encryption-customer-algorithm" in headers:
        return ""
    return md5_in((headers.get("ETag") or "").strip('"'), headers.get("x-amz-server-side-encryption") or "")


def _chunks(response: urllib3.BaseHTTPResponse, uri: str) -> Iterator[bytes]:
    # read1 returns what has come, so that the clock is checked even if a server sends byte by byte.
    with _faults(uri):
        while chunk := response.read1(CHUNK_BYTES):
            yield chunk


def _beside_proxy() -> str:
    """Returns a hint for users behind a proxy."""
    # A proxy resolves names itself, so the address could not be checked here.
    return "; videos are fetched directly, without the proxy of the environment" if getproxies() else ""


@contextmanager
def _faults(uri: str) -> Iterator[None]:
    """Turns urllib3's exceptions into a TransientError or a FetchError, in words without URL and query."""
    errors = urllib3.exceptions
    try:
        yield
    except FetchError as error:  # from the check of an address
        raise FetchError(error.what, where=without_secrets(uri), accepted=error.accepted) from error
    except ValueError as error:  # LocationValueError among them
        raise FetchError("is not a URL", where=without_secrets(uri)) from error
    except errors.SSLError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            fault = FetchError("the certificate of the server is not trusted", where=without_secrets(uri))
            # The certificate may be renewed, or its issuer installed here.
            raise fault.as_transient() from error
        raise TransientError("the connection was lost") from error
    except errors.NameResolutionError as error:
        raise TransientError(f"the name of the server cannot be resolved{_beside_proxy()}") from error
    except errors.NewConnectionError as error:
        raise TransientError(f"the server cannot be connected to{_beside_proxy()}") from error
    except errors.TimeoutError as error:
        raise TransientError("there was no answer in time") from error
    except (errors.HTTPError, OSError) as error:
        raise TransientError("the connection was lost") from error
