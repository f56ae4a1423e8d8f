"""The configuration section for fetching videos: allowed schemes, retries, timeouts and limits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from gare.config.section import NonNegative, Positive, Section

Scheme = Literal["file", "s3", "https", "http"]


class SourcesConfig(Section):
    """Allowed schemes and limits for fetching videos."""

    schemes: tuple[Scheme, ...] = Field(
        ("file", "s3", "https", "http"),
        description="where videos may be; file is also that of local paths. Without it a manifest from "
        "elsewhere cannot name files of this machine",
    )
    retries: int = Field(
        6,
        ge=0,
        le=100,
        description="times in a row, without a byte in between, that a fetch is tried again after a "
        "disturbance (a lost connection, 429, 5xx)",
    )
    backoff_s: NonNegative = Field(
        0.5,
        description="seconds before the first new try at most; doubled each time, up to 30, drawn at random",
    )
    timeout_s: Positive = Field(
        30.0, description="seconds without an answer or a byte that count as a lost connection"
    )
    deadline_s: Positive = Field(
        900.0,
        description="seconds that fetching one video may take, new tries included; decoding has its own",
    )
    max_video_mb: Positive = Field(
        4096.0, description="megabytes (10⁶) of the largest video that is fetched; local files have no limit"
    )
    anonymous: bool = Field(
        False, description="read videos on S3 without credentials, as public buckets allow"
    )
    private_addresses: bool = Field(
        False,
        description="whether http and https URIs may lead to this machine or a private network; link-local "
        "and metadata addresses are refused always, also where names and redirects lead there. That is seen "
        "to before connecting, so videos are fetched directly: a proxy (HTTPS_PROXY) would resolve names "
        "itself and is not used. The S3 endpoint may be anywhere",
    )

    @field_validator("schemes")
    @classmethod
    def _each_once(cls, schemes: tuple[Scheme, ...]) -> tuple[Scheme, ...]:
        if not schemes or len(set(schemes)) < len(schemes):
            raise ValueError(f"got {list(schemes)}; at least one scheme, each once")
        return schemes
