"""Base class of all configuration sections, the marks of their keys, and the small sections."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gare.errors import mask_secrets, secret_in

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Auto = Literal["auto"]


class Mark(Enum):
    """Marks of a key, or of a whole section, given in its ``Annotated`` type.

    Attributes:
        FREE: does not identify a training run: it may differ when the run continues, since it changes where
            and how the run computes, not what.
        UNLOGGED: is no parameter of an MLflow run.
        STORED: of extract and features: changes the values of a store, and so is in its fingerprint. (Of
            model, max_words and clip.embed_dim are in that of features too.)
    """

    FREE = "free"
    UNLOGGED = "unlogged"
    STORED = "stored"


@dataclass(frozen=True)
class FreeAt:
    """Mark of a key that identifies a training run at any other value than this one."""

    value: Any


@dataclass(frozen=True)
class IdleIf:
    """Mark of a key that changes nothing, and is refused, while a switch beside it has one of some values.

    Attributes:
        switch: key in the same section.
        values: its values that turn off the part which the marked key shapes.
        why: reason in the message, with {} for the switch's value; empty: the switch and its value.
    """

    switch: str
    values: tuple[Any, ...]
    why: str = ""

    def is_met(self, settings: Mapping[str, Any]) -> bool:
        """Returns True if the switch is given in a section's settings, with one of the values."""
        return self.switch in settings and settings[self.switch] in self.values


def number_or_auto(least: float, *, whole: bool, formerly: float | None = None) -> PlainValidator:
    """Returns a validator of a number or the word auto, with one message for the key.

    A union of types would have a message for each of its members.

    Args:
        least: smallest number.
        whole: True if it has to be an integer.
        formerly: number that earlier versions wrote for auto; accepted.
    """
    numbers: TypeAdapter[Any] = TypeAdapter(int if whole else float)
    kind = "a whole number" if whole else "a number"

    def validate(value: Any) -> Any:
        if value == "auto":
            return value
        try:
            number = None if isinstance(value, bool) else numbers.validate_python(value)
        except ValidationError:
            number = None
        if number is not None and number == formerly:
            return "auto"
        if number is None or not least <= number < math.inf:
            raise ValueError(f"got {value!r}; {kind} from {least:g} on, or the word auto")
        return number

    return PlainValidator(validate)


#: A number from 1 on, or ``auto``, which earlier versions wrote as 0.
CountOrAuto = Annotated[int | Auto, number_or_auto(1, whole=True, formerly=0)]


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys forbidden, defaults checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML's yes, no, on and off are booleans, which Python would take for 1 and 0.
        field = cls.model_fields[str(info.field_name)]
        values = get_args(field.annotation)
        is_switch = field.annotation is bool or True in values
        if value is False and "off" in values:
            return "off"
        if isinstance(value, bool) and not is_switch:
            raise ValueError(f"got {value!r}; true and false are no value of this key")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _no_secret_in_a_uri(cls, value: Any) -> Any:
        # The configuration is saved with every output and logged: a secret in it would be exposed.
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and (secret := secret_in(text)):
                raise ValueError(
                    f"{mask_secrets(text)} holds {secret}, and the configuration is saved and logged; it "
                    "belongs into the environment or a file of your own: MLFLOW_TRACKING_USERNAME and "
                    "MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN, PGPASSWORD or ~/.pgpass, AWS_…"
                )
        return value

    @model_validator(mode="after")
    def _refuse_idle_keys(self) -> Section:
        refused: dict[IdleIf, list[str]] = {}
        for key, mark in type(self).idle_keys():
            if mark.is_met(vars(self)) and self.non_default(key):
                refused.setdefault(mark, []).append(key)
        if refused:
            mark, keys = next(iter(refused.items()))
            value = getattr(self, mark.switch)
            shown = "empty" if value == "" else "off" if value is False else value
            reason = mark.why.format(value) or f"{mark.switch} is {shown}"
            raise ValueError(f"{', '.join(keys)} would change nothing: {reason}")
        return self

    def non_default(self, *keys: str) -> list[str]:
        """Returns the given keys that are not at their default."""
        return [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]

    @classmethod
    def marked(cls, mark: Mark | type[FreeAt]) -> set[str]:
        """Returns the keys with a mark."""
        return {
            key
            for key, field in cls.model_fields.items()
            if any(one is mark or type(one) is mark for one in field.metadata)
        }

    @classmethod
    def idle_keys(cls) -> Iterator[tuple[str, IdleIf]]:
        """Yields the keys that change nothing while another key has some value, with their marks."""
        for key, field in cls.model_fields.items():
            for mark in field.metadata:
                if isinstance(mark, IdleIf):
                    yield key, mark

    def identity(self) -> dict[str, Any]:
        """Returns the settings of this section that identify a training run."""
        settings = self.model_dump(mode="json", exclude=type(self).marked(Mark.FREE))
        for key, field in type(self).model_fields.items():
            value = getattr(self, key)
            if FreeAt(value) in field.metadata:
                del settings[key]
            elif key in settings and isinstance(value, Section):
                settings[key] = value.identity()
        return settings


class StorageConfig(Section):
    """Location of outputs."""

    root: str = Field(
        default_factory=lambda: os.environ.get("GARE_ROOT") or "~/.gare",
        min_length=1,
        description="folder or s3:// URI that relative output paths resolve against; GARE_ROOT sets it too",
    )


class TrackingConfig(Section):
    """MLflow tracking and the format of logs."""

    uri: str = Field(
        "sqlite:///mlflow.db", description="MLflow tracking URI; a relative SQLite path is below storage.root"
    )
    experiment: str = Field("gare", min_length=1, description="MLflow experiment")
    system_metrics: bool = Field(
        True, description="log CPU, memory, disk, network and GPUs of every node while a run lasts"
    )
    system_metrics_every_s: Annotated[float, Field(ge=0.1)] = Field(
        10.0, description="seconds between samples of them"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="of the lines on stderr, workers' included; json: one object a line"
    )


class DemoConfig(Section):
    """The main job on the generated benchmark."""

    seeds: Count = Field(1, description="training seeds for each model")
