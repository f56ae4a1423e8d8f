"""The configuration section for the model."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, ValidationInfo, model_validator

from gare.config.section import Count, Positive, Section

#: Keys that change nothing without increment. Padding then only shortens the pooled video, which cosines
#: ignore.
INCREMENT_KEYS = ("corrected_side", "context", "gap_sign", "query", "increment_layers", "padding")
#: Validation contexts for ``model.clip: auto``. If no weights were read, the sizes are meaningless defaults,
#: and no other key has to fit them.
SIZES_READ, SIZES_UNKNOWN = "sizes read from weights", "sizes unknown"


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


def _megabytes_or_auto(value: Any) -> Any:
    if value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < math.inf:
        raise ValueError(f"got {value!r}; a number from 1 on, or the word auto")
    return float(value)


MegabytesOrAuto = Annotated[float | Literal["auto"], PlainValidator(_megabytes_or_auto)]
#: Keys that decide how a model is computed, not which model it is.
_HOW_COMPUTED = {"method", "kernel", "products", "memory_mb"}


class ModelConfig(Section):
    """GARE: CLIP towers, temporal transformer, increment."""

    clip: ClipConfig = Field(default_factory=ClipConfig, description="the CLIP towers")
    max_words: int = Field(32, ge=3, description="W: tokens of a caption, both markers included")
    max_frames: Count = Field(12, description="F: frames of a clip")
    temporal: Literal["transformer", "none"] = Field(
        "transformer",
        description="transformer over the frames of a clip; none: frame features stay as they are, as the "
        "released code has it for MSVD",
    )
    temporal_layers: int = Field(4, ge=0, description="blocks of the temporal transformer")
    temporal_heads: int = Field(
        0,
        ge=0,
        description="attention heads of the temporal transformer; 0: 64 of embed_dim's numbers a head",
    )
    padding: Literal["masked", "released"] = Field(
        "masked",
        description="frames that a clip lacks: masked everywhere; or as the released code has them, which "
        "are grey pictures in CLIP, v̄ and ψ, and take weight from the pooling's real frames (direct form "
        "only, from frames only)",
    )
    pooling: Literal["text_conditioned", "mean"] = Field(
        "text_conditioned",
        description="how the frames of a clip become one vector: weighted for each text, or the mean of "
        "frames at length 1, without increment (CLIP4Clip: meanP with temporal none, else seqTransf)",
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
        "each pair as the paper has it, which only the direct form can do. By context is another bottleneck: "
        "the spread between pairs that dropout makes is gone, and at the start, where texts hardly differ, "
        "σ_j is 0.0011 in place of 0.117, the KL 3,289 in place of 895",
    )
    adapters: bool = Field(False, description="linear adapters behind both towers, the identity at the start")
    method: Literal["auto", "direct", "factorized"] = Field(
        "auto",
        description="how pairs are computed; auto: factorised, which is exact, and direct where it has no "
        "such form, or where on a GPU it is faster (steps of 256 pairs or fewer without fused kernels)",
    )
    kernel: Literal["auto", "triton", "plain"] = Field(
        "auto",
        description="what computes pairs in the factorised form; auto: on a GPU fused Triton kernels where "
        "the variant has them (frames as context, query gap), else plain PyTorch",
    )
    products: Literal["exact", "tf32", "bf16"] = Field(
        "exact",
        description="precision of large products beside those kernels, and of the directional "
        "diversity's, on a GPU; exact: float32's, on tensor cores by operands split in two; tf32 and "
        "bf16: theirs. train.tf32 is about all others",
    )
    memory_mb: MegabytesOrAuto = Field(
        "auto",
        description="MB that scores and losses may take beyond inputs and results before they go by blocks; "
        "auto: 256 on a CPU, two fifths of what is free on a GPU",
    )

    @model_validator(mode="after")
    def _variant_makes_sense(self) -> ModelConfig:
        if not self.increment and (changed := self.non_default(*INCREMENT_KEYS)):
            raise ValueError(f"{', '.join(changed)} would change nothing: increment is off")
        if self.temporal == "none" and (changed := self.non_default("temporal_layers", "temporal_heads")):
            raise ValueError(f"{', '.join(changed)} would change nothing: temporal is none")
        if self.pooling == "mean" and self.increment:
            raise ValueError("pooling mean has no increment: set increment=false")
        if self.pooling == "mean" and self.non_default("pool_temperature"):
            raise ValueError("pool_temperature would change nothing: pooling mean has none")
        if self.method == "factorized" and self.padding == "released":
            raise ValueError("method factorized has no form for padding released: take auto or direct")
        if self.method == "factorized" and self.increment_layers > 1:
            raise ValueError(
                "method factorized has no form for increment_layers above 1: take auto or direct"
            )
        per_pair = self.increment_dropout > 0 and self.increment_dropout_per == "pair"
        if self.method == "factorized" and self.increment and per_pair:
            raise ValueError(
                "method factorized has no form for increment_dropout_per pair: take auto or direct"
            )
        if self.kernel == "triton" and self.method == "direct":
            raise ValueError("kernel triton computes the factorised form: take method auto or factorized")
        if self.query == "text" and self.gap_sign != 1:
            raise ValueError("gap_sign -1 would change nothing: query text does not ask with the gap")
        if self.query == "text" and self.context == "words":
            raise ValueError(
                "query text with context words would not look at the frames: t*_ij would not depend on j"
            )
        return self

    @property
    def learns_without_towers(self) -> bool:
        """True if the model has weights beside the towers'."""
        return self.temporal == "transformer" or self.increment or self.adapters

    def identity(self) -> dict[str, Any]:
        """Returns the settings that define the model, without those of how it is computed."""
        settings = self.model_dump(mode="json", exclude=_HOW_COMPUTED)
        if self.products != "exact":  # their rounding errors enter what is learned
            settings["products"] = self.products
        # 0 and the number that it stands for are the same model.
        return settings | {"temporal_heads": self.num_temporal_heads}

    def baseline(self) -> ModelConfig:
        """Returns the model without increment, and without the switches that only shape it."""
        shared = self.model_dump(exclude={"increment", "kernel", *INCREMENT_KEYS})
        return type(self).model_validate({**shared, "increment": False})

    def computed_as(self, other: ModelConfig) -> ModelConfig:
        """Returns this model with the computation settings of another one."""
        return self.model_copy(update={key: getattr(other, key) for key in _HOW_COMPUTED})

    def zero_shot(self) -> ModelConfig:
        """Returns the towers alone: CLIP4Clip's zero-shot score, the mean of unit frames."""
        shared = self.model_dump(include={"clip", "max_words", "max_frames", *_HOW_COMPUTED} - {"kernel"})
        plain = {"pooling": "mean", "temporal": "none", "increment": False}
        return type(self).model_validate({**shared, **plain})

    @model_validator(mode="after")
    def _fits_towers(self, info: ValidationInfo) -> ModelConfig:
        if info.context == SIZES_UNKNOWN:
            return self
        if self.max_words > self.clip.max_positions:
            raise ValueError(
                f"max_words {self.max_words} exceeds clip.max_positions {self.clip.max_positions}"
            )
        if self.temporal == "transformer" and self.max_frames > self.clip.max_positions:
            raise ValueError(
                f"max_frames {self.max_frames} exceeds clip.max_positions {self.clip.max_positions}, "
                "the number of frame positions"
            )
        heads_of = {"increment_heads": self.increment_heads}
        if self.temporal == "transformer":
            heads_of["temporal_heads"] = self.num_temporal_heads
        for key, heads in heads_of.items():
            if self.clip.embed_dim % heads:
                raise ValueError(f"clip.embed_dim {self.clip.embed_dim} is not a multiple of {key} {heads}")
        return self

    @property
    def num_temporal_heads(self) -> int:
        """Attention heads of the temporal transformer."""
        return self.temporal_heads or max(self.clip.embed_dim // 64, 1)
