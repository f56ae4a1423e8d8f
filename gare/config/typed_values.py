"""Values by their keys: names that look like numbers stay names, and numbers are decimal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import BaseModel

from gare.config.section import Section
from gare.config.strict_yaml import Typed, load_yaml

#: First characters of a quoted text, a list or a mapping.
_NOT_PLAIN = ("'", '"', "[", "{")


def parse_override(section: type[BaseModel], keys: Sequence[str], text: str) -> Any:
    """Parses the value of a ``section.key=value``.

    The value of a key that takes a text is that text as it stands: '#', ': ' and words such as null have no
    meaning in it. All others are YAML, and so is what begins with a quote or a bracket.

    Args:
        section: the root of the configuration.
        keys: the dotted key, in parts.
        text: all that stands behind the equals sign.

    Raises:
        yaml.YAMLError: for text that is not YAML, or has characters that YAML forbids.
    """
    text = text.strip()
    if _annotation(section, keys) is str and text[:1] not in _NOT_PLAIN:
        yaml.reader.Reader(text)  # refuses control characters
        return text
    value = load_yaml(text)
    # An empty value clears a text; YAML would read it as null, which no field accepts.
    return "" if value is None and not text else value


def settle_values(
    tree: Mapping[Any, Any], section: type[BaseModel], faults: list[str], typed: dict[str, str]
) -> dict[Any, Any]:
    """Replaces all ``Typed`` values by what their keys take: the text, or the value.

    Args:
        tree: settings of a section, with those of the sections in it.
        section: the section.
        faults: gets numbers that are not plainly decimal; they are left out.
        typed: gets dotted key → text of values that would be shown otherwise than they were typed.
    """
    return _settled(tree, section, "", faults, typed)


def _settled(
    tree: Mapping[Any, Any],
    section: type[BaseModel] | None,
    prefix: str,
    faults: list[str],
    typed: dict[str, str],
) -> dict[Any, Any]:
    settled = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        annotation = _annotation(section, [key]) if section else None
        if isinstance(value, Mapping):
            inner = annotation if _is_section(annotation) else None
            settled[key] = _settled(value, inner, f"{dotted}.", faults, typed)
        elif fault := _fault(value, annotation):
            faults.append(f"{dotted}: {fault}")
        else:
            if isinstance(value, Typed) and value.text.lstrip(".").lower() != repr(value.value).lower():
                typed[dotted] = value.text
            settled[key] = _value(value, annotation)
    return settled


def _value(value: Any, annotation: Any) -> Any:
    if isinstance(value, Typed):
        return value.text if annotation is str else value.value
    if isinstance(value, Mapping):
        return {key: _value(inner, None) for key, inner in value.items()}
    if isinstance(value, list):
        return [_value(inner, _annotation_of_items(annotation)) for inner in value]
    return value


def _fault(value: Any, annotation: Any) -> str:
    """Describes a number in a notation that people read in two ways; empty for all else."""
    if isinstance(value, list):
        return next((fault for one in value if (fault := _fault(one, _annotation_of_items(annotation)))), "")
    if not isinstance(value, Typed) or annotation is str or not value.notation:
        return ""
    meant = f"{value.value:g}" if isinstance(value.value, float) else str(value.value)
    digits = value.text.replace("_", "")
    decimal = f" or {int(digits)}" if value.notation == "an octal number" else ""
    return f"got {value.text}, which YAML takes for {value.notation}; write {meant}{decimal}"


def _annotation(section: type[BaseModel], keys: Sequence[Any]) -> Any:
    """Returns the type of a key; None for an unknown one."""
    *parents, last = keys
    for key in parents:
        inner = _annotation(section, [key])
        if not _is_section(inner):
            return None
        section = inner
    field = section.model_fields.get(last) if isinstance(last, str) else None
    return field.annotation if field else None


def _annotation_of_items(annotation: Any) -> Any:
    """Returns the type of a tuple's items; None for all else."""
    if get_origin(annotation) is not tuple:
        return None
    item = get_args(annotation)[0]
    return get_args(item)[0] if get_origin(item) is Annotated else item


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)
