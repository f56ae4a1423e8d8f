"""Settings that identify a training run, read from what any version saved."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from gare.config import Config, ModelConfig, Section, parse_config
from gare.config.loading import without_idle_keys
from gare.config.section import Mark


def completed_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Completes a run's saved settings to what this version would have saved.

    Keys that its version did not know get their defaults: the default of a new key is the earlier behaviour.
    Keys that no longer identify a run are left out.

    Args:
        saved: the result of ``Config.identity`` in some version.
    """
    completed = _filled(_without_free_keys(without_idle_keys(saved), Config), Config().identity())
    with suppress(ValidationError):  # from a version with other keys; a comparison reports it
        completed["model"] = ModelConfig.model_validate(completed["model"]).identity()
    return completed


def saved_config(tree: Any, *, where: str) -> Config:
    """Parses a configuration that some version saved with all its keys, such as a checkpoint's.

    Raises:
        ConfigError: with every fault in one message.
    """
    return parse_config(without_idle_keys(tree) if isinstance(tree, Mapping) else tree, where=where)


def _without_free_keys(saved: Mapping[str, Any], section: type[Section]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in saved.items():
        field = section.model_fields.get(key)
        if field and Mark.FREE in field.metadata:
            continue
        inner = field.annotation if field else None
        if isinstance(value, Mapping) and isinstance(inner, type) and issubclass(inner, Section):
            value = _without_free_keys(value, inner)
        kept[key] = value
    return kept


def _filled(saved: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    filled = {**defaults, **saved}
    for key, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(filled[key], Mapping):
            filled[key] = _filled(filled[key], default)
    return filled
