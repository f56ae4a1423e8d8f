"""The configuration section for the feature store, and its checks against other sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gare.config.augment import AugmentConfig
from gare.config.data import DataConfig
from gare.config.evaluate import EvaluateConfig
from gare.config.model import ModelConfig
from gare.config.section import Count, CountOrAuto, Mark, Section
from gare.config.train import TrainConfig


class FeaturesConfig(Section):
    """Encoding of frames and captions; the SHA-256 of the weights is in the store's fingerprint too."""

    weights: str = Field(
        "",
        description="towers that make features: as train.clip_weights, or a checkpoint folder; empty: "
        "train.clip_weights",
    )
    words: Annotated[bool, Mark.STORED] = Field(
        False, description="store word features too, which model.context=words needs"
    )
    precision: Annotated[Literal["float32", "bf16", "float16"], Mark.STORED] = Field(
        "float32", description="of the towers while they make features, which are stored in float16"
    )
    compile: Literal["auto", "off", "towers"] = Field(
        "auto",
        description="as train.compile, of the towers in each encoding actor; not in the store's fingerprint",
    )
    batch: Count = Field(32, description="clips that go through the image tower at once")
    videos_per_part: Count = Field(
        1000,
        description="videos that a Parquet part of the store holds at most; fewer where their features are "
        "large",
    )
    workers: CountOrAuto = Field(
        "auto", description="encoding actors; auto: one for each GPU with cluster.use_gpu, else for each CPU"
    )
    cache_mb: float = Field(
        4096.0,
        ge=0,
        description="MB of features that a reader keeps in memory; a larger store is read as it goes",
    )


def feature_faults(
    train: TrainConfig,
    model: ModelConfig,
    augment: AugmentConfig,
    features: FeaturesConfig,
    evaluate: EvaluateConfig,
) -> list[str]:
    """Lists settings that training or evaluation from features cannot work with, one line each."""
    # A zero-shot score pools real frames alone, whatever the padding.
    scored = "auto" if evaluate.zero_shot else evaluate.input
    if model.padding == "released" and "features" in (train.input, scored):
        return [
            "model.padding released needs train.input frames and evaluate.input auto or frames: the features "
            "of its grey pictures are not stored"
        ]
    if train.input != "features":
        return []
    faults = []
    if augment.is_on:
        faults.append("augment changes pictures, and train.input features has none: set it off")
    has_effect = {"auto": True, "towers": True, "encoders": model.adapters, "baseline": True}
    if not has_effect.get(train.freeze, False):
        faults.append(
            f"train.freeze {train.freeze} would change nothing: with train.input features no tower learns"
        )
    if not model.learns_without_towers:
        faults.append(
            "train.input features would learn nothing: model.temporal is none, and model.increment and "
            "model.adapters are off"
        )
    if model.increment and model.context == "words" and not features.words:
        faults.append("model.context words needs features.words=true with train.input features")
    return faults


def imported_faults(
    data: DataConfig,
    train: TrainConfig,
    model: ModelConfig,
    features: FeaturesConfig,
    evaluate: EvaluateConfig,
) -> list[str]:
    """Lists settings that imported features cannot work with: they have no frames, no words and no towers."""
    if not data.is_imported:
        return []
    faults = []
    if train.input != "features":
        faults.append("data.benchmark features has no frames to learn from: set train.input=features")
    if evaluate.input == "frames":
        faults.append("data.benchmark features has no frames to score: set evaluate.input auto or features")
    if evaluate.zero_shot:
        faults.append("evaluate.zero_shot scores towers as they are, and data.benchmark features has none")
    if evaluate.qbnorm:
        faults.append("evaluate.qbnorm encodes captions with towers, and data.benchmark features has none")
    if model.increment and model.context == "words":
        faults.append("model.context words needs features of words, and data.benchmark features has none")
    idle = [f"features.{key}" for key in features.non_default("weights", "words")]
    if idle := [*idle, *(f"train.{key}" for key in train.non_default("clip_weights"))]:
        faults.append(f"{', '.join(idle)} would change nothing: data.benchmark features has no towers")
    return faults
