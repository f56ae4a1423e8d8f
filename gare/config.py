"""The configuration: one frozen model per section, YAML first, then command-line overrides.

Every field has a default and a description; ``describe_keys`` turns them into ``--help``. Faults are
collected and reported together, by dotted key, with the value, what is accepted and the nearest valid name;
checks across keys follow once every key is right by itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    model_validator,
)

from gare.augment_section import AugmentConfig
from gare.cluster_section import ClusterConfig
from gare.data_section import DataConfig
from gare.errors import ConfigError, masked
from gare.evaluate_section import EvaluateConfig
from gare.extract_section import ExtractConfig
from gare.feature_section import FeaturesConfig, feature_faults
from gare.model_section import ClipConfig, ModelConfig
from gare.sections import DemoConfig, Name, Section, StorageConfig, TrackingConfig
from gare.sources_section import SourcesConfig
from gare.strict_yaml import load_yaml
from gare.train_section import LossConfig, TrainConfig
from gare.upkeep import UpkeepConfig

__all__ = [
    "AugmentConfig",
    "ClipConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "DemoConfig",
    "EvaluateConfig",
    "ExtractConfig",
    "FeaturesConfig",
    "LossConfig",
    "ModelConfig",
    "Section",
    "SourcesConfig",
    "StorageConfig",
    "TrackingConfig",
    "TrainConfig",
    "UpkeepConfig",
    "describe_keys",
    "differences",
    "load_config",
    "parse_config",
]


class Config(Section):
    """Everything a pipeline is told."""

    name: Name = Field("own", description="name of the data set: its outputs are below storage.root/name")
    storage: StorageConfig = Field(default_factory=StorageConfig, description="where outputs go")
    data: DataConfig = Field(default_factory=DataConfig, description="videos and captions")
    sources: SourcesConfig = Field(default_factory=SourcesConfig, description="fetching videos")
    extract: ExtractConfig = Field(default_factory=ExtractConfig, description="videos to frame store")
    upkeep: UpkeepConfig = Field(default_factory=UpkeepConfig, description="care of the stores")
    features: FeaturesConfig = Field(
        default_factory=FeaturesConfig, description="frames and captions to feature store"
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="the model")
    loss: LossConfig = Field(default_factory=LossConfig, description="the loss")
    train: TrainConfig = Field(default_factory=TrainConfig, description="training")
    augment: AugmentConfig = Field(
        default_factory=AugmentConfig, description="augmentation of training clips"
    )
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="evaluation")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="MLflow")
    cluster: ClusterConfig = Field(default_factory=ClusterConfig, description="Ray")
    demo: DemoConfig = Field(default_factory=DemoConfig, description="the demo")

    @model_validator(mode="after")
    def _store_fits_model(self) -> Config:
        faults = feature_faults(self.train, self.model, self.augment, self.features, self.evaluate)
        if self.train.freeze == "towers" and not self.model.learns_without_towers:
            faults.append(
                "train.freeze towers would leave nothing to learn: model.temporal is none, and "
                "model.increment and model.adapters are off"
            )
        if self.extract.image_size != self.model.clip.image_size:
            faults.append(
                f"extract.image_size {self.extract.image_size} differs from "
                f"model.clip.image_size {self.model.clip.image_size}"
            )
        if self.extract.num_frames != self.model.max_frames:
            faults.append(
                f"extract.num_frames {self.extract.num_frames} differs from "
                f"model.max_frames {self.model.max_frames}"
            )
        if self.train.batch_size < self.cluster.train_workers:
            faults.append(
                f"train.batch_size {self.train.batch_size} is less than "
                f"cluster.train_workers {self.cluster.train_workers}"
            )
        if self.cluster.min_workers > (self.cluster.train_workers or self.train.batch_size):
            faults.append(
                f"cluster.min_workers {self.cluster.min_workers} is more than "
                + (
                    f"cluster.train_workers {self.cluster.train_workers}"
                    if self.cluster.train_workers
                    else f"train.batch_size {self.train.batch_size}"
                )
            )
        if self.cluster.min_workers and self.cluster.placement.startswith("strict"):
            faults.append(
                f"cluster.placement {self.cluster.placement} with cluster.min_workers: Ray would choose "
                "numbers of workers that cannot be placed so"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that ``load_config`` reads back to an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies ``section.key=value`` overrides.

    Args:
        path: a YAML file whose top level is a mapping of sections.
        overrides: ``section.key=value`` strings; the value is parsed as YAML.

    Raises:
        ConfigError: for a file that cannot be read or any fault in it; all faults are in the one message.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot be read: {error}", where=str(path), accepted="a YAML file such as conf/demo.yaml"
        ) from error
    try:
        tree = load_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f"is not YAML: {masked(str(error))}", where=str(path), accepted="key: value lines"
        ) from error
    return parse_config(tree, overrides, where=str(path))


def parse_config(tree: Any, overrides: Sequence[str] = (), *, where: str = "configuration") -> Config:
    """Builds a Config from a nested mapping, such as a checkpoint's, and overrides.

    Raises:
        ConfigError: with every fault in one message.
    """
    tree = {} if tree is None else tree
    if not isinstance(tree, Mapping):
        raise ConfigError(
            f"top level is a {type(tree).__name__}", where=where, accepted="a mapping of sections"
        )
    # A section whose keys are all commented out is null in YAML.
    merged: dict[str, Any] = {key: _copy(value) for key, value in tree.items() if value is not None}
    faults = [fault for item in overrides if (fault := _apply_override(merged, item))]
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        faults += [_explain(dict(fault)) for fault in error.errors(include_url=False)]
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in faults)
        raise ConfigError(f"{len(faults)} fault{'s' * (len(faults) > 1)}:\n{lines}", where=where)
    return config


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """One line for each dotted key whose value differs between two nested mappings."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = dict.fromkeys([*old, *new])
        dotted = {key: f"{prefix}.{key}" if prefix else str(key) for key in keys}
        return [line for key in keys for line in differences(old.get(key), new.get(key), dotted[key])]
    return [] if old == new else [f"{prefix} was {old!r}, is {new!r}"]


