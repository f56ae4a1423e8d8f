"""The sections of the configuration: one frozen model each, every field with a default and a description."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from gare.errors import masked, secret_in

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
        is_switch = field.annotation is bool or True in get_args(field.annotation)
        if isinstance(value, bool) and not is_switch:
            raise ValueError(f"got {value!r}; true and false are no value of this key")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _no_secret_in_a_uri(cls, value: Any) -> Any:
        # The configuration is saved with every output and logged: what is secret in it is so no longer.
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and (secret := secret_in(text)):
                raise ValueError(
                    f"{masked(text)} holds {secret}, and the configuration is saved and logged; it belongs "
                    "into the environment or a file of your own: MLFLOW_TRACKING_USERNAME and "
                    "MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN, PGPASSWORD or ~/.pgpass, AWS_…"
                )
        return value

    def changed(self, *keys: str) -> list[str]:
        """Those of the keys that are not at their default."""
        return [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]


class StorageConfig(Section):
    """Where outputs go."""

    root: str = Field(
        default_factory=lambda: os.environ.get("GARE_ROOT") or "~/.gare",
        min_length=1,
        description="folder or s3:// URI that relative output paths resolve against; GARE_ROOT sets it too",
    )


class ClipConfig(Section):
    """The CLIP towers, built by transformers' CLIPModel. Defaults are ViT-B/32's."""

    image_size: Count = Field(224, description="pixels a side of the square input frames")
    patch_size: Count = Field(32, description="pixels a side of a patch")
    vision_width: Count = Field(768, description="width of the image tower")
    vision_layers: Count = Field(12, description="blocks of the image tower")
    vision_heads: Count = Field(12, description="attention heads of the image tower")
    text_width: Count = Field(512, description="width of the text tower")
    text_layers: Count = Field(12, description="blocks of the text tower")
    text_heads: Count = Field(8, description="attention heads of the text tower")
    vocab_size: Count = Field(49408, description="tokens in the vocabulary")
    max_positions: Count = Field(77, description="longest token sequence of the text tower")
    embed_dim: Count = Field(512, description="D: width of the shared embedding space")

    @model_validator(mode="after")
    def _widths_divide(self) -> ClipConfig:
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ValueError(f"{tower}_width {width} is not a multiple of {tower}_heads {heads}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        return self


class ModelConfig(Section):
    """GARE: CLIP towers, temporal transformer, increment."""

    clip: ClipConfig = Field(default_factory=ClipConfig, description="the CLIP towers")
    max_words: int = Field(32, ge=3, description="W: tokens of a caption, both markers included")
    max_frames: Count = Field(12, description="F: frames of a clip")
    temporal_layers: int = Field(4, ge=0, description="blocks of the temporal transformer")
    temporal_heads: int = Field(
        0,
        ge=0,
        description="attention heads of the temporal transformer; 0: 64 of embed_dim's numbers a head",
    )
    pool_temperature: Positive = Field(3.0, description="τ_pool of the text-conditioned pooling")
    increment: bool = Field(True, description="learn Δ_ij; off is the baseline of the paper's Table 3")
    corrected_side: Literal["text", "video"] = Field(
        "text", description="what Δ_ij is added to: the text embedding, or the pooled video"
    )
    context: Literal["frames", "words"] = Field("frames", description="what ψ attends to")
    gap_sign: Literal[1, -1] = Field(1, description="η of the semantic gap η(v̄_j − t_i)")
    query: Literal["gap", "text"] = Field(
        "gap",
        description="what ψ is asked with: the gap; or the text t_i, with Δ_ij = R_ij·unit(v̄_j − ψ(t_i))",
    )
    increment_heads: Count = Field(1, description="attention heads of ψ")
    increment_layers: Count = Field(
        1, description="layers of ψ; the paper's is 1, and more have only the direct form"
    )
    increment_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.3, description="dropout inside ψ")
    increment_dropout_per: Literal["context", "pair"] = Field(
        "context",
        description="a dropout mask for each context of ψ, shared by the pairs that attend to it, or for "
        "each pair as the paper has it, which only the direct form can do",
    )
    adapters: bool = Field(False, description="linear adapters behind both towers, the identity at the start")
    method: Literal["auto", "direct", "factorized"] = Field(
        "auto",
        description="how pairs are computed; auto: factorised, which is exact, and direct where it has no "
        "such form",
    )
    memory_mb: Annotated[float, Field(ge=1)] = Field(
        256.0,
        description="MB that scores and losses may take beyond inputs and results before they go by blocks",
    )

    @model_validator(mode="after")
    def _variant_makes_sense(self) -> ModelConfig:
        changed = self.changed("corrected_side", "context", "gap_sign", "query", "increment_layers")
        if changed and not self.increment:
            raise ValueError(f"{', '.join(changed)} would change nothing: increment is off")
        if self.method == "factorized" and self.increment_layers > 1:
            raise ValueError(
                "method factorized has no form for increment_layers above 1: take auto or direct"
            )
        per_pair = self.increment_dropout > 0 and self.increment_dropout_per == "pair"
        if self.method == "factorized" and self.increment and per_pair:
            raise ValueError("method factorized has no form for increment_dropout_per pair: take auto")
        if self.query == "text" and self.gap_sign != 1:
            raise ValueError("gap_sign -1 would change nothing: query text does not ask with the gap")
        if self.query == "text" and self.context == "words":
            raise ValueError(
                "query text with context words would not look at the frames: t*_ij would not depend on j"
            )
        return self

    @property
    def memory_bytes(self) -> int:
        """``memory_mb`` in bytes."""
        return int(self.memory_mb * 10**6)

    def identity(self) -> dict[str, Any]:
        """What makes a model this model: not how it is computed."""
        return self.model_dump(mode="json", exclude={"method", "memory_mb"})

    def baseline(self) -> ModelConfig:
        """The same model without increment, and without the switches that only shape it."""
        shaping = {"increment", "corrected_side", "context", "gap_sign", "query", "increment_layers"}
        shared = self.model_dump(exclude=shaping)
        return type(self).model_validate({**shared, "increment": False})

    @model_validator(mode="after")
    def _fits_towers(self) -> ModelConfig:
        if self.max_words > self.clip.max_positions:
            raise ValueError(
                f"max_words {self.max_words} exceeds clip.max_positions {self.clip.max_positions}"
            )
        if self.max_frames > self.clip.max_positions:
            raise ValueError(
                f"max_frames {self.max_frames} exceeds clip.max_positions {self.clip.max_positions}, "
                "the number of frame positions"
            )
        for key, heads in (
            ("temporal_heads", self.num_temporal_heads),
            ("increment_heads", self.increment_heads),
        ):
            if self.clip.embed_dim % heads:
                raise ValueError(f"clip.embed_dim {self.clip.embed_dim} is not a multiple of {key} {heads}")
        return self

    @property
    def num_temporal_heads(self) -> int:
        """Attention heads of the temporal transformer."""
        return self.temporal_heads or max(self.clip.embed_dim // 64, 1)


class LossConfig(Section):
    """Weights and forms of the loss terms beside InfoNCE."""

    bottleneck_weight: NonNegative = Field(1e-4, description="β, weight of the information bottleneck L_IB")
    kl_reduction: Literal["sum", "mean"] = Field(
        "sum", description="reduction of the KL over the D dimensions"
    )
    prior_std: Positive = Field(1.0, description="σ_prior of the bottleneck's prior")
    kl_normalised: bool = Field(False, description="scale increments to length 1 before the KL")
    bottleneck_anchor: Literal["video", "text"] = Field(
        "video",
        description="μ and σ of the bottleneck are of each video over texts, or of each text over videos",
    )
    radii_weight: NonNegative = Field(0.01, description="λ_ε, weight of the trust-region radii term L_ε")
    radii_bound: NonNegative = Field(0.5, description="λ: L_ε is held at −λ from below")
    radii_bound_form: Literal["hard", "smooth"] = Field(
        "hard", description="max(L_ε, −λ), or log(exp L_ε + exp(−λ))"
    )
    direction_weight: NonNegative = Field(
        0.01, description="λ_dir, weight of the directional diversity L_dir"
    )
    direction_form: Literal["log_mean_exp", "orthogonality"] = Field(
        "log_mean_exp", description="L_dir by a log-mean-exp of cosines, or the mean of cos² over j≠k"
    )
    direction_alpha: Positive = Field(2.0, description="α of the directional diversity by log-mean-exp")
    direction_over: Literal["auto", "all", "sample"] = Field(
        "auto",
        description="texts of the directional diversity; auto: all, or a sample where N·M·D numbers exceed "
        "model.memory_mb",
    )
    direction_texts: Count = Field(
        64, description="texts in such a sample of the global batch, drawn anew for each step"
    )
    positives: Literal["diagonal", "video"] = Field(
        "diagonal",
        description="what a text's positives are in a batch: its own clip, as in the paper; or every clip of "
        "its video",
    )

    def samples_texts(self, num_pairs: int, width: int, budget_bytes: float) -> bool:
        """Whether the directional diversity of a batch is that of a sample of its texts."""
        if self.direction_over == "auto":
            sampled = 4 * num_pairs**2 * width > budget_bytes
        else:
            sampled = self.direction_over == "sample"
        return sampled and bool(self.direction_weight) and self.direction_texts < num_pairs

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> LossConfig:
        # A weight of 0 beside a term's own keys is no fault: so is one term of a configuration ablated.
        if self.radii_weight and self.radii_bound_form == "hard" and not self.radii_bound:
            raise ValueError(
                "radii_bound 0 holds the radii term at 0, where it does nothing: set radii_weight=0"
            )
        if self.direction_form == "orthogonality" and self.changed("direction_alpha"):
            raise ValueError("direction_alpha would change nothing: direction_form orthogonality has no α")
        return self


class TrainConfig(Section):
    """One training run."""

    run: Name = Field("gare", description="name of the run: its output folder and its name in MLflow")
    input: Literal["frames", "features"] = Field(
        "frames",
        description="store to learn from; from features the towers stay out and what follows them learns",
    )
    seed: Seed = Field(0, description="seed of the weights, the order of samples and dropout")
    epochs: Count = Field(5, description="passes over the training captions")
    batch_size: int = Field(128, ge=2, description="global batch: text-video pairs over all workers")
    micro_batch: int = Field(
        0,
        ge=0,
        description="pairs of a worker that go through the towers at once, encoded again in the backward "
        "(GradCache); 0: all, without encoding twice",
    )
    diagnostics_every: int = Field(
        50, ge=0, description="steps between measures of tension, increments and modality gap; 0: never"
    )
    diagnostics_texts: Count = Field(16, description="texts of a worker that such measures look at")
    trust_region_radius: NonNegative = Field(
        0.0,
        description="ε of the analytic trust-region step, measured along with them on a few pairs; 0: not at "
        "all",
    )
    unique_videos: bool = Field(False, description="no video twice in a global batch")
    captions_per_video: int = Field(
        0, ge=0, description="captions a video contributes to an epoch, drawn anew each time; 0: all of them"
    )
    clip_lr: NonNegative = Field(1e-7, description="peak learning rate of the CLIP towers")
    lr: NonNegative = Field(1e-4, description="peak learning rate of everything else")
    weight_decay: NonNegative = Field(0.2, description="decoupled weight decay, biases excepted")
    optimizer: Literal["adamw", "bert_adam"] = Field(
        "adamw",
        description="adamw; bert_adam: optimiser and schedule of the released training (no bias correction, "
        "each gradient clipped to norm 1, first rate 0)",
    )
    clip_weights: str = Field(
        "",
        description="CLIP to start from: OpenAI's .pt, a state dict or a Hugging Face folder; empty: none",
    )
    freeze: Literal["auto", "none", "patch_conv", "image", "text", "towers"] = Field(
        "auto",
        description="what of CLIP does not learn; auto: patch_conv with clip_weights, as released, else none",
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="of the encoders in training; scores and losses are float32 always"
    )
    warmup_fraction: Fraction = Field(0.1, description="share of the steps that warm up linearly")
    max_grad_norm: Positive = Field(1.0, description="global norm that gradients are clipped to")
    max_steps: int = Field(0, ge=0, description="stop after so many steps; 0: run all epochs")
    keep_checkpoints: Count = Field(2, description="last checkpoints kept, beside the best on val")
    checkpoint_every_steps: int = Field(
        0, ge=0, description="steps between checkpoints within an epoch; each epoch ends with one; 0: none"
    )
    checkpoint_every_s: NonNegative = Field(
        600.0, description="seconds between checkpoints within an epoch; 0: none for the time alone"
    )
    max_failures: int = Field(
        2, ge=0, description="worker failures survived by restarting from the last checkpoint"
    )
    profile: bool = Field(
        False, description="measure the stages of every step; a table, a picture and a trace at the end"
    )
    resume: bool = Field(True, description="continue an interrupted run of the same name")
    overwrite: bool = Field(False, description="delete an earlier run of the same name first")

    @model_validator(mode="after")
    def _frozen_parts_know_something(self) -> TrainConfig:
        if self.freeze in ("image", "text", "towers") and not self.clip_weights:
            raise ValueError(f"freeze {self.freeze} would keep random weights: set clip_weights")
        return self


class TrackingConfig(Section):
    """MLflow."""

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
