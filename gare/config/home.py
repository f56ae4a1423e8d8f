"""The home folder, which a container or a service may lack: HOME is not set, and passwd has no such user."""

from __future__ import annotations

import os
from pathlib import Path

from gare.errors import ConfigError


def absolute_path(location: str) -> str:
    """Makes a local path absolute, with ``~`` for the home folder.

    Raises:
        ConfigError: for a path below a home folder that is not known.
    """
    try:
        return str(Path(location).expanduser().absolute())
    except RuntimeError as error:
        raise ConfigError(
            "is below a home folder that is not known",
            where=location,
            accepted="an absolute path (GARE_ROOT or storage.root for the outputs), or HOME set to a folder",
        ) from error


def require_home() -> None:
    """Checks that there is a home folder, without which MLflow and Ray end with traces.

    Raises:
        ConfigError: if there is none.
    """
    if os.path.expanduser("~") == "~":  # noqa: PTH111 (Path.home raises RuntimeError)
        raise ConfigError(
            "is not set, and this user has no entry in passwd", where="HOME", accepted="a folder of your own"
        )
