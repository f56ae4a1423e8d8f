"""The configuration section for the upkeep of stores: task, locking, part size and preview."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gare.config.section import Count, Positive, Section


class UpkeepConfig(Section):
    """Upkeep of a frame or feature store; no setting here changes the stored values."""

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
