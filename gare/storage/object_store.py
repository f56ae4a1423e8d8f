"""S3-compatible storage opened by pyarrow, with endpoint and region from where boto3 takes them.

pyarrow reads credentials from the standard places (environment, profile, instance role), but ignores
AWS_ENDPOINT_URL if a file system is made by its constructor, and gives no control over retries if it is made
from a URI.
"""

from __future__ import annotations

import os
import urllib.parse
from dataclasses import dataclass
from functools import lru_cache

from pyarrow import fs as pafs

from gare.errors import DataError, without_secrets

#: Times that a request is tried again, with growing pauses of 51 s in all, before a lost connection or 5xx is
#: an error.
MAX_RETRIES = 11
CONNECT_TIMEOUT_S = 10.0
#: Region for a custom endpoint; without one, AWS tells the region of a bucket.
_DEFAULT_REGION = "us-east-1"
_QUERY_KEYS = ("region", "scheme", "endpoint_override")


@dataclass(frozen=True)
class S3Address:
    """Bucket and key of an object, and the server that has them.

    Attributes:
        bucket: name of the bucket.
        key: of the object or folder, without a slash at its end.
        region: of the bucket.
        scheme: https or http.
        host: of the server, with its port; empty for AWS.
        credentials: environment variables that tell credentials apart, as a cache key; the SDKs read the
            credentials themselves.
    """

    bucket: str
    key: str
    region: str
    scheme: str
    host: str
    credentials: tuple[str, ...]

    @property
    def endpoint(self) -> str:
        """URL of the server; empty for AWS."""
        return f"{self.scheme}://{self.host}" if self.host else ""


def open_s3(uri: str) -> tuple[pafs.FileSystem, str]:
    """Returns the file system of ``s3://bucket/key`` and the path inside it, bucket first.

    Raises:
        DataError: as ``address_of``.
        OSError: as ``address_of``.
    """
    found = address_of(uri)
    path = f"{found.bucket}/{found.key}" if found.key else found.bucket
    return _file_system(found.region, found.scheme, found.host, found.credentials), path


def address_of(uri: str) -> S3Address:
    """Parses ``s3://bucket/key`` and completes it from the environment.

    The query may have region, scheme and endpoint_override, as pyarrow's own URIs. Else the endpoint is
    AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, and the region AWS_REGION or AWS_DEFAULT_REGION, or the bucket's.

    Raises:
        DataError: for a URI that names no bucket, holds credentials or has another query.
        OSError: if the region of a bucket cannot be found out.
    """
    rest, _, query_text = uri.partition("://")[2].partition("?")
    bucket, _, key = rest.partition("/")
    query = dict(urllib.parse.parse_qsl(query_text, keep_blank_values=True))
    if "@" in bucket:
        raise DataError(
            "holds a name or password",
            where=without_secrets(uri),
            accepted="s3://bucket/key; credentials belong into the environment or ~/.aws/credentials",
        )
    if not bucket or " " in bucket or set(query) - set(_QUERY_KEYS):
        raise DataError(
            "names no bucket" if not bucket or " " in bucket else "has a query with other keys",
            where=without_secrets(uri),
            accepted=f"s3://bucket/key, with no query or one of {', '.join(_QUERY_KEYS)}",
        )
    endpoint = query.get("endpoint_override") or _environment("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    scheme, separator, host = endpoint.rpartition("://")
    scheme = query.get("scheme") or (scheme if separator else "https")
    if scheme not in ("http", "https"):
        raise DataError(
            f"the endpoint's scheme is {scheme!r}", where=without_secrets(endpoint), accepted="http or https"
        )
    region = query.get("region") or _environment("AWS_REGION", "AWS_DEFAULT_REGION")
    if not region:
        region = _DEFAULT_REGION if endpoint else _region_of(bucket)
    key = urllib.parse.unquote(key).rstrip("/")
    return S3Address(bucket, key, region, scheme, host.rstrip("/"), _credentials())


def _environment(*names: str) -> str:
    return next((value for name in names if (value := os.environ.get(name))), "")


def _credentials() -> tuple[str, ...]:
    """Builds a cache key that tells credentials apart; the SDK itself reads the credentials."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "AWS_PROFILE")
    return tuple(os.environ.get(name, "") for name in names)


@lru_cache(maxsize=64)
def _region_of(bucket: str) -> str:
    return str(pafs.resolve_s3_region(bucket))


@lru_cache(maxsize=16)
def _file_system(region: str, scheme: str, endpoint: str, credentials: tuple[str, ...]) -> pafs.S3FileSystem:
    del credentials  # only part of the cache key
    return pafs.S3FileSystem(
        region=region,
        scheme="http" if scheme == "http" else "https",
        endpoint_override=endpoint or None,
        connect_timeout=CONNECT_TIMEOUT_S,
        # Not the standard strategy: its budget of tries is used up after an outage, and the client then gives
        # up at the first connection that is lost. This one counts each request's tries by themselves.
        retry_strategy=pafs.AwsDefaultS3RetryStrategy(max_attempts=MAX_RETRIES),
        # allow_delayed_open stays false: every file is uploaded in parts and appears with the last request.
        # With it there are fewer requests, but after a failed one pyarrow 25 puts an empty object there.
    )
