"""Source of local and remote videos: local files in place, S3 and web videos as temporary files."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from cluster.sources.attempts import RetryPolicy, TransientError, disk_error
from cluster.sources.contract import Answer, FetchedVideo, LocalSource, RemoteVersion, Server
from cluster.sources.s3 import S3Server, split
from cluster.sources.temporary import temporary_video
from cluster.sources.web import WebServer
from gare.config import SourcesConfig
from gare.errors import DataError, FetchError, without_secrets

logger = logging.getLogger(__name__)

#: Number of concurrent requests for size and version.
STAT_THREADS = 16
#: Objects of one folder from which on their versions are read from a list of it; and those of one list.
LIST_FROM, LISTED_AT_ONCE = 16, 10_000
#: Bytes that a fetch leaves free on the disk of temporary files, which others use too.
SPARE_BYTES = 256 * 10**6

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class RemoteVideos:
    """A ``gare.data.videos.VideoSource`` for all schemes that the configuration allows.

    A remote video is fetched whole into a temporary file before it is decoded, and deleted afterwards: a
    worker holds one at a time. An interrupted fetch is resumed if the video is still the same.

    Args:
        sources: settings of schemes, tries and limits.
        local: source of this machine's files.
    """

    def __init__(self, sources: SourcesConfig, local: LocalSource) -> None:
        self._sources = sources
        self._local = local
        self._s3 = S3Server(sources, STAT_THREADS)
        web = WebServer(sources, STAT_THREADS)
        self._servers: dict[str, Server] = {"s3": self._s3, "http": web, "https": web}

    @contextmanager
    def open(self, uri: str) -> Iterator[Any]:
        """Yields the video as a file of this machine, which is there until the context ends.

        Raises:
            FetchError: if it cannot be fetched, with a one-line reason that shows no secret of the URI.
        """
        scheme = self._scheme(uri)
        if scheme == "file":
            with self._local.open(uri) as video:
                yield video
            return
        with ExitStack() as stack:
            stream = RetryPolicy(self._sources, without_secrets(uri)).call(
                lambda _: stack.enter_context(temporary_video(uri.partition("?")[0]))
            )
            version = self._fetch(self._servers[scheme], uri, stream)
            yield FetchedVideo(stream.name, version.size_bytes, version.version)

    def stat(self, uris: Sequence[str]) -> dict[str, Any]:
        """Returns size and version of each video, or its error; a few threads do the requests."""

        def one(uri: str) -> RemoteVersion | DataError:
            try:
                scheme = self._scheme(uri)
                if scheme == "file":
                    found: RemoteVersion | DataError = self._local.stat([uri])[uri]
                    return found
                server = self._servers[scheme]
                return RetryPolicy(self._sources, without_secrets(uri)).call(
                    lambda timeout_s: server.stat(uri, timeout_s)
                )
            except FetchError as error:
                return error

        distinct = dict.fromkeys(uris)
        with ThreadPoolExecutor(min(STAT_THREADS, max(1, len(distinct)))) as threads:
            found: dict[str, Any] = {}
            for listed in threads.map(self._listed, self._folders(distinct)):
                found |= listed
            asked = [uri for uri in distinct if uri not in found]
            found |= zip(asked, threads.map(one, asked), strict=True)
        return {uri: found[uri] for uri in distinct}

    def _folders(self, uris: Iterable[str]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Yields a bucket, and keys and URIs of objects of one folder, for folders with many of them."""
        folders: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for uri in uris:
            with suppress(FetchError):
                if self._scheme(uri) == "s3":
                    bucket, key = split(uri)
                    folders.setdefault((bucket, key.rpartition("/")[0]), []).append((key, uri))
        for (bucket, _), objects in folders.items():
            objects.sort(key=lambda one: one[0].encode())
            for first in range(0, len(objects), LISTED_AT_ONCE):
                some = objects[first : first + LISTED_AT_ONCE]
                if len(some) >= LIST_FROM:
                    yield bucket, some

    def _listed(self, folder: tuple[str, list[tuple[str, str]]]) -> dict[str, RemoteVersion]:
        """Returns the versions of the objects that a list of their folder names; the others are asked for."""
        bucket, objects = folder
        policy = RetryPolicy(self._sources, f"s3://{bucket}")
        try:
            found = self._s3.listed(bucket, [key for key, _ in objects], policy.call)
        except FetchError:  # who may read objects may not always list them
            return {}
        return {uri: found[key] for key, uri in objects if key in found}

    def list(self, folder: str) -> list[str]:
        """Returns the names of all files below an ``s3://`` folder, relative to it, sorted.

        Raises:
            FetchError: for a scheme that cannot be listed or is not allowed, or if S3 refuses.
        """
        if self._scheme(folder) != "s3":
            raise FetchError(
                "cannot be listed",
                where=without_secrets(folder),
                accepted="a local folder or s3://bucket/folder",
            )
        return RetryPolicy(self._sources, without_secrets(folder)).call(lambda _: self._s3.list(folder))

    def _scheme(self, uri: str) -> str:
        found = _SCHEME.match(uri)
        scheme = found[1].lower() if found else "file"
        if scheme not in self._sources.schemes:
            raise FetchError(
                f"its scheme {scheme!r} is not allowed",
                where=without_secrets(uri),
                accepted=f"one of sources.schemes: {', '.join(self._sources.schemes)}",
            )
        return scheme

    def _fetch(self, server: Server, uri: str, stream: IO[bytes]) -> RemoteVersion:
        where = without_secrets(uri)
        attempts = RetryPolicy(self._sources, where)
        partial = _Partial(stream, where, self._sources.max_video_mb)
        while not partial.is_whole:
            before = partial.position
            try:
                if not partial.has_all:  # everything but the end of the answer may have come
                    with server.get(uri, before, partial.version, attempts.timeout_s()) as answer:
                        partial.begin(answer)
                        for chunk in answer.chunks:
                            partial.add(chunk)
                            attempts.timeout_s()
                partial.finish()
            except TransientError as fault:
                logger.debug("%s: %s at byte %d", where, fault.reason, partial.position)
                progressed = partial.position > before
                if fault.anew:
                    partial.restart()
                attempts.wait(fault, progressed=progressed)
        return RemoteVersion(partial.position, partial.version)


