"""Base class of all configuration sections, and the small sections."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from gare.errors import mask_secrets, secret_in

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


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

    def non_default(self, *keys: str) -> list[str]:
        """Returns the given keys that are not at their default."""
        return [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]


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