def describe_keys() -> Iterator[tuple[str, str, str]]:
    """Yields (dotted key, default as YAML, description) of every key, in order."""
    yield from _describe(Config, "")


def _describe(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for key, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from _describe(inner, f"{prefix}{key}.")
        else:
            value = field.get_default(call_default_factory=True, validated_data={})
            default = yaml.safe_dump(value, default_flow_style=True)
            yield f"{prefix}{key}", default.removesuffix("...\n").strip(), field.description or ""


def _copy(tree: Any) -> Any:
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _apply_override(tree: dict[str, Any], item: str) -> str:
    """Sets one ``a.b=value`` in place; returns the fault, or an empty string."""
    dotted, equals, text = item.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        return f"override {masked(item)!r} is not of the form section.key=value"
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return f"override {masked(item)!r}: the value is not YAML"
    for key in keys[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    # An empty value clears a text; YAML would read it as null, which no field accepts.
    tree[keys[-1]] = "" if value is None and not text.strip() else value
    return ""


def _explain(fault: dict[str, Any]) -> str:
    location = [str(part) for part in fault["loc"]]
    dotted = ".".join(location) or "configuration"
    if fault["type"] == "extra_forbidden":
        known = _keys_beside(location)
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"nearest: {'.'.join([*location[:-1], near[0]])}; " if near else ""
        return f"{dotted}: unknown key ({hint}known here: {', '.join(known)})"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{dotted}: {masked(message)}"
    return f"{dotted}: got {masked(repr(fault['input']))}; {message[0].lower()}{message[1:]}"


def _keys_beside(location: Sequence[str]) -> list[str]:
    section: type[BaseModel] = Config
    for part in location[:-1]:
        inner = section.model_fields[part].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        section = inner
    return list(section.model_fields)
