"""The configuration section for the data set: videos, captions and splits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gare.config.section import Count, Fraction, Section, Seed

#: Benchmarks that are read from their published annotation files.
PUBLISHED = ("msrvtt", "msvd", "didemo", "activitynet", "lsmdc", "youcook2")


class DataConfig(Section):
    """The data set: videos, captions and splits."""

    benchmark: Literal[
        "synthetic", "folder", "features", "msrvtt", "msvd", "didemo", "activitynet", "lsmdc", "youcook2"
    ] = Field(
        "folder",
        description="synthetic: the generated benchmark; folder: your own videos with captions; features: "
        "features of your own encoders, for pipelines/import_features.py; the others: from their published "
        "annotation files",
    )
    videos: str = Field("", description="folder of the videos or s3://…; empty: captions hold URIs (folder)")
    captions: str = Field(
        "",
        description="CSV, JSON Lines or JSON file with their captions; empty: all videos of the folder, to "
        "extract, but not to train or evaluate (benchmark: folder)",
    )
    features: str = Field(
        "",
        description="arrays frames (n, D), frame_owner (n,), captions (m, D'), caption_owner (m,): an .npz "
        "file, or a folder of Parquet files with these columns (benchmark: features)",
    )
    records: str = Field(
        "",
        description="JSON Lines, plain or gzip-ed, a video a line in the order of the owners: video_id, "
        "split and, if the texts are known, captions in the order of their rows (benchmark: features)",
    )
    annotations: str = Field(
        "", description="folder of the benchmark's annotation files, plain or gzip-ed (published benchmarks)"
    )
    train_list: Literal["9k", "7k"] = Field("9k", description="videos to train on (benchmark: msrvtt)")
    val_videos: int = Field(
        0,
        ge=0,
        description="train videos held out for val, drawn with data.seed, where the protocol has no val "
        "(msrvtt, activitynet, youcook2); 0: none, and training keeps its last checkpoint",
    )
    allow_missing: bool = Field(
        False,
        description="leave out clips without video, as the protocol then says (published benchmarks)",
    )
    verify: bool = Field(
        False,
        description="only compare annotations and videos with the published counts and write no manifest "
        "(published benchmarks)",
    )
    seed: Seed = Field(0, description="seed of the generated benchmark, of a split made here and of noise")
    noise: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the train captions that change places with those of other train videos, drawn "
        "with data.seed and marked in the manifest; val and test stay as they are",
    )
    val_fraction: Fraction = Field(0.1, description="share of the videos for val where no split is given")
    test_fraction: Fraction = Field(0.2, description="share of the videos for test where no split is given")
    num_train: Count = Field(700, description="videos to generate for train (benchmark: synthetic)")
    num_val: Count = Field(60, description="videos to generate for val (benchmark: synthetic)")
    num_test: Count = Field(256, description="videos to generate for test (benchmark: synthetic)")

    @property
    def is_published(self) -> bool:
        """True if the benchmark is read from published annotation files."""
        return self.benchmark in PUBLISHED

    @property
    def is_imported(self) -> bool:
        """True if the features are imported: there are no videos, and no towers of the model made them."""
        return self.benchmark == "features"

    @model_validator(mode="after")
    def _fractions_leave_train(self) -> DataConfig:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction + test_fraction must stay below 1, so that train gets videos")
        return self

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> DataConfig:
        published = ("annotations", "train_list", "val_videos", "allow_missing", "verify")
        idle = self.non_default(*published) if not self.is_published else self.non_default("captions")
        if self.is_published and self.benchmark != "msrvtt":
            idle += self.non_default("train_list")
        idle += self.non_default(*(("videos", "captions") if self.is_imported else ("features", "records")))
        if idle:
            raise ValueError(f"{', '.join(idle)} would change nothing: benchmark is {self.benchmark}")
        if self.verify and self.allow_missing:
            raise ValueError("allow_missing would change nothing: verify only lists what is missing")
        if self.verify and self.noise:
            raise ValueError("noise would change nothing: verify writes no manifest")
        return self
