"""Local test servers: S3 (moto), a web server with faults, a proxy that drops connections."""

from __future__ import annotations

import contextlib
import random
import re
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "a-test-key",
    "AWS_SECRET_ACCESS_KEY": "a-test-secret",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}

_METHODS = (b"GET", b"HEAD", b"PUT", b"POST", b"DELETE")


@contextmanager
def s3_server() -> Iterator[tuple[str, int]]:
    """Yields host and port of an S3 server, moto over real HTTP."""
    from moto.server import ThreadedMotoServer

    _remember_services()
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()
    finally:
        server.stop()


def fill_bucket(bucket: str, objects: Mapping[str, bytes]) -> None:
    """Puts objects into a bucket of this process's S3 server, without a request for each."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    for key, body in objects.items():
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(bucket, key, body)


def empty_bucket(client: Any, bucket: str) -> None:
    """Deletes all objects of a bucket, a thousand by a request."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        if keys := [{"Key": entry["Key"]} for entry in page.get("Contents", ())]:
            client.delete_objects(Bucket=bucket, Delete={"Objects": keys, "Quiet": True})


def _remember_services() -> None:
    """Has moto look up once which service answers a host: it searches its own folder at each request."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication as Dispatcher

    if not hasattr(Dispatcher.get_backend_for_host, "cache_info"):
        Dispatcher.get_backend_for_host = cache(Dispatcher.get_backend_for_host)  # type: ignore[method-assign]


class DroppingProxy:
    """TCP proxy that drops connections on request, on connect and in the middle of bodies, both ways.

    Args:
        upstream: host and port of the server.
        seed: seed of the random drops.
    """

    def __init__(self, upstream: tuple[str, int], seed: int) -> None:
        self._upstream = upstream
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._drops_left = 0
        self._most_bytes, self._share = 0, 0.0
        self._refused_word = b""
        self._watched: tuple[str, Callable[[], None]] | None = None
        self.refused = 0
        #: First line of each request that was passed on.
        self.requests: list[str] = []
        self.dropped = {"connect": 0, "body": 0}
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address: tuple[str, int] = self._listener.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"

    def disturb(self, drops: int, most_bytes: int = 100_000, share: float = 0.7) -> None:
        """Drops the given number of connections, a random share, at once or within ``most_bytes``."""
        with self._lock:
            self._drops_left, self._most_bytes, self._share = drops, most_bytes, share
            self.dropped = {"connect": 0, "body": 0}

    def refuse(self, word: str) -> None:
        """Answers 503 to writes to paths with this word, as under load; an empty word ends that."""
        self._refused_word = word.encode()
        self.refused = 0 if word else self.refused

    def when(self, request: str, action: Callable[[], None]) -> None:
        """Calls ``action`` once, before passing on the next request whose first line matches the pattern."""
        self._watched = (request, action)

    def _watch(self, data: bytes) -> None:
        if data.split(b" ", 1)[0] in _METHODS:
            self.requests.append(data.split(b"\r\n", 1)[0].decode("latin-1"))
        if self._watched and re.search(self._watched[0], data.split(b"\r\n", 1)[0].decode("latin-1")):
            action, self._watched = self._watched[1], None
            action()

    def _refuses(self, data: bytes) -> bool:
        line = data.split(b"\r\n", 1)[0]
        return bool(self._refused_word) and line[:4] in (b"PUT ", b"POST") and self._refused_word in line

    def close(self) -> None:
        self.disturb(0)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _plan(self) -> int | None:
        """Returns the number of bytes after which a new connection is dropped; None for never."""
        with self._lock:
            if self._drops_left <= 0 or self._random.random() >= self._share:
                return None
            self._drops_left -= 1
            at_once = self._random.random() < 0.3
            self.dropped["connect" if at_once else "body"] += 1
            return 0 if at_once else self._random.randrange(1, self._most_bytes)

    def _serve(self, client: socket.socket) -> None:
        left = self._plan()
        if left == 0:
            _reset(client)
            return
        with contextlib.suppress(OSError), socket.create_connection(self._upstream) as server:
            other = {client: server, server: client}
            while True:
                for ready in select.select(list(other), [], [])[0]:
                    data = ready.recv(1 << 14)
                    if not data:
                        client.close()
                        return
                    if ready is client and self._refuses(data):
                        with self._lock:
                            self.refused += 1
                        _answer_busy(client)
                        return
                    if ready is client:
                        self._watch(data)
                    if left is not None:
                        other[ready].sendall(data[:left])
                        left -= len(data)
                        if left <= 0:
                            _reset(client)
                            return
                    else:
                        other[ready].sendall(data)
        client.close()


def _answer_busy(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    client.shutdown(socket.SHUT_WR)
    # If the connection were closed with the body unread, a reset would discard the answer.
    client.settimeout(2)
    with contextlib.suppress(OSError):
        while client.recv(1 << 16):
            pass
    client.close()


def _reset(client: socket.socket) -> None:
    # Closed with RST, as by a machine that went down, not by a server that has finished.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@dataclass
class Site:
    """Content and behaviour of a web server.

    Attributes:
        files: content by path.
        headers: additional headers by path.
        faults: answers given before the right one, in order: a status, or ``("cut", bytes)``.
        ranges: True if it answers range requests.
        redirects: location by path.
        asked: path with query and range of each request, in order.
        before: called before each answer.
        drip_s: seconds between single bytes of a body; 0 to send it at once.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    faults: list[int | tuple[str, int]] = field(default_factory=list)
    ranges: bool = True
    redirects: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    before: Callable[[], None] = lambda: None
    drip_s: float = 0.0
    url: str = ""


@contextmanager
def web_server() -> Iterator[Site]:
    """Yields the site of a web server on this machine."""
    site, stopped = Site(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked = self.headers.get("Range", "")
            site.asked.append((self.path, asked))
            site.before()
            fault = site.faults.pop(0) if site.faults else None
            if isinstance(fault, int):
                self._answer(fault, b"", {})
            elif path in site.redirects:
                self._answer(302, b"", {"Location": site.redirects[path]})
            elif path not in site.files:
                self._answer(404, b"", {})
            else:
                self._send(site.files[path], site.headers.get(path, {}), asked, fault)

        def _send(self, body: bytes, headers: dict[str, str], asked: str, fault: Any) -> None:
            status = 200
            condition = self.headers.get("If-Range")
            if site.ranges and asked and condition in (None, headers.get("ETag")):
                start, end = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
                total, first = len(body), int(start)
                last = min(int(end), total - 1) if end else total - 1
                if first >= total:
                    self._answer(416, b"", {"Content-Range": f"bytes */{total}"})
                    return
                headers = headers | {"Content-Range": f"bytes {first}-{last}/{total}"}
                body, status = body[first : last + 1], 206
            self._answer(status, body, headers, cut=fault[1] if fault else None)

        def _answer(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Transfer-Encoding" not in headers and headers.get("Content-Length") is None:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):
                for byte in body if site.drip_s else b"":
                    self.wfile.write(bytes([byte]))
                    stopped.wait(site.drip_s)
                self.wfile.write(body if cut is None else body[:cut])
            if cut is not None:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield site
    finally:
        stopped.set()
        server.shutdown()
        server.server_close()
