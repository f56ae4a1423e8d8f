"""Errors a person can act on: what is wrong, where, and what would be accepted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Self


class GareError(Exception):
    """A fault with one clear message.

    Attributes:
        what: what is wrong, with the offending value.
        where: the file, key or row id that holds it; empty where there is none.
        accepted: what would be accepted instead, or the next step to take.
        result: what a command prints on stdout despite the error, such as a requested list of faults; None
            for nothing. It is not pickled with the error.
    """

    result: Mapping[str, Any] | None = None
    #: Process exit status of a pipeline that ends with this error.
    exit_code = 4
    #: True if a retry may succeed: a server, disk or node was at fault, not the data.
    is_transient = False

    def __init__(self, what: str, *, where: str = "", accepted: str = "") -> None:
        self.what = what
        self.where = where
        self.accepted = accepted
        message = f"{where}: {what}" if where else what
        if accepted:
            message = f"{message} ({accepted})"
        super().__init__(message)

    def __reduce__(self) -> tuple[object, ...]:
        # Exception pickles its positional arguments only, which would lose where and accepted on the
        # way from a worker to the driver.
        return _rebuild, (type(self), self.what, self.where, self.accepted, self.is_transient)

    def as_transient(self) -> Self:
        """Marks the error as one that may pass, and returns it."""
        self.is_transient = True
        return self


def _rebuild(kind: type[GareError], what: str, where: str, accepted: str, is_transient: bool) -> GareError:
    error = kind(what, where=where, accepted=accepted)
    return error.as_transient() if is_transient else error


class DivergedError(GareError):
    """A training step without a finite loss or gradient.

    All workers raise it together, and again if the step is repeated.
    """


class StoppedError(GareError):
    """A run that stopped on request, at a point where it can be continued."""


class LockLostError(GareError):
    """A store or run that another job took over during the work."""


class ConfigError(GareError):
    """A configuration or command line that cannot be run as it stands."""

    exit_code = 2


class DataError(GareError):
    """Annotations, videos or stores that are missing, malformed or do not belong together."""

    exit_code = 3


class FullDiskError(DataError):
    """A write that failed for lack of space; nothing is wrong with the data."""

    exit_code = 4


class FetchError(DataError):
    """A video that could not be fetched, whole and unchanged, to where it is decoded."""


class GoneError(FetchError):
    """A video that does not exist at its location, as opposed to one that is unavailable for the moment."""


class CheckpointError(GareError):
    """A checkpoint or weight file that is missing, truncated or of another model."""

    exit_code = 3


class DamagedError(CheckpointError):
    """A checkpoint with a file that was changed, is missing, or does not belong to it."""


def without_secrets(uri: str) -> str:
    """Returns a location without secrets, fit for messages, logs and stores.

    A URI loses what may be a secret: the name and password before its host, its query (the signature of a
    presigned URL) and its fragment. Local paths, where '?' and '#' are ordinary, stay as they are.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or "/" in scheme:
        return uri
    rest = rest.partition("?")[0].partition("#")[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


#: Between ``://`` and ``@``. A database's password may hold '/', '?' and '#', as SQLAlchemy reads it.
_USER = r"://[^/?#\s'\"]*@"
_DATABASE_USER = r"((?:postgresql|mysql|mariadb|mssql|oracle)(?:\+\w+)?)://[^\s'\"]*@"
_SECRET_KEYS = (
    "password|passwd|pwd|token|secret|sslpassword|access_key|secret_key|api_key|"
    "x-amz-signature|x-amz-credential|x-amz-security-token|x-goog-signature|sig|signature"
)
_SECRET_QUERY = rf"(?i)([?&;](?:{_SECRET_KEYS})=)[^&\s'\"]+"


def mask_secrets(text: str) -> str:
    """Replaces the name, password and query secrets of every URI in a text by ``***``."""
    text = re.sub(_DATABASE_USER, r"\1://***@", text)
    return re.sub(_SECRET_QUERY, r"\1***", re.sub(_USER, "://***@", text))


def secret_in(uri: str) -> str:
    """Names the secret in a URI, which belongs into the environment; empty if there is no secret.

    A database's user alone, ``postgresql://USER@HOST/DB``, is not a secret; a web server's may be a token.
    """
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if not found:
        return ""
    if re.match(_DATABASE_USER, uri):
        if re.match(r"[a-z0-9+_]+://[^:/@\s]*:[^@\s]*@", uri):
            return "a password"
    elif re.match(rf"[A-Za-z0-9+.-]+{_USER}", uri):
        return "a name or password"
    key = re.search(_SECRET_QUERY, uri)
    return f"a secret in its query, {key[1][1:-1]}" if key else ""
