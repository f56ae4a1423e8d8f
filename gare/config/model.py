"""The configuration section for the model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from gare.config.section import (
    Auto,
    Count,
    CountOrAuto,
    FreeAt,
    IdleIf,
    Mark,
    Positive,
    Section,
    number_or_auto,
)

_NEEDS_INCREMENT = IdleIf("increment", (False,))
_NEEDS_TEMPORAL = IdleIf("temporal", ("none",))
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


MegabytesOrAuto = Annotated[float | Auto, number_or_auto(1, whole=False)]


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
    temporal_layers: Annotated[int, _NEEDS_TEMPORAL] = Field(
        4, ge=0, description="blocks of the temporal transformer"
    )
    temporal_heads: Annotated[CountOrAuto, _NEEDS_TEMPORAL] = Field(
        "auto",
        description="attention heads of the temporal transformer; auto: 64 of embed_dim's numbers a head",
    )
    # Without increment it only shortens the pooled video, which cosines ignore.
    padding: Annotated[Literal["masked", "released"], _NEEDS_INCREMENT] = Field(
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
    pool_temperature: Annotated[Positive, IdleIf("pooling", ("mean",))] = Field(
        3.0, description="τ_pool of the text-conditioned pooling"
    )
    increment: bool = Field(True, description="learn Δ_ij; off is the baseline of the paper's Table 3")
    corrected_side: Annotated[Literal["text", "video"], _NEEDS_INCREMENT] = Field(
        "text", description="what Δ_ij is added to: the text embedding, or the pooled video"
    )
    context: Annotated[Literal["frames", "words"], _NEEDS_INCREMENT] = Field(
        "frames", description="what ψ attends to"
    )
    gap_sign: Annotated[
        Literal[1, -1],
        _NEEDS_INCREMENT,
        IdleIf("query", ("text",), "query text does not ask with the gap"),
    ] = Field(1, description="η of the semantic gap η(v̄_j − t_i)")
    query: Annotated[Literal["gap", "text"], _NEEDS_INCREMENT] = Field(
        "gap",
        description="what ψ is asked with: the gap; or the text t_i, with Δ_ij = R_ij·unit(v̄_j − ψ(t_i))",
    )
    increment_heads: Count = Field(1, description="attention heads of ψ")
    increment_layers: Annotated[Count, _NEEDS_INCREMENT] = Field(
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
    # The last four decide how the model is computed, not which model it is.
    method: Annotated[Literal["auto", "direct", "factorized"], Mark.FREE] = Field(
        "auto",
        description="how pairs are computed; auto: factorised, which is exact, and direct where it has no "
        "such form, or where on a GPU it is faster (steps of 256 pairs or fewer without fused kernels)",
    )
    kernel: Annotated[Literal["auto", "triton", "plain"], Mark.FREE] = Field(
        "auto",
        description="what computes pairs in the factorised form; auto: on a GPU fused Triton kernels where "
        "the variant has them (frames as context, query gap), else plain PyTorch",
    )
    # The rounding errors of the others enter what is learned.
    products: Annotated[Literal["exact", "tf32", "bf16"], FreeAt("exact")] = Field(
        "exact",
        description="precision of large products beside those kernels, and of the directional "
        "diversity's, on a GPU; exact: float32's, on tensor cores by operands split in two; tf32 and "
        "bf16: theirs. train.tf32 is about all others",
    )
    memory_mb: Annotated[MegabytesOrAuto, Mark.FREE] = Field(
        "auto",
        description="MB that scores and losses may take beyond inputs and results before they go by blocks; "
        "auto: 256 on a CPU, two fifths of what is free on a GPU",
    )

    @model_validator(mode="after")
    def _variant_makes_sense(self) -> ModelConfig:
        if self.pooling == "mean" and self.increment:
            raise ValueError("pooling mean has no increment: set increment=false")
        if self.method == "factorized" and self.why_not_factorized:
            raise ValueError(
                f"method factorized has no form for {self.why_not_factorized}: take auto or direct"
            )
        if self.kernel == "triton" and self.method == "direct":
            raise ValueError("kernel triton computes the factorised form: take method auto or factorized")
        if self.query == "text" and self.context == "words":
            raise ValueError(
                "query text with context words would not look at the frames: t*_ij would not depend on j"
            )
        return self

    @property
    def learns_without_towers(self) -> bool:
        """True if the model has weights beside the towers'."""
        return self.learns_without_encoders or self.adapters

    @property
    def learns_without_encoders(self) -> bool:
        """True if the model has weights beside the towers' and adapters'."""
        return self.temporal == "transformer" or self.increment

    @property
    def why_not_factorized(self) -> str:
        """The setting for which pairs have no factorised form in training; empty if they have one."""
        if self.padding == "released":
            return "padding released"
        if self.increment_layers > 1:
            return "increment_layers above 1"
        if self.increment and self.increment_dropout > 0 and self.increment_dropout_per == "pair":
            return "increment_dropout_per pair"
        return ""

    @property
    def why_no_dropout_spread(self) -> str:
        """The setting that leaves the spread by dropout of each pair without a closed form, or empty."""
        settings = {
            "method direct": self.method == "direct",
            "context words": self.context == "words",
            "query text": self.query == "text",
        }
        found = next((name for name, is_set in settings.items() if is_set), self.why_not_factorized)
        return found if self.increment else ""

    def identity(self) -> dict[str, Any]:
        """Returns the settings that define the model, without those of how it is computed."""
        # Auto and the number that it stands for are the same model.
        return super().identity() | {"temporal_heads": self.num_temporal_heads}

    def baseline(self) -> ModelConfig:
        """Returns the model without increment, and without the switches that only shape it."""
        idle = {key for key, mark in type(self).idle_keys() if mark == _NEEDS_INCREMENT}
        shared = self.model_dump(exclude={"increment", "kernel", *idle})
        return type(self).model_validate({**shared, "increment": False})

    def computed_as(self, other: ModelConfig) -> ModelConfig:
        """Returns this model with the computation settings of another one."""
        return self.model_copy(update={key: getattr(other, key) for key in self._how_computed()})

    def zero_shot(self) -> ModelConfig:
        """Returns the towers alone: CLIP4Clip's zero-shot score, the mean of unit frames."""
        computed = self._how_computed() - {"kernel"}
        shared = self.model_dump(include={"clip", "max_words", "max_frames", *computed})
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
        return max(self.clip.embed_dim // 64, 1) if self.temporal_heads == "auto" else self.temporal_heads

    @classmethod
    def _how_computed(cls) -> set[str]:
        """Returns the keys that decide how a model is computed, not which model it is."""
        return cls.marked(Mark.FREE) | cls.marked(FreeAt)
