"""The configuration: one frozen model per section, YAML first, then command-line overrides.

Every field has a default and a description; ``describe_keys`` turns them into ``--help``. Faults are
collected and reported together, by dotted key, with the value, what is accepted and the nearest valid name;
checks across keys follow once every key is right by itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from gare.config.augment import AugmentConfig
from gare.config.cluster import ClusterConfig
from gare.config.data import DataConfig
from gare.config.evaluate import EvaluateConfig
from gare.config.extract import ExtractConfig
from gare.config.features import FeaturesConfig, feature_faults, imported_faults
from gare.config.model import SIZES_READ, SIZES_UNKNOWN, ModelConfig
from gare.config.section import DemoConfig, Mark, Name, Section, StorageConfig, TrackingConfig
from gare.config.sources import SourcesConfig
from gare.config.study import StudyConfig
from gare.config.train import LossConfig, TrainConfig
from gare.config.typed_values import parse_override, settle_values
from gare.config.upkeep import UpkeepConfig
from gare.config.yaml_files import Settings, read_settings
from gare.errors import ConfigError, GareError, mask_secrets

#: Value of ``model.clip`` for which the sizes are read from the weights.
AUTO = "auto"
#: The keys that say where weights are: checked by themselves, before the sizes are known.
_PLACES = {
    "storage": ("root",),
    "features": ("weights",),
    "train": ("run", "clip_weights", "start_from"),
    "evaluate": ("checkpoint", "compare", "suite", "sync", "zero_shot"),
}


class Config(Section):
    """The complete configuration of a pipeline, one field per section."""

    name: Name = Field("own", description="name of the data set: its outputs are below storage.root/name")
    storage: Annotated[StorageConfig, Mark.FREE, Mark.UNLOGGED] = Field(
        default_factory=StorageConfig, description="where outputs go"
    )
    # What matters of data and extract is in the fingerprints of manifest and store.
    data: Annotated[DataConfig, Mark.FREE] = Field(
        default_factory=DataConfig, description="videos and captions"
    )
    sources: Annotated[SourcesConfig, Mark.FREE] = Field(
        default_factory=SourcesConfig, description="fetching videos"
    )
    extract: Annotated[ExtractConfig, Mark.FREE] = Field(
        default_factory=ExtractConfig, description="videos to frame store"
    )
    upkeep: Annotated[UpkeepConfig, Mark.FREE] = Field(
        default_factory=UpkeepConfig, description="care of the stores"
    )
    features: Annotated[FeaturesConfig, Mark.FREE] = Field(
        default_factory=FeaturesConfig, description="frames and captions to feature store"
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="the model")
    loss: LossConfig = Field(default_factory=LossConfig, description="the loss")
    train: TrainConfig = Field(default_factory=TrainConfig, description="training")
    augment: AugmentConfig = Field(
        default_factory=AugmentConfig, description="augmentation of training clips"
    )
    evaluate: Annotated[EvaluateConfig, Mark.FREE, Mark.UNLOGGED] = Field(
        default_factory=EvaluateConfig, description="evaluation"
    )
    tracking: Annotated[TrackingConfig, Mark.FREE, Mark.UNLOGGED] = Field(
        default_factory=TrackingConfig, description="MLflow"
    )
    cluster: Annotated[ClusterConfig, Mark.FREE] = Field(default_factory=ClusterConfig, description="Ray")
    demo: Annotated[DemoConfig, Mark.FREE, Mark.UNLOGGED] = Field(
        default_factory=DemoConfig, description="the demo"
    )
    study: Annotated[StudyConfig, Mark.FREE, Mark.UNLOGGED] = Field(
        default_factory=StudyConfig, description="studies"
    )

    @model_validator(mode="after")
    def _store_fits_model(self, info: ValidationInfo) -> Config:
        faults = feature_faults(self.train, self.model, self.augment, self.features, self.evaluate)
        faults += imported_faults(self.data, self.train, self.model, self.features, self.evaluate)
        learns = {
            "towers": self.model.learns_without_towers,
            "encoders": self.model.learns_without_encoders,
            "baseline": self.model.increment,
        }
        if not learns.get(self.train.freeze, True):
            faults.append(
                f"train.freeze {self.train.freeze} would leave nothing to learn: model.temporal is none or "
                "frozen, and model.increment and model.adapters are off or frozen"
            )
        if self.loss.dropout_spread and (reason := self.model.why_no_dropout_spread):
            faults.append(f"loss.dropout_spread has no form with model.{reason}")
        has_frames = not self.data.is_imported
        differs = has_frames and self.extract.image_size != self.model.clip.image_size
        if differs and info.context != SIZES_UNKNOWN:
            way_out = ", which model.clip=auto read from the weights: give no extract.image_size"
            faults.append(
                f"extract.image_size {self.extract.image_size} differs from "
                f"model.clip.image_size {self.model.clip.image_size}"
                + (way_out if info.context == SIZES_READ else "")
            )
        if has_frames and self.extract.num_frames != self.model.max_frames:
            faults.append(
                f"extract.num_frames {self.extract.num_frames} differs from "
                f"model.max_frames {self.model.max_frames}"
            )
        workers = self.cluster.train_workers
        if workers != "auto" and self.train.batch_size < workers:
            faults.append(
                f"train.batch_size {self.train.batch_size} is less than cluster.train_workers {workers}"
            )
        key, most = (
            ("train.batch_size", self.train.batch_size)
            if workers == "auto"
            else ("cluster.train_workers", workers)
        )
        if self.cluster.min_workers > most:
            faults.append(f"cluster.min_workers {self.cluster.min_workers} is more than {key} {most}")
        if self.cluster.min_workers and self.cluster.placement.startswith("strict"):
            faults.append(
                f"cluster.placement {self.cluster.placement} with cluster.min_workers: Ray would choose "
                "numbers of workers that cannot be placed so"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def has_towers(self) -> bool:
        """False if the model has no towers: it learns from imported features, which others made."""
        return not self.data.is_imported

    def to_yaml(self) -> str:
        """Returns the resolved configuration as YAML, which ``load_config`` reads back to the same values."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def logged(self) -> dict[str, Any]:
        """Returns the settings that are parameters of an MLflow run, by section."""
        return self.model_dump(mode="json", exclude=type(self).marked(Mark.UNLOGGED))


