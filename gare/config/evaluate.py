"""The configuration section for evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gare.config.section import Count, Positive, Section, Seed

#: RUN or NAME/RUN: parts of a path below the storage root.
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")]


class EvaluateConfig(Section):
    """Scoring a split with a checkpoint."""

    split: Literal["train", "val", "test"] = Field("test", description="which split to score")
    input: Literal["auto", "frames", "features"] = Field(
        "auto",
        description="store to score from; auto: the kind that the checkpoint learned from, frames with "
        "zero_shot",
    )
    checkpoint: str = Field("", description="checkpoint folder; empty: the best on val of train.run")
    zero_shot: bool = Field(
        False,
        description="score the towers of features.weights (train.clip_weights) as they are, without any run: "
        "the mean of unit frames; its results are those of a run named zero-shot, and go when other towers "
        "are scored so",
    )
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

    compare: tuple[RunName, ...] = Field(
        (),
        max_length=2,
        description="two evaluated runs to compare, by train.run (in all data sets below storage.root), by "
        "NAME/RUN or by MLflow run id; nothing is evaluated then",
    )
    suite: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=100)] = Field(
        "", description="collect evaluate.runs under an MLflow run of this name, with mean ± deviation"
    )
    runs: tuple[RunName, ...] = Field(
        (),
        description="runs of the suite, named as in compare; empty: all of this data set",
    )

    test_curve: bool = Field(
        False,
        description="score every kept checkpoint of train.run on split test, to look at; nothing chooses, "
        "compares or registers by it. See train.keep_checkpoints",
    )

    sync: bool = Field(
        False,
        description="deliver to MLflow what the runs of this data set could not while it was lost; nothing "
        "is evaluated then",
    )

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> EvaluateConfig:
        for switch, keys in (("dsl", ["dsl_scale"]), ("qbnorm", ["qbnorm_scale", "qbnorm_bank"])):
            if changed := [] if getattr(self, switch) else self.non_default(*keys):
                raise ValueError(f"{', '.join(changed)} would change nothing: {switch} is off")
        if len(self.compare) == 1:
            raise ValueError("compare takes two runs")
        tasks = (self.compare, self.suite, self.sync, self.test_curve, self.zero_shot)
        if sum(map(bool, tasks)) > 1:
            raise ValueError("compare, suite, sync, test_curve and zero_shot exclude each other")
        if self.zero_shot and self.checkpoint:
            raise ValueError("checkpoint would change nothing: zero_shot has none")
        if self.test_curve and self.split != "test":
            raise ValueError(
                f"test_curve is of split test, and split is {self.split}: training has the curve of val"
            )
        if changed := self.non_default("checkpoint", "dsl", "qbnorm") if self.test_curve else []:
            raise ValueError(
                f"{', '.join(changed)} would change nothing: test_curve has the plain scores of the "
                "run's own checkpoints"
            )
        if self.runs and not self.suite:
            raise ValueError("runs would change nothing: suite is empty")
        if self.split == "train" and self.qbnorm:
            raise ValueError("qbnorm on split train would take its bank from the queries themselves")
        return self
