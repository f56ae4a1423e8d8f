"""Locations of MLflow's records and files: tracking URIs, with credentials and masked."""

from __future__ import annotations

import math
import socket
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from gare.errors import ConfigError, mask_secrets

#: Databases that MLflow can use without a server.
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_ACCEPTED = (
    "sqlite:///FILE.db, http(s)://HOST:PORT of an MLflow server, or postgresql+psycopg2://USER@HOST/DB"
)


def resolve_tracking_uri(uri: str, root: str) -> str:
    """Makes a relative SQLite path absolute, below the storage root; returns other URIs unchanged.

    Args:
        uri: the configured tracking URI, such as ``sqlite:///mlflow.db``.
        root: the storage root, a folder or an ``s3://`` URI.

    Raises:
        ConfigError: for a store that MLflow cannot use, or a relative SQLite file below a remote root.
    """
    scheme = scheme_of(uri)
    if scheme in ("http", "https"):
        if not urlsplit(uri).hostname:
            raise ConfigError(
                f"{mask_secrets(uri)!r} names no host", where="tracking.uri", accepted=_ACCEPTED
            )
        return uri
    if scheme not in DATABASES:
        raise ConfigError(
            f"{mask_secrets(uri)!r} is no MLflow store", where="tracking.uri", accepted=_ACCEPTED
        )
    if scheme != "sqlite":
        return uri
    prefix, separator, path = uri.partition(":///")
    path, question, query = path.partition("?")
    if not separator or not path or path == ":memory:":
        raise ConfigError(f"{uri!r} names no file", where="tracking.uri", accepted=_ACCEPTED)
    if not path.startswith("/"):
        folder = local_folder(root)
        if folder is None:
            raise ConfigError(
                f"{uri!r} is relative, and an SQLite file cannot lie below the remote root {root!r}",
                where="tracking.uri",
                accepted="an MLflow server, http://HOST:PORT, or an absolute local path, sqlite:////FOLDER/FILE.db",
            )
        # Of the folder's own signs; those of the setting are a URI's already.
        encoded = _encoded(folder)
        path = f"{encoded}/{path}"
        if "%" in encoded:
            # With the driver named MLflow does not make a folder of the encoded name.
            prefix = "sqlite+pysqlite"
    return f"{prefix}:///{path}{question}{query}"


def scheme_of(uri: str) -> str:
    """Returns the scheme, ``postgresql`` for ``postgresql+psycopg2://…``; empty if there is none."""
    return uri.partition(":")[0].partition("+")[0].lower() if ":" in uri else ""


def sqlite_file(uri: str) -> Path:
    """Returns the file of a resolved ``sqlite:///`` URI, as SQLAlchemy finds it."""
    return Path(unquote(uri.partition(":///")[2].partition("?")[0]))


def _encoded(folder: Path) -> str:
    """Percent-encodes the signs that would end a URI's path or be decoded in it."""
    return str(folder).rstrip("/").translate({ord(sign): quote(sign) for sign in "%?#"})


def local_folder(root: str) -> Path | None:
    """Returns the storage root as an absolute folder of this machine; None for a remote one."""
    if root.startswith("file://"):
        root = urlsplit(root).path
    return None if "://" in root else Path(root).expanduser().absolute()


def artifact_root(root: str) -> str:
    """Returns the URI below which MLflow keeps its files if no server decides that."""
    folder = local_folder(root)
    return f"{root.rstrip('/')}/mlartifacts" if folder is None else (folder / "mlartifacts").as_uri()


def check_port(uri: str, timeout_s: float) -> None:
    """Raises OSError if nothing listens at a database's address."""
    parts = urlsplit(uri)
    default = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}[scheme_of(uri)]
    with socket.create_connection((parts.hostname or "localhost", parts.port or default), timeout_s):
        pass


def json_number(value: float) -> float | str:
    """Returns a value that JSON can hold: infinities and NaN as strings, as protocol buffers spell them."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
