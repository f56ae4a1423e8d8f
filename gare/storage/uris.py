"""Parts of a location: whether it is a URI, its scheme, the path or the names in it."""

from __future__ import annotations

import os
import re
import urllib.parse
from pathlib import Path

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def scheme_of(location: str) -> str:
    """Returns the scheme in lower case; ``file`` for a local path, which has none."""
    found = _SCHEME.match(location)
    return found[1].lower() if found else "file"


def is_uri(location: str) -> bool:
    """Returns True for the form ``scheme://…``; all else is a local path."""
    return _SCHEME.match(location) is not None


def local_path(location: str) -> str:
    """Returns the absolute path that a local path or a ``file://`` URI means.

    Names in a URI are percent-encoded; a URI that was written without encoding is found too.
    """
    if not is_uri(location):
        return str(Path(os.path.expanduser(location)).absolute())  # noqa: PTH111 (no error without a home)
    path = location.partition("://")[2].removeprefix("localhost")
    return path if Path(path).exists() else urllib.parse.unquote(path)
