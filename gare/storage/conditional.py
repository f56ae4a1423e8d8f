"""Conditional writes on S3: creating an object that does not exist, replacing an unchanged one.

Arrow's file system has no such requests, so they go through boto3. A server that refuses or ignores the
conditions is recognised at the first request, and named once in the log.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from gare.errors import DataError, without_secrets
from gare.storage.object_store import CONNECT_TIMEOUT_S, S3Address, address_of
from gare.storage.s3_client import s3_client
from gare.storage.uris import scheme_of

logger = logging.getLogger(__name__)

#: Tries of a request, with random pauses of half a minute in all.
TRIES = 7
#: Error codes of a server that does not support conditional writes.
_REFUSALS = {"NotImplemented", "InvalidArgument", "InvalidRequest"}
#: Error code for a simultaneous write of the same object; the request has to be repeated.
_CONFLICT = "ConditionalRequestConflict"
_CONFLICTS = 5

_refusing: set[tuple[str, str]] = set()
_tried: set[tuple[str, str]] = set()
_lock = threading.Lock()


def create_object(uri: str, data: bytes) -> bool | None:
    """Writes an object unless it exists; returns False if it does, None if the storage has no such writes.

    Raises:
        DataError: if it cannot be written.
    """
    if not (server := _server_of(uri)):
        return None
    done = _put(uri, data, IfNoneMatch="*")
    if done and server not in _tried:
        with _lock:
            _tried.add(server)
        # Repeated once: a server that accepts it again ignores conditions.
        if _put(uri, data, IfNoneMatch="*"):
            _refuse(server, "takes no notice of conditions")
    return done


def replace_object(uri: str, data: bytes, etag: str) -> bool | None:
    """Replaces an object that is as ``etag_of`` found it; False if it is not, None as in ``create_object``.

    Raises:
        DataError: if it cannot be written.
    """
    return _put(uri, data, IfMatch=etag) if _server_of(uri) else None


def etag_of(uri: str) -> str:
    """Returns the ETag of an object; empty if it does not exist or the storage has no conditional writes.

    Raises:
        DataError: if that cannot be found out.
    """
    if not _server_of(uri):
        return ""
    address = address_of(uri)
    with _faults_of(uri):
        try:
            found = _client(address).head_object(Bucket=address.bucket, Key=address.key)
        except Exception as error:
            if _answer(error)[0] == 404:
                return ""
            raise
    return str(found["ETag"])


def _put(uri: str, data: bytes, **condition: str) -> bool | None:
    address = address_of(uri)
    for attempt in range(_CONFLICTS):
        with _faults_of(uri):
            try:
                _client(address).put_object(Bucket=address.bucket, Key=address.key, Body=data, **condition)
            except Exception as error:
                status, code = _answer(error)
                if status == 412 or code == "NoSuchKey":
                    return False
                if status == 501 or code in _REFUSALS:
                    _refuse((address.endpoint, address.bucket), f"answers {code or status}")
                    return None
                if code == _CONFLICT and attempt + 1 < _CONFLICTS:
                    continue
                raise
            return True
    raise AssertionError


def _server_of(uri: str) -> tuple[str, str] | None:
    """Returns endpoint and bucket; None if conditional writes are not supported."""
    if scheme_of(uri) != "s3":
        return None
    address = address_of(uri)
    server = address.endpoint, address.bucket
    return None if server in _refusing else server


def _refuse(server: tuple[str, str], why: str) -> None:
    with _lock:
        is_new = server not in _refusing
        _refusing.add(server)
    if is_new:
        logger.warning(
            "s3://%s: the server does not support conditional writes (it %s): if two jobs take over the same "
            "store at once, only a check before each write keeps them apart, as in earlier versions",
            server[1],
            why,
        )


def _answer(error: Exception) -> tuple[int, str]:
    """Returns the HTTP status and S3's error code; 0 and empty for other errors."""
    response: dict[str, Any] = getattr(error, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(response.get("Error", {}).get("Code", ""))


@contextlib.contextmanager
def _faults_of(uri: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError, OSError) as error:
        raise DataError(f"S3 refuses or does not answer: {error}", where=without_secrets(uri)) from error


def _client(address: S3Address) -> Any:
    return _client_of(address.endpoint, address.region, address.credentials)


@lru_cache(maxsize=16)
def _client_of(endpoint: str, region: str, credentials: tuple[str, ...]) -> Any:
    del credentials  # only part of the cache key
    return s3_client(timeout_s=CONNECT_TIMEOUT_S, attempts=TRIES, endpoint=endpoint, region=region)
