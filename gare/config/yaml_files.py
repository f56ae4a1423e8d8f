"""Settings files, found by path or by the name of a shipped file, and merged over those they extend."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gare.config.strict_yaml import Typed, load_yaml
from gare.errors import ConfigError, mask_secrets

#: The settings that come with this repository.
SHIPPED = Path(__file__).resolve().parents[2] / "conf"
#: The top-level key of a file that names the file it is merged over.
EXTENDS = "extends"

_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Settings:
    """Unchecked settings of a file, merged over all that it extends.

    Attributes:
        tree: sections by name; not always a mapping, since a file may hold anything.
        path: the file that was asked for.
        origins: dotted key → file, for sections and values that only an extended file sets.
        extended: the files that it extends, nearest first.
    """

    tree: Any
    path: str
    origins: Mapping[str, str] = field(default_factory=dict)
    extended: tuple[str, ...] = ()


def read_settings(name: str | Path) -> Settings:
    """Reads a settings file, merged key by key over the file that its ``extends`` names, recursively.

    Args:
        name: a path, or the name of a shipped file with or without ``.yaml``; an existing file takes
            precedence.

    Raises:
        ConfigError: for a file that is missing, is not YAML, or extends itself or a missing file.
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
    """Returns the shipped files by name, without ``.yaml``; empty if they are not installed."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"), key=lambda path: path.stem)}


def _found(name: str | Path, folder: Path, where: str) -> Path:
    """Resolves a path relative to the folder, or the name of a shipped file."""
    path, given = folder / name, str(name)
    # Only files count: a data folder may have the name of a shipped file.
    if path.is_file() or not _NAME.fullmatch(given):
        return path
    shipped = shipped_files()
    # Looked up, never joined to a path: a name cannot lead to another folder.
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
    """Reads a file, merged over what it extends; ``chain`` holds the files that led here, this one last."""
    where = str(path)
    tree = _yaml_of(path)
    if not isinstance(tree, Mapping) or EXTENDS not in tree:
        return Settings(tree, where)
    tree = dict(tree)
    base = tree.pop(EXTENDS)
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"{EXTENDS}: got {base.text if isinstance(base, Typed) else mask_secrets(repr(base))}",
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
    # An empty section (all keys commented out) overrides nothing.
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
    except yaml.YAMLError as error:
        raise ConfigError(
            f"is not YAML: {mask_secrets(str(error))}", where=str(path), accepted="key: value lines"
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
    """Yields the dotted keys of sections and values."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")
