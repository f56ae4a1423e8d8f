"""Server class for videos in S3 and S3-compatible stores.

Credentials, region and endpoint are found as boto3 does: environment (with AWS_ENDPOINT_URL),
profile, instance or pod role.
"""

from __future__ import annotations

import bisect
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property, partial
from typing import Any, TypeAlias

from cluster.sources.attempts import TransientError, is_refused, is_transient
from cluster.sources.contract import CHUNK_BYTES, Answer, RemoteVersion, md5_in, start_in, total_in
from gare.config import SourcesConfig
from gare.errors import FetchError, GoneError, without_secrets
from gare.storage.s3_client import s3_client

#: Objects, on average, that a page of a list has to bring, for it to be asked for.
KEYS_A_REQUEST = 8
#: Makes a request, with the seconds that its answer may take.
Call: TypeAlias = Callable[[Callable[[float], Any]], Any]
#: S3 error codes that call for a retry, whatever their HTTP status.
_TRANSIENT_CODES = frozenset(
    {"InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException"}
)
#: S3 error codes that refuse the client, besides the statuses 401 and 403.
_REFUSED_CODES = frozenset({"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"})
_REASONS = {
    403: ("access is denied", "credentials that may read it, or sources.anonymous=true for a public bucket"),
    404: ("there is no such object", "an object that exists"),
}


