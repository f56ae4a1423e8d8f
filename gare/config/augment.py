"""The configuration section for the augmentation of training clips."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from gare.config.section import Fraction, NonNegative, Section


class AugmentConfig(Section):
    """Random changes of training clips, the same for all frames of a clip. Off by default."""

    operations: int = Field(
        0, ge=0, le=15, description="N: RandAugment operations on a clip; the paper's is 4"
    )
    magnitude: Annotated[float, Field(gt=0, lt=10)] = Field(
        7.0, description="RandAugment's magnitude, on timm's scale of 0 to 10"
    )
    noise: NonNegative = Field(0.5, description="standard deviation of each operation's magnitude")
    probability: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5,
        description="share of the drawn operations that are carried out; the paper's code carries out half",
    )
    crop_scale: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="smallest share of the picture's area that a random crop keeps; 1: no crop"
    )
    flip: Fraction = Field(
        0.0, description="share of clips that are mirrored; wrong where captions say left or right"
    )

    @property
    def is_on(self) -> bool:
        """True if clips are changed at all."""
        return bool(self.operations or self.flip or self.crop_scale < 1)

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> AugmentConfig:
        if changed := [] if self.operations else self.non_default("magnitude", "noise", "probability"):
            raise ValueError(f"{', '.join(changed)} would change nothing: operations is 0")
        return self
