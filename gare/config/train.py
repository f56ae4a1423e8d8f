"""The configuration sections for the loss and a training run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from gare.config.section import Count, Fraction, IdleIf, Mark, Name, NonNegative, Positive, Section, Seed


def _count_or_all(value: Any) -> int | str:
    # One message for the key: a plain union would have one for each of its members.
    if value == "all":
        return "all"
    if isinstance(value, int) and value >= 1:
        return value
    raise ValueError(f"got {value!r}; a number from 1 on, or the word all")


#: A number from 1 on, or ``all``.
CountOrAll = Annotated[int | Literal["all"], PlainValidator(_count_or_all)]


#: Bytes of the increments of all pairs above which the directional diversity uses a sample of texts.
ALL_TEXTS_BYTES = 256 * 10**6


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
    dropout_spread: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="p: adds to σ_j² what dropout of each pair with probability p would, in closed form and "
        "to first order: the paper's regulariser in the factorised form, without its noise in the scores",
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
    direction_alpha: Annotated[
        Positive, IdleIf("direction_form", ("orthogonality",), "direction_form {} has no α")
    ] = Field(2.0, description="α of the directional diversity by log-mean-exp")
    direction_over: Literal["auto", "all", "sample"] = Field(
        "auto",
        description="texts of the directional diversity; auto: all, or a sample where N·M·D numbers exceed "
        "256 MB, on whatever device",
    )
    direction_texts: Count = Field(
        64, description="texts in such a sample of the global batch, drawn anew for each step"
    )
    positives: Literal["diagonal", "video"] = Field(
        "diagonal",
        description="what a text's positives are in a batch: its own clip, as in the paper; or every clip of "
        "its video",
    )
    false_negatives: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="τ⁺: share of a text's negatives taken to be right as well; above 0 the negatives of "
        "InfoNCE are debiased (arXiv 2007.00224), with the diagonal as positives",
    )

    def samples_texts(self, num_pairs: int, width: int) -> bool:
        """True if the directional diversity of a batch is computed on a sample of its texts.

        It does not depend on the memory of the machine: a run must mean the same wherever it continues.
        """
        if self.direction_over == "auto":
            sampled = 4 * num_pairs**2 * width > ALL_TEXTS_BYTES
        else:
            sampled = self.direction_over == "sample"
        return sampled and bool(self.direction_weight) and self.direction_texts < num_pairs

    @model_validator(mode="after")
    def _false_negatives_are_known_or_guessed(self) -> LossConfig:
        if self.false_negatives and self.positives == "video":
            raise ValueError("false_negatives has no form with positives video: take positives=diagonal")
        return self

    @model_validator(mode="after")
    def _dropout_spread_has_a_form(self) -> LossConfig:
        if self.dropout_spread and (self.kl_normalised or self.bottleneck_anchor == "text"):
            raise ValueError(
                "dropout_spread has no form with kl_normalised or bottleneck_anchor text: set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _radii_bound_leaves_the_term(self) -> LossConfig:
        # A weight of 0 beside a term's own keys is allowed: this is how one term is ablated.
        if self.radii_weight and self.radii_bound_form == "hard" and not self.radii_bound:
            raise ValueError(
                "radii_bound 0 holds the radii term at 0, where it does nothing: set radii_weight=0"
            )
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
    micro_batch: Annotated[int, Mark.FREE] = Field(
        0,
        ge=0,
        description="pairs of a worker that go through the towers at once, encoded again in the backward "
        "(GradCache); 0: all, without encoding twice",
    )
    activation_checkpointing: Annotated[bool, Mark.FREE] = Field(
        False,
        description="keep of each block of the towers its input alone and compute the rest again in the "
        "backward: the same gradient in a fraction of the memory, for one more forward pass of the blocks",
    )
    compile: Annotated[Literal["auto", "off", "towers"], Mark.FREE] = Field(
        "auto",
        description="towers: compile a block of each tower at the start (seconds to a minute, less the next "
        "time), which changes rounding alone; auto: on a GPU with Triton, and without where that fails",
    )
    diagnostics_every: Annotated[int, Mark.FREE] = Field(
        50,
        ge=0,
        description="steps between measures of tension, increments and modality gap; the last step has them, "
        "too; 0: never",
    )
    diagnostics_texts: Annotated[Count, Mark.FREE] = Field(
        16, description="texts of a worker that such measures look at"
    )
    trust_region_radius: Annotated[NonNegative, Mark.FREE] = Field(
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
    start_from: str = Field(
        "",
        description="checkpoint of a run whose weights this one starts from, such as its best/; parts that "
        "only this model has, such as ψ, start new; empty: none",
    )
    increment_start: Literal["random", "zero"] = Field(
        "random",
        description="ψ's output layer at the start; random: as released; zero: no increment, so that the "
        "first step is the baseline's",
    )
    freeze: Literal["auto", "none", "patch_conv", "image", "text", "towers", "encoders", "baseline"] = Field(
        "auto",
        description="what does not learn: of CLIP, patch_conv, image, text or towers; encoders: towers and "
        "adapters; baseline: all but ψ; auto: patch_conv with clip_weights or start_from, as released, else "
        "none",
    )
    encoder_lr_factor: Positive = Field(
        1.0, description="factor on the learning rates of CLIP's towers (clip_lr) and of adapters (lr)"
    )
    precision: Literal["auto", "float32", "bf16", "fp16_released"] = Field(
        "auto",
        description="of the encoders in training; scores and losses are float32 always. auto: bf16 on GPUs "
        "that have it in hardware, else float32, resolved when a run begins; bf16: with weights in float32; "
        "fp16_released: CLIP's weights and moments in fp16, as the released training has them, which moves "
        "them far more than clip_lr says (needs bert_adam)",
    )
    encoder_gradient_divisor: Annotated[
        float, Field(ge=1, allow_inf_nan=False), IdleIf("precision", ("auto", "float32", "bf16"))
    ] = Field(
        4.0,
        description="with precision fp16_released the gradient at the encoders' features is divided by this: "
        "the released training divides it by its number of GPUs",
    )
    tf32: bool = Field(
        False,
        description="products and convolutions of float32 on a GPU in TF32, faster and rougher, those of "
        "scores (errors of 5e-4) and losses too, but for what model.products is about; false: neither, where "
        "torch alone has convolutions in TF32",
    )
    warmup_fraction: Fraction = Field(0.1, description="share of the schedule's steps that warm up linearly")
    schedule_epochs: Annotated[
        int,
        Field(ge=0),
        IdleIf("optimizer", ("adamw",), "optimizer {} has its schedule over the whole run; set 0"),
    ] = Field(
        0,
        description="epochs that the cosine of bert_adam's schedule is over; after them it rises again, as "
        "in the released training, which always has 5; 0: the run's own",
    )
    max_grad_norm: Positive = Field(1.0, description="global norm that gradients are clipped to")
    max_steps: int = Field(0, ge=0, description="stop after so many steps; 0: run all epochs")
    keep_checkpoints: Annotated[CountOrAll, Mark.FREE] = Field(
        2,
        description="last checkpoints kept, beside the best on val; all: every one, each of three times the "
        "model's size, for evaluate.test_curve; training then waits for a slow storage rather than miss a "
        "step of checkpoint_every_steps",
    )
    checkpoint_every_steps: Annotated[int, Mark.FREE] = Field(
        0,
        ge=0,
        description="steps between checkpoints within an epoch, later or fewer where the storage is slow and "
        "keep_checkpoints is a number; each epoch ends with one; 0: none",
    )
    checkpoint_every_s: Annotated[NonNegative, Mark.FREE] = Field(
        600.0, description="seconds between checkpoints within an epoch; 0: none for the time alone"
    )
    max_failures: Annotated[int, Mark.FREE] = Field(
        2, ge=0, description="worker failures survived by restarting from the last checkpoint"
    )
    profile: Annotated[bool, Mark.FREE] = Field(
        False, description="measure the stages of every step; a table, a picture and a trace at the end"
    )
    resume: Annotated[bool, Mark.FREE] = Field(
        True, description="continue an interrupted run of the same name"
    )
    overwrite: Annotated[bool, Mark.FREE] = Field(
        False, description="delete an earlier run of the same name first"
    )

    @property
    def towers_learn(self) -> bool:
        """True if training changes the towers, apart from their logit scale, which no ranking depends on."""
        return (
            self.input == "frames"
            and self.freeze not in ("towers", "encoders", "baseline")
            and self.clip_lr > 0
        )

    @model_validator(mode="after")
    def _fp16_is_the_released_recipe(self) -> TrainConfig:
        if self.precision == "fp16_released" and self.optimizer != "bert_adam":
            raise ValueError(
                f"precision fp16_released needs optimizer bert_adam, not {self.optimizer}: the two are one "
                "recipe, and others divide by moments that fp16 rounds to 0; for adamw set "
                "train.precision=auto and train.clip_lr to 1e-6 or more"
            )
        return self

    @model_validator(mode="after")
    def _frozen_parts_know_something(self) -> TrainConfig:
        trained = self.clip_weights or self.start_from
        if self.freeze not in ("auto", "none", "patch_conv") and not trained:
            raise ValueError(
                f"freeze {self.freeze} would keep random weights: set clip_weights or start_from"
            )
        return self