class S3Server:
    """Objects named ``s3://bucket/key``, with '?' and '%' in keys percent-encoded.

    Args:
        sources: settings of time limits and anonymous access.
        connections: maximum number of concurrent requests.
    """

    def __init__(self, sources: SourcesConfig, connections: int) -> None:
        self._sources = sources
        self._connections = connections

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._sources, self._connections)

    @cached_property
    def _client(self) -> Any:
        return s3_client(
            timeout_s=self._sources.timeout_s,
            # Tries are counted in one place, for both kinds of server.
            attempts=1,
            connections=self._connections,
            anonymous=self._sources.anonymous,
        )

    def stat(self, uri: str, timeout_s: float) -> RemoteVersion:
        """Returns size and ETag, by a HEAD request."""
        del timeout_s  # a setting of the client
        bucket, key = split(uri)
        with _faults(uri):
            found = self._client.head_object(Bucket=bucket, Key=key)
        return RemoteVersion(found["ContentLength"], _etag(found))

    def listed(self, bucket: str, keys: Sequence[str], call: Call) -> dict[str, RemoteVersion]:
        """Returns size and ETag of objects by key, as far as listing them takes fewer requests than asking.

        Args:
            bucket: of the objects.
            keys: of one folder, sorted by their UTF-8 bytes.
            call: makes each request, and repeats it if it fails for what may pass.

        Raises:
            FetchError: if the listing is refused.
        """
        prefix = "".join(keys[0].rpartition("/")[:2])
        found: dict[str, RemoteVersion] = {}
        wanted, place = set(keys), 0
        order, last = [key.encode() for key in keys], ""
        # Where other objects lie between them, one request for each is less than a list of all.
        for _ in range(len(keys) // KEYS_A_REQUEST + 1):
            # The last character is left out, since the list begins behind what it starts after; what came
            # already may lie behind that, and would come again.
            start = max(keys[place][:-1], last, key=str.encode)
            page = call(partial(self._page, bucket, prefix, start))
            entries = page.get("Contents", ())
            for entry in entries:
                if entry["Key"] in wanted:
                    found[entry["Key"]] = RemoteVersion(entry["Size"], _etag(entry))
            if not entries or not page.get("IsTruncated"):
                break
            last = entries[-1]["Key"]
            place = bisect.bisect_right(order, last.encode())
            if place == len(keys):
                break
        return found

    def _page(self, bucket: str, prefix: str, start: str, timeout_s: float) -> Any:
        del timeout_s  # a setting of the client
        with _faults(f"s3://{bucket}/{urllib.parse.quote(prefix)}"):
            return self._client.list_objects_v2(
                Bucket=bucket, Prefix=prefix, **({"StartAfter": start} if start > prefix else {})
            )

    @contextmanager
    def get(self, uri: str, start: int, version: str, timeout_s: float) -> Iterator[Answer]:
        """Yields the object from ``start``, if its ETag is still ``version``."""
        del timeout_s
        bucket, key = split(uri)
        condition = {"Range": f"bytes={start}-", "IfMatch": version} if start else {}
        with _faults(uri):
            found = self._client.get_object(Bucket=bucket, Key=key, **condition)
        content_range = found.get("ContentRange") or ""
        with closing(found["Body"]) as body:
            yield Answer(
                start=(start_in(content_range) or 0) if content_range else 0,
                size_bytes=total_in(content_range) if content_range else found["ContentLength"],
                version=_etag(found),
                md5=_md5(found),
                chunks=_chunks(body, uri),
            )

    def list(self, uri: str) -> list[str]:
        """Returns the keys of all objects below a folder, relative to it, sorted.

        Raises:
            TransientError: if the listing was disturbed.
            FetchError: if it is refused.
        """
        bucket, folder = split(uri)
        prefix = folder.rstrip("/") + "/" if folder else ""
        with _faults(uri):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        # Some tools create empty objects as placeholders of folders.
        return sorted(key.removeprefix(prefix) for key in keys if not key.endswith("/"))


def split(uri: str) -> tuple[str, str]:
    """Returns bucket and key of a URI.

    Raises:
        FetchError: for a URI without a bucket, with credentials or with a query.
    """
    rest, mark, _ = uri.partition("://")[2].partition("?")
    bucket, _, key = rest.partition("/")
    if not bucket or "@" in bucket or mark:
        fault = "has a query" if mark else "holds a name or password"
        raise FetchError(
            fault if bucket else "names no bucket",
            where=without_secrets(uri),
            accepted="s3://bucket/key, '?' in a key written %3F; credentials, AWS_REGION and "
            "AWS_ENDPOINT_URL belong into the environment",
        )
    return bucket, urllib.parse.unquote(key)


def _chunks(body: Any, uri: str) -> Iterator[bytes]:
    with _faults(uri):
        yield from body.iter_chunks(CHUNK_BYTES)


def _etag(found: dict[str, Any]) -> str:
    return str(found.get("ETag") or "").strip('"') or str(found.get("LastModified") or "")


def _md5(found: dict[str, Any]) -> str:
    if found.get("SSECustomerAlgorithm"):
        return ""
    return md5_in(_etag(found), found.get("ServerSideEncryption") or "")


@contextmanager
def _faults(uri: str) -> Iterator[None]:
    """Turns boto3's exceptions into a TransientError or a FetchError with a one-line reason."""
    import urllib3
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        raise _answered(error, uri) from error
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise FetchError(
            "there are no credentials for S3",
            where=without_secrets(uri),
            accepted="AWS_ACCESS_KEY_ID with its secret, a profile, a role, or sources.anonymous=true",
        ).as_transient() from error
    except exceptions.SSLError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            fault = FetchError(
                "the certificate of the S3 endpoint is not trusted", where=without_secrets(uri)
            )
            raise fault.as_transient() from error
        raise TransientError("the connection was lost") from error
    except (exceptions.ConnectTimeoutError, exceptions.ReadTimeoutError) as error:
        raise TransientError("there was no answer in time") from error
    except exceptions.EndpointConnectionError as error:
        raise TransientError("the S3 endpoint cannot be connected to") from error
    except (
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
        exceptions.ResponseStreamingError,
        exceptions.FlexibleChecksumError,
        urllib3.exceptions.HTTPError,
        OSError,
    ) as error:
        raise TransientError("the connection was lost") from error
    except exceptions.BotoCoreError as error:
        # For example an invalid bucket name; raised before any request, so it contains no secret.
        words = " ".join(str(error).split())[:300]
        raise FetchError(f"the S3 request is invalid: {words}", where=without_secrets(uri)) from error


def _answered(error: Any, uri: str) -> TransientError | FetchError:
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(error.response.get("Error", {}).get("Code", ""))
    if status == 412 or code == "PreconditionFailed":
        return TransientError("it changed while it was fetched", anew=True)
    if is_transient(status) or code in _TRANSIENT_CODES:
        return TransientError(f"S3 answers {code if not code.isdigit() else status}")
    reason, accepted = _REASONS.get(status, ("", ""))
    kind = GoneError if status == 404 else FetchError
    fault = kind(
        f"{reason} (S3 answers {code})" if reason else f"S3 answers {code}",
        where=without_secrets(uri),
        accepted=accepted,
    )
    return fault.as_transient() if is_refused(status) or code in _REFUSED_CODES else fault
