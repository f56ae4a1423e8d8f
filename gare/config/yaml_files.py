"""Files of settings: found by path or by the name of a shipped one, and merged over those they extend."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gare.config.strict_yaml import load_yaml
from gare.errors import ConfigError, masked

#: The settings that come with this repository.
SHIPPED = Path(__file__).resolve().parents[2] / "conf"
#: The top-level key of a file that names the file it is merged over.
EXTENDS = "extends"

_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Settings:
    """Settings of a file and of all that it extends, not checked yet.

    Attributes:
        tree: sections by name; not always a mapping, since a file may hold anything.
        path: the file that was asked for.
        origins: dotted key → file, of sections and values that an extended file alone gave.
        extended: the files below it, the one that it extends first.
    """

    tree: Any
    path: str
    origins: Mapping[str, str] = field(default_factory=dict)
    extended: tuple[str, ...] = ()


def read_settings(name: str | Path) -> Settings:
    """Reads a file of settings, merged key by key over the file that its ``extends`` names, and so on.

    Args:
        name: a path, or the name of a shipped file with or without ``.yaml``; a file that is there wins.

    Raises:
        ConfigError: for a file that is missing, no YAML, or extends itself or what is no file.
    """
    if not str(name):
        raise ConfigError(
            "no file is named",
            where="configuration",
            accepted=f"a YAML file such as conf/demo.yaml, or one of: {', '.join(shipped_files())}",
        )
    path = _found(name, Path(), where="")
    return _read(path, (path.resolve(),))


def shipped_files() -> dict[str, Path]:
    """Lists the shipped files by name, without ``.yaml``; none where they were not installed."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"), key=lambda path: path.stem)}


def _found(name: str | Path, folder: Path, where: str) -> Path:
    """Finds the file that a path below the folder, or the name of a shipped one, means."""
    path, given = folder / name, str(name)
    # A folder of data that is called like a benchmark is not what is meant.
    if path.is_file() or not _NAME.fullmatch(given):
        return path
    shipped = shipped_files()
    # Looked up, never joined: a name leads to no other folder.
    if known := shipped.get(given.removesuffix(".yaml")):
        return known
    near = difflib.get_close_matches(given.removesuffix(".yaml"), shipped, n=1)
    raise ConfigError(
        f"{EXTENDS}: there is no file {path} and no shipped one of this name"
        if where
        else "cannot be read: there is no such file, and no shipped one of this name",
        where=where or given,
        accepted="a YAML file such as conf/demo.yaml, or one of: "
        + ", ".join(shipped)
        + (f"; nearest: {near[0]}" if near else ""),
    )


def _read(path: Path, chain: tuple[Path, ...]) -> Settings:
    """Reads a file, merged over what it extends; the chain are the files that led here, this one last."""
    where = str(path)
    tree = _yaml_of(path)
    if not isinstance(tree, Mapping) or EXTENDS not in tree:
        return Settings(tree, where)
    tree = dict(tree)
    base = tree.pop(EXTENDS)
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"{EXTENDS}: got {masked(repr(base))}",
            where=where,
            accepted="a path, seen from this file, or the name of a shipped file such as msrvtt",
        )
    found = _found(base, path.parent, where)
    if not found.is_file():
        raise ConfigError(
            f"{EXTENDS}: there is no file {found}", where=where, accepted="a path, seen from this file"
        )
    if found.resolve() in chain:
        circle = [one.name for one in (*chain[chain.index(found.resolve()) :], found)]
        raise ConfigError(
            f"{EXTENDS}: goes in a circle: {' → '.join(circle)}",
            where=where,
            accepted="a last file that extends none: take the key out of one of them",
        )
    below = _read(found, (*chain, found.resolve()))
    if not isinstance(below.tree, Mapping | None):
        raise ConfigError(
            f"top level is a {type(below.tree).__name__}", where=below.path, accepted="a mapping of sections"
        )
    # An empty section, all of whose keys are commented out, takes nothing away.
    tree = {key: value for key, value in tree.items() if value is not None}
    merged = _merged(tree, below.tree or {})
    given = set(_keys(tree))
    origins = {key: below.origins.get(key, below.path) for key in _keys(merged) if key not in given}
    return Settings(merged, where, origins, (below.path, *below.extended))


def _yaml_of(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot be read: {error}",
            where=str(path),
            accepted="a YAML file such as conf/demo.yaml, or the name of a shipped one such as msrvtt",
        ) from error
    try:
        return load_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f"is not YAML: {masked(str(error))}", where=str(path), accepted="key: value lines"
        ) from error


def _merged(over: Mapping[Any, Any], base: Mapping[Any, Any]) -> dict[Any, Any]:
    """Merges mappings key by key; all else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping | None):
            merged[key] = _merged(value or {}, below)
        else:
            merged[key] = value
    return merged


def _keys(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of sections and values."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")
