"""A YAML loader that keeps values as they were typed and refuses repeated keys.

PyYAML silently keeps the last of repeated keys, and reads by YAML 1.1: 010 as 8, 1:30 as 90, no as false,
2024-01-05 as a date. What a value means depends on its key, which only ``gare.config.typed_values`` knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

#: Notations of numbers that YAML 1.1 reads, and a person may not.
_NOTATIONS = {
    "an octal number": re.compile(r"[-+]?0[0-7_]+"),
    "a binary number": re.compile(r"[-+]?0b[0-1_]+"),
    "a hexadecimal number": re.compile(r"[-+]?0x[0-9a-fA-F_]+"),
    "a number in base 60": re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"),
}
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Typed:
    """A number, switch or date without quotes.

    Attributes:
        text: characters in the file or on the command line.
        value: the value that YAML gives them; a date stays a text.
    """

    text: str
    value: Any

    @property
    def notation(self) -> str:
        """Name of the notation of a number that is not plainly decimal; empty for all others."""
        if isinstance(self.value, str | bool):
            return ""
        return next((name for name, form in _NOTATIONS.items() if form.fullmatch(self.text)), "")


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that refuses repeated keys and keeps the text of plain values."""


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            continue  # refused below: it is no key in Python
        if key_node.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
            )
        seen.add(key_node.value)
    mapping = loader.construct_mapping(node, deep=True)
    return {key.value if isinstance(key, Typed) else key: value for key, value in mapping.items()}


def _keeping_text(read: Callable[[Any, yaml.ScalarNode], Any]) -> Callable[[_Loader, yaml.ScalarNode], Typed]:
    def construct(loader: _Loader, node: yaml.ScalarNode) -> Typed:
        try:
            value = read(loader, node)
        except (ValueError, KeyError, IndexError):  # 0x_, !!bool maybe, more digits than Python takes
            value = node.value
        return Typed(str(node.value), value)

    return construct


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)
_Loader.add_constructor(f"{_TAG}int", _keeping_text(yaml.SafeLoader.construct_yaml_int))
_Loader.add_constructor(f"{_TAG}float", _keeping_text(yaml.SafeLoader.construct_yaml_float))
_Loader.add_constructor(f"{_TAG}bool", _keeping_text(yaml.SafeLoader.construct_yaml_bool))
_Loader.add_constructor(f"{_TAG}timestamp", _keeping_text(yaml.SafeLoader.construct_scalar))


def load_yaml(text: str) -> Any:
    """Parses a YAML document; numbers, switches and dates without quotes come as ``Typed``.

    Raises:
        yaml.YAMLError: for text that is not YAML, nested too deeply, or with a key that is given twice.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
