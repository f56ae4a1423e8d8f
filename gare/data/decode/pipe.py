"""The process of the decoding child, and the pipes to it.

Parent and child use two pipes of their own, because decoders write to stdout. A message is the length of its
header (4 bytes, big endian), the header (JSON), and blocks of bytes with their sizes in the header under
``sizes``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gare

#: Bytes of a message that hold the length of its header.
LENGTH_BYTES = 4
_STDERR_BYTES = 1 << 16
_OF_OTHERS = frozenset(
    (*(signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT), signal.SIGBUS)
)


class Child:
    """The process and the parent's ends of its pipes."""

    def __init__(self) -> None:
        request_read, self._requests = os.pipe()
        self._answers, answer_write = os.pipe()
        root = str(Path(gare.__file__).resolve().parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        ours = (request_read, answer_write)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gare.data.decode.child", *map(str, (*ours, os.getpid()))],
                pass_fds=ours,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        except BaseException:
            os.close(self._requests)
            os.close(self._answers)
            raise
        finally:
            os.close(request_read)
            os.close(answer_write)
        assert self.process.stderr is not None
        self._stderr = self.process.stderr.fileno()
        os.set_blocking(self._stderr, False)
        self._tail = b""

    def send(self, request: dict[str, Any]) -> None:
        """Writes one request; it fits the pipe's buffer, so this does not wait for a child that hangs."""
        data = json.dumps(request).encode()
        self._read_stderr()
        self._tail = b""
        os.write(self._requests, len(data).to_bytes(LENGTH_BYTES, "big") + data)

    def receive(self, until: float) -> tuple[dict[str, Any], list[bytes]]:
        """Reads one answer.

        Raises:
            TimeoutError: when ``time.monotonic()`` passes ``until``.
            EOFError: when the child ends.
        """
        buffer = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            selector.register(self._stderr, selectors.EVENT_READ)

            def take(count: int) -> bytes:
                while len(buffer) < count:
                    left_s = until - time.monotonic()
                    if left_s <= 0:
                        raise TimeoutError
                    for key, _ in selector.select(left_s):
                        if key.fd == self._stderr:
                            if not self._read_stderr():
                                selector.unregister(self._stderr)
                        elif data := os.read(self._answers, 1 << 20):
                            buffer.extend(data)
                        else:
                            raise EOFError
                taken = bytes(buffer[:count])
                del buffer[:count]
                return taken

            header = json.loads(take(int.from_bytes(take(LENGTH_BYTES), "big")))
            return header, [take(size) for size in header["sizes"]]

    def has_printed(self, pattern: re.Pattern[bytes]) -> bool:
        """True if a line that decoders wrote since the last request matches (within the last 64 kB)."""
        self._read_stderr()
        return bool(pattern.search(self._tail))

    def _read_stderr(self) -> bool:
        """Reads available output; returns False at its end."""
        try:
            data = os.read(self._stderr, 1 << 16)
        except BlockingIOError:
            return True
        self._tail = (self._tail + data)[-_STDERR_BYTES:]
        return bool(data)

    def was_killed_from_outside(self) -> bool:
        """True if the process was ended from outside: by a signal that no decoder causes.

        Such signals are SIGKILL (the system kills processes when memory is short), SIGTERM or SIGHUP (a node
        goes down), and SIGBUS (the disk fails to deliver a mapped file). SIGSEGV, SIGABRT, SIGFPE, SIGILL and
        an exit come from what the decoder did with the file.
        """
        status = self.process.poll()
        return status is not None and -status in _OF_OTHERS

    def describe_end(self) -> str:
        """Describes the end for a message: the signal or status, and the last line of stderr."""
        try:
            status = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "it closed its pipes"
        self._read_stderr()
        if status < 0:
            with contextlib.suppress(ValueError):
                return f"signal {-status} ({signal.Signals(-status).name}){self._last_words()}"
        return f"exit status {status}{self._last_words()}"

    def _last_words(self) -> str:
        lines = self._tail.decode(errors="replace").strip().splitlines()
        return f"; its last words: {lines[-1][:300]}" if lines else ""

    def kill(self) -> None:
        """Ends the process and closes the pipes."""
        self.process.kill()
        os.close(self._requests)
        os.close(self._answers)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process stuck in the kernel ends when it can
            self.process.wait(timeout=5)
        if self.process.stderr:
            self.process.stderr.close()
