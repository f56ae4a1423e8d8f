"""The configuration section for extracting frames from videos."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gare.config.section import Count, CountOrAuto, Fraction, IdleIf, Mark, Positive, Section


class ExtractConfig(Section):
    """Extraction of frames from videos."""

    store: Literal["frames", "features", "both"] = Field(
        "frames",
        description="what to keep: frames, features (see the section features), or both from one pass",
    )
    num_frames: Annotated[Count, Mark.STORED] = Field(
        12, description="F: frames kept of each clip; shorter ones are padded"
    )
    sampling: Annotated[Literal["released", "uniform", "keyframes"], Mark.STORED] = Field(
        "released",
        description="released: sample_fps, then F of those at equal steps; uniform: the centres of F equal "
        "segments; keyframes: F of the clip's keyframes, fast and approximate",
    )
    sample_fps: Annotated[
        Positive, Mark.STORED, IdleIf("sampling", ("uniform", "keyframes"), "sampling {} has no rate")
    ] = Field(1.0, description="frames per second sampled before F of them are taken (sampling: released)")
    decoder: Annotated[Literal["auto", "pyav", "torchcodec"], Mark.STORED] = Field(
        "auto",
        description="auto: decord where it is right, else PyAV; torchcodec: an optional extra, PyAV where it "
        "is not right",
    )
    image_size: Annotated[Count, Mark.STORED] = Field(
        224,
        description="pixels: short side after resizing; crop center makes it both sides of the picture. With "
        "model.clip=auto that of the weights, whatever a file says, unless it is given on the command line",
    )
    crop: Annotated[Literal["center", "none"], Mark.STORED] = Field(
        "center",
        description="center: the store keeps the centre square; none: the whole picture, for training that "
        "augments before it crops (needs encoding jpeg); whatever else reads it gets the centre square",
    )
    encoding: Annotated[Literal["jpeg", "raw"], Mark.STORED] = Field(
        "jpeg", description="how frames are stored"
    )
    jpeg_quality: Annotated[int, Mark.STORED] = Field(
        95, ge=1, le=100, description="JPEG quality of stored frames"
    )
    deadline_s: Positive = Field(60.0, description="seconds a video may take to decode before it is given up")
    memory_mb: Annotated[float, Field(ge=400, le=10**6)] = Field(
        2000.0,
        description="MB of memory of its own that a decoding process may take before the video is given up; "
        "Linux holds it to that",
    )
    max_failed_fraction: Fraction = Field(
        0.1, description="share of the videos that may fail before the job ends with an error"
    )
    max_attempts: Count = Field(
        5,
        description="attempts at a video that fails for what may pass, such as a server that does not answer "
        "or a full disk; each run makes one, by itself; 1: none again. What is wrong with the file itself is "
        "not tried again until the file changes",
    )
    retry_failed: bool = Field(
        False, description="try all videos again that failed before, also those whose file is at fault"
    )
    retry_traits: bool = Field(
        False,
        description="decode videos again that an earlier version may have read wrongly, as --verify names "
        "them; their frames count until others take their place",
    )
    videos_per_part: Count = Field(
        1000,
        description="videos a Parquet part of the store holds at most; fewer where their frames are large",
    )
    workers: CountOrAuto = Field(
        "auto", description="decoding actors; auto: one for each CPU that the cluster has"
    )

    @model_validator(mode="after")
    def _sampling_makes_sense(self) -> ExtractConfig:
        if self.sampling == "keyframes" and self.decoder == "torchcodec":
            raise ValueError("decoder torchcodec would change nothing: keyframes alone are decoded by PyAV")
        return self

    @model_validator(mode="after")
    def _whole_pictures_are_jpeg(self) -> ExtractConfig:
        if self.crop == "none" and self.encoding != "jpeg":
            raise ValueError(
                f"crop none needs encoding jpeg, not {self.encoding}, which holds squares of one size"
            )
        return self