def without_idle_keys(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns saved settings without keys that only affect a part which is turned off.

    Such a key was saved with its version's default. If the default has changed since, the key would be
    refused as one that changes nothing, or be taken for a difference.
    """
    kept = dict(saved)
    for name, section in _sections():
        settings = kept.get(name)
        if isinstance(settings, Mapping):
            idle = {key for key, mark in section.idle_keys() if mark.is_met(settings)}
            kept[name] = {key: value for key, value in settings.items() if key not in idle}
    return kept


def _sections() -> Iterator[tuple[str, type[Section]]]:
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield name, field.annotation


#: Function that reads ``model.clip`` from the weights named in a configuration that has only the name and
#: ``_PLACES`` set. It returns None if the task uses no model: no key has to fit the sizes then.
SizesOf = Callable[[Config], Mapping[str, int] | None]


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, sizes_of: SizesOf | None = None
) -> Config:
    """Reads a YAML file, with the files that it extends, and applies ``section.key=value`` overrides.

    Args:
        path: a YAML file whose top level is a mapping of sections, or the name of a shipped one; its key
            ``extends`` names another file in the same way, relative to it, over which it is merged.
        overrides: ``section.key=value`` strings; the value is YAML, and for a key that takes a text the text
            as it stands, see ``gare.config.typed_values``.
        sizes_of: resolves ``model.clip: auto``, such as
            ``gare.train.checkpoint.initial_model.sizes_of_weights``; auto is refused without it. The picture
            size of the weights takes the place of a file's ``extract.image_size``, and not of one in the
            overrides.

    A switch that turns a part off, such as ``model.increment=false``, drops keys that only affect this part
    and come from a lower layer: from a file if an override turns it off, or from an extended file. Switch and
    key in the same layer are refused.

    Raises:
        CheckpointError: for weights whose sizes cannot be read.
        ConfigError: for a file that cannot be read or any fault in it; all faults are in the one message.
    """
    return _parse(read_settings(path), overrides, sizes_of)


def parse_config(tree: Any, overrides: Sequence[str] = (), *, where: str = "configuration") -> Config:
    """Builds a Config from a nested mapping, such as a checkpoint's, and overrides.

    No file is read: ``extends`` is an unknown key here.

    Raises:
        ConfigError: with every fault in one message.
    """
    return _parse(Settings(tree, where), overrides)


def _parse(settings: Settings, overrides: Sequence[str], sizes_of: SizesOf | None = None) -> Config:
    tree = {} if settings.tree is None else settings.tree
    if not isinstance(tree, Mapping):
        raise ConfigError(
            f"top level is a {type(tree).__name__}", where=settings.path, accepted="a mapping of sections"
        )
    # A section whose keys are all commented out is null in YAML.
    merged: dict[str, Any] = {key: _copy(value) for key, value in tree.items() if value is not None}
    faults = [fault for item in overrides if (fault := _apply_override(merged, item))]
    typed: dict[str, str] = {}
    merged = settle_values(merged, Config, faults, typed)
    given = [item.partition("=")[0].strip() for item in overrides]
    _leave_out_idle_keys(merged, settings, given)
    context, unread = _settle_clip(merged, sizes_of, given)
    if context:
        faults += [
            f"{key}: model.clip is auto, which has all sizes from the weights (leave this key out; for sizes "
            "of your own begin with model.clip={})"
            for key in given
            if key.startswith("model.clip.")
        ]
    # A value overridden on the command line no longer comes from the file.
    origins = {
        key: file
        for key, file in settings.origins.items()
        if not any(one.startswith(f"{key}.") for one in given) and not _is_given(key, given)
    }
    try:
        config = Config.model_validate(merged, context=context)
    except ValidationError as error:
        faults += [_explain(dict(fault), origins, typed) for fault in error.errors(include_url=False)]
    if unread is not None:
        if not faults and not isinstance(unread, ConfigError):
            raise unread
        faults.append(str(unread))
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in faults)
        raise ConfigError(f"{len(faults)} fault{'s' * (len(faults) > 1)}:\n{lines}", where=settings.path)
    return config


def _settle_clip(
    tree: dict[str, Any], sizes_of: SizesOf | None, given: Sequence[str]
) -> tuple[str, GareError | None]:
    """Replaces ``model.clip: auto`` by the sizes of the weights, and sets their picture size in extract.

    Returns:
        the validation context, empty without auto; and the error if the sizes could not be read.
    """
    if _mapping_in(tree, "model").get("clip") != AUTO:
        return "", None
    del tree["model"]["clip"]
    try:
        sizes = _sizes(tree, sizes_of)
    except GareError as error:
        return SIZES_UNKNOWN, error
    if sizes is None:
        return SIZES_UNKNOWN, None
    tree["model"]["clip"] = dict(sizes)
    extract = tree.setdefault("extract", {})
    if isinstance(extract, dict) and not _is_given("extract.image_size", given):
        extract["image_size"] = sizes["image_size"]
    return SIZES_READ, None


def _sizes(tree: Mapping[str, Any], sizes_of: SizesOf | None) -> Mapping[str, int] | None:
    """Reads the weights' sizes for ``model.clip: auto``; None if not needed or if the keys have faults.

    Raises:
        CheckpointError: for weights whose sizes cannot be read.
        ConfigError: if no weights are named, or ``sizes_of`` is not given.
    """
    if sizes_of is None:
        raise ConfigError(
            "auto needs a function that reads the sizes from the weights, and none was given",
            where="model.clip",
            accepted="load_config(…, sizes_of=gare.train.checkpoint.initial_model.sizes_of_weights), which "
            "the commands of pipelines/ do, or the sizes themselves",
        )
    known: dict[str, Any] = {"name": tree["name"]} if "name" in tree else {}
    for section, keys in _PLACES.items():
        given = _mapping_in(tree, section)
        known[section] = {key: given[key] for key in keys if key in given}
    try:
        places = parse_config(known)
    except ConfigError:
        # Reported when the whole configuration is checked.
        return None
    return sizes_of(places)


def _leave_out_idle_keys(tree: dict[str, Any], settings: Settings, given: Sequence[str]) -> None:
    """Removes keys that only affect a part which a switch in a higher layer turns off."""

    def depth(key: str) -> int:
        """Returns 0 for the command line, 1 for the file, 1 more for each extended file down to the key's."""
        if _is_given(key, given):
            return 0
        origin = settings.origins.get(key)
        return 1 if origin is None else 2 + settings.extended.index(origin)

    for name, section in _sections():
        found = _mapping_in(tree, name)
        for key, mark in section.idle_keys():
            is_idle = key in found and mark.is_met(found)
            if is_idle and depth(f"{name}.{key}") > depth(f"{name}.{mark.switch}"):
                del tree[name][key]


def _mapping_in(tree: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    found = tree.get(section)
    return found if isinstance(found, Mapping) else {}


def _is_given(key: str, given: Sequence[str]) -> bool:
    """True if a key, or the whole section that contains it, was set on the command line."""
    return any(f"{key}.".startswith(f"{one}.") for one in given)


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Lists the differences between two nested mappings, one line for each dotted key."""
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
        return f"override {mask_secrets(item)!r} is not of the form section.key=value"
    try:
        value = parse_override(Config, keys, text)
    except (yaml.YAMLError, ValueError):
        return f"override {mask_secrets(item)!r}: the value is not YAML"
    if keys[:2] == ["model", "clip"] and keys[2:] and _mapping_in(tree, "model").get("clip") == AUTO:
        return ""  # refused in _settle_clip
    for key in keys[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[keys[-1]] = value
    return ""


def _explain(fault: dict[str, Any], origins: Mapping[str, str], typed: Mapping[str, str]) -> str:
    """Describes a fault, with the value as it was typed and the file if it comes from an extended one."""
    location = [str(part) for part in fault["loc"]]
    dotted = ".".join(location) or "configuration"
    origin = f" (in {origins[dotted]})" if dotted in origins else ""
    if fault["type"] == "extra_forbidden":
        known = _keys_beside(location)
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"nearest: {'.'.join([*location[:-1], near[0]])}; " if near else ""
        return f"{dotted}: unknown key ({hint}known here: {', '.join(known)}){origin}"
    message = fault["msg"].removeprefix("Value error, ")
    shown = typed.get(dotted, repr(fault["input"]))
    if fault["type"] == "value_error":
        message = message.replace(f"got {fault['input']!r};", f"got {shown};", 1)
        return f"{dotted}: {mask_secrets(message)}{origin}"
    return f"{dotted}: got {mask_secrets(shown)}; {message[0].lower()}{message[1:]}{origin}"


def _keys_beside(location: Sequence[str]) -> list[str]:
    section: type[BaseModel] = Config
    for part in location[:-1]:
        inner = section.model_fields[part].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        section = inner
    return list(section.model_fields)
