"""The section of the configuration that evaluation reads."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gare.sections import Count, Positive, Section, Seed


class EvaluateConfig(Section):
    """Scoring a split with a checkpoint."""

    split: Literal["train", "val", "test"] = Field("test", description="which split to score")
    input: Literal["auto", "frames", "features"] = Field(
        "auto", description="store to score from; auto: the kind that the checkpoint learned from"
    )
    checkpoint: str = Field("", description="checkpoint folder; empty: the best on val of train.run")
    num_examples: Count = Field(6, description="queries in the retrieval picture")
    resamples: int = Field(
        1000, ge=0, description="bootstrap resamples of the queries for 95 % intervals; 0: no intervals"
    )
    seed: Seed = Field(0, description="seed of the resamples and of the query bank")
    dsl: bool = Field(
        False, description="also dual-softmax metrics, dsl/…: they use all queries of the split at once"
    )
    dsl_scale: Positive = Field(
        100.0, description="κ of dual softmax, s·softmax(κs): an inverse temperature, 100 as CLIP's logits"
    )
    qbnorm: bool = Field(
        False,
        description="also query-bank normalised metrics, qbnorm/t2v/…, with a bank of training captions",
    )
    qbnorm_scale: Positive = Field(
        20.0, description="β of query-bank normalisation, exp(βs): an inverse temperature, the paper's is 20"
    )
    qbnorm_bank: Count = Field(
        5000, description="training captions in the query bank, drawn by seed; all where there are fewer"
    )

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> EvaluateConfig:
        for switch, keys in (("dsl", ["dsl_scale"]), ("qbnorm", ["qbnorm_scale", "qbnorm_bank"])):
            if changed := [] if getattr(self, switch) else self.changed(*keys):
                raise ValueError(f"{', '.join(changed)} would change nothing: {switch} is off")
        if self.split == "train" and self.qbnorm:
            raise ValueError("qbnorm on split train would take its bank from the queries themselves")
        return self
