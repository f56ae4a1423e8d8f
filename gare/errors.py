"""Errors a person can act on: what is wrong, where, and what would be accepted."""

from __future__ import annotations

import re
import urllib.parse
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
    return mask_secrets(f"{scheme}://{host.rpartition('@')[2]}{slash}{path}")


#: Between ``://`` and ``@``. A database's password may hold '/', '?' and '#', as SQLAlchemy reads it.
_USER = r"://[^/?#\s'\"]*@"
_DATABASE_USER = r"((?:postgresql|mysql|mariadb|mssql|oracle)(?:\+\w+)?)://[^\s'\"]*@"
#: The same with signs that are percent-encoded, once or more often, as in a URI inside another's query.
_ENCODED_USER = (
    r"(?i)((?::|%(?:25)*3A)(?:/|%(?:25)*2F){2})(?:(?!%(?:25)*2F)[^/?#&\s'\"])*?(@|%(?:25)*40)"
    r"(?!(?:(?!%(?:25)*2F)[^/?#&\s'\"])*(?:@|%(?:25)*40))"
)
#: A query's key with the equals sign, plain or percent-encoded; and its value. Tokens of some servers have
#: keys of their own, after '~'.
_KEY = re.compile(
    r"(?i)(?:[?&;#~]|%(?:25)*(?:3F|26|3B|23|7E))((?:(?!%(?:25)*(?:3F|26|3B|23|3D))[^=?&;#\s'\"])+)"
    r"(?:=|%(?:25)*3D)(?=[^&\s'\"])"
)
_VALUE = re.compile(r"[^&\s'\"]+")
_SECRET_WORDS = re.compile(
    r"token|secret|passw|passphrase|pwd|key|sig|auth|credential|hmac|jwt|bearer|cookie"
    r"|^(?:pass|pw|sas|j?sessionid)$"
)
#: Words that hold one of these and are none; they are taken out of a key first.
_INNOCENT_WORDS = re.compile(
    r"design|assign|insight|signal|sigma|author(?!i[sz])|keyword|keyframe|keyboard|keyspace|monkey|hockey"
)
#: Keys of databases that name a file or a way to log in.
_DATABASE_KEYS = ("sslkey", "ssl_key", "authentication", "auth_plugin", "authenticator", "require_auth")
#: What pyarrow takes in the query of an S3 URI and is no secret.
_S3_KEYS = (
    *("region", "scheme", "endpoint_override", "anonymous", "allow_bucket_creation", "allow_bucket_deletion"),
    *("connect_timeout", "request_timeout", "background_writes", "force_virtual_addressing"),
)
#: Times that a URI may be encoded inside another.
_LEVELS = 4


def mask_secrets(text: str) -> str:
    """Replaces the name, password and query secrets of every URI in a text by ``***``.

    That includes URIs inside the query of another, and percent-encoded ones.
    """
    text = re.sub(_DATABASE_USER, r"\1://***@", text)
    text = re.sub(_ENCODED_USER, r"\1***\2", re.sub(_USER, "://***@", text))
    parts, end = [], 0
    for key in _KEY.finditer(text):
        if key.start() >= end and _is_secret(key[1]) and (value := _VALUE.match(text, key.end())):
            parts += [text[end : key.end()], "***"]
            end = value.end()
    return "".join((*parts, text[end:]))


def _is_secret(key: str) -> bool:
    """True if the name of a query's key says that its value is a secret, in whole or in part of a word."""
    name = _decoded(key)[-1].lower()
    return name not in _DATABASE_KEYS and bool(_SECRET_WORDS.search(_INNOCENT_WORDS.sub("", name)))


def _decoded(text: str) -> list[str]:
    """Returns a text and what is left as its percent-encoding is taken off, layer by layer."""
    layers = [text]
    while len(layers) < _LEVELS and (inner := urllib.parse.unquote(layers[-1])) != layers[-1]:
        layers.append(inner)
    return layers


def secret_in(uri: str) -> str:
    """Names the secret in a URI, which belongs into the environment; empty if there is no secret.

    A database's user alone, ``postgresql://USER@HOST/DB``, is not a secret; a web server's may be a token.
    The query of an S3 URI may have known keys only. A local path has no query, but may hold a URI.
    """
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    rest = uri
    if found and re.match(_DATABASE_USER, uri):
        if re.match(r"[a-z0-9+_]+://[^:/@\s]*:[^@\s]*@", uri):
            return "a password"
        rest = uri[found.end() :]
    if any(re.search(_USER, layer) for layer in _decoded(rest)):
        return "a name or password"
    if not found:
        return ""
    if found[1].lower() == "s3":
        query = urllib.parse.parse_qsl(uri.partition("?")[2])
        if unknown := [key for key, _ in query if key not in _S3_KEYS]:
            return f"what may be a secret, {unknown[0]}, a key that no S3 URI has"
    keys = (found[1] for layer in _decoded(uri) for found in _KEY.finditer(layer))
    secret = next((key for key in keys if _is_secret(key)), "")
    return f"a secret in its query, {_decoded(secret)[-1]}" if secret else ""
