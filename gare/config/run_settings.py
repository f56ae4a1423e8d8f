"""Settings that identify a training run, read from what any version saved."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from gare.config import Config, ModelConfig, parse_config
from gare.config.loading import DEPENDENT_KEYS

#: Settings that may differ when a run continues: they change where and how it runs, not what it computes.
#: The settings of data and extract that matter are in the fingerprints.
FREE_SECTIONS = {"storage", "cluster", "tracking", "evaluate", "demo", "data", "sources", "extract"}
FREE_SECTIONS |= {"features", "upkeep"}
FREE_TRAIN_KEYS = {"resume", "overwrite", "keep_checkpoints", "max_failures", "diagnostics_every"}
FREE_TRAIN_KEYS |= {"checkpoint_every_steps", "checkpoint_every_s"}
FREE_TRAIN_KEYS |= {"diagnostics_texts", "trust_region_radius", "micro_batch", "profile"}
# They change the order of sums and when an activation is computed: only rounding, as another GPU does.
FREE_TRAIN_KEYS |= {"compile", "activation_checkpointing"}


def settings_of_run(config: Config) -> dict[str, Any]:
    """Returns the settings that identify a configuration's run, by section."""
    settings = config.model_dump(mode="json", exclude=FREE_SECTIONS)
    settings["model"] = config.model.identity()
    settings["train"] = {key: value for key, value in settings["train"].items() if key not in FREE_TRAIN_KEYS}
    return settings


def completed_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Completes a run's saved settings to what this version would have saved.

    Keys that its version did not know get their defaults: the default of a new key is the earlier behaviour.
    Keys that no longer identify a run are left out.

    Args:
        saved: the result of ``settings_of_run`` in some version.
    """
    kept = {key: value for key, value in without_idle_keys(saved).items() if key not in FREE_SECTIONS}
    if isinstance(train := kept.get("train"), Mapping):
        kept["train"] = {key: value for key, value in train.items() if key not in FREE_TRAIN_KEYS}
    completed = _filled(kept, settings_of_run(Config()))
    with suppress(ValidationError):  # from a version with other keys; a comparison reports it
        completed["model"] = ModelConfig.model_validate(completed["model"]).identity()
    return completed


def saved_config(tree: Any, *, where: str) -> Config:
    """Parses a configuration that some version saved with all its keys, such as a checkpoint's.

    Raises:
        ConfigError: with every fault in one message.
    """
    return parse_config(without_idle_keys(tree) if isinstance(tree, Mapping) else tree, where=where)


def without_idle_keys(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns saved settings without keys that only affect a part which is turned off.

    Such a key was saved with its version's default. If the default has changed since, the key would be
    refused as one that changes nothing, or be taken for a difference.
    """
    kept = dict(saved)
    for name, switch, off, keys in DEPENDENT_KEYS:
        section = kept.get(name)
        if isinstance(section, Mapping) and switch in section and section[switch] in off:
            kept[name] = {key: value for key, value in section.items() if key not in keys}
    return kept


def _filled(saved: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    filled = {**defaults, **saved}
    for key, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(filled[key], Mapping):
            filled[key] = _filled(filled[key], default)
    return filled
