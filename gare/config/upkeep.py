"""The section of the configuration that says what a command does with a store and who may write it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gare.config.section import Count, Positive, Section


class UpkeepConfig(Section):
    """Care of a store of frames or features; none of it changes the values."""

    task: Literal["write", "verify", "compact"] = Field(
        "write",
        description="write: bring the store up to the collection; verify: check all that is in it; compact: "
        "merge small parts and leave out rows that no longer count",
    )
    when_locked: Literal["wait", "refuse"] = Field(
        "wait", description="what a job does that finds another one writing the same store"
    )
    stale_s: Positive = Field(
        120.0,
        description="seconds without a sign of life after which a job of another machine is taken for dead "
        "and its lock taken over",
    )
    part_mb: Count = Field(128, description="MB that compact makes parts of")
    preview: int = Field(
        0, ge=0, description="clips on the contact sheet that the run leaves as preview.png; 0: none"
    )