class _Partial:
    """The part of a video that has come so far."""

    def __init__(self, stream: IO[bytes], where: str, max_video_mb: float) -> None:
        self._stream = stream
        self._where = where
        self._max_video_mb = max_video_mb
        self.restart()

    @property
    def has_all(self) -> bool:
        """True if all expected bytes have come."""
        return self.position == self._size_bytes

    def restart(self) -> None:
        """Discards everything received."""
        self.is_whole = False
        self.position = 0
        self.version = ""
        self._size_bytes: int | None = None  # until an answer states it
        self._md5 = ""
        self._digest = hashlib.md5(usedforsecurity=False)
        self._stream.seek(0)
        self._stream.truncate()

    def begin(self, answer: Answer) -> None:
        """Prepares for a body; starts again unless it continues what has been received."""
        goes_on = answer.start == self.position and answer.version == self.version
        if not (self.position and goes_on):
            try:
                self.restart()  # even if nothing has come: a full disk may have left bytes in the buffer
            except OSError as error:
                raise disk_error(error) from error
        if answer.start != self.position:
            raise TransientError("the server sent another part than requested")
        self.version, self._size_bytes, self._md5 = answer.version, answer.size_bytes, answer.md5
        self._check_size(answer.size_bytes or 0)
        try:
            free_bytes = shutil.disk_usage(Path(self._stream.name).parent).free
        except OSError as error:
            raise disk_error(error) from error
        if (answer.size_bytes or 0) - self.position + SPARE_BYTES > free_bytes:
            raise TransientError("there is no room on the disk for temporary files (TMPDIR)")

    def add(self, chunk: bytes) -> None:
        """Writes the next bytes."""
        self._check_size(self.position + len(chunk))
        try:
            self._stream.write(chunk)
        except OSError as error:
            with suppress(OSError):  # the next try starts again anyway
                self.restart()
            raise disk_error(error) from error
        self._digest.update(chunk)
        self.position += len(chunk)

    def finish(self) -> None:
        """Checks that everything is there and nothing else.

        Raises:
            TransientError: if it is not.
        """
        if self._size_bytes is not None and self.position != self._size_bytes:
            if self.position > self._size_bytes:
                self.restart()
            raise TransientError("the body ended early")
        if self._md5 and self._digest.hexdigest() != self._md5:
            self.restart()
            raise TransientError("the MD5 of the downloaded data does not match the ETag")
        try:
            self._stream.flush()
        except OSError as error:
            with suppress(OSError):  # the next try starts again anyway
                self.restart()
            raise disk_error(error) from error
        self.is_whole = True

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._max_video_mb * 10**6:
            raise FetchError(
                f"is larger than {self._max_video_mb:g} MB",
                where=self._where,
                accepted="a smaller video, or a larger sources.max_video_mb",
            )
