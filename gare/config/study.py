"""The configuration section for studies."""

from __future__ import annotations

from pydantic import Field

from gare.config.section import CountOrAuto, Section


class StudyConfig(Section):
    """A grid of settings, trained with several seeds."""

    file: str = Field(
        "", description="the study: a YAML file, or the name of one in conf/studies, such as noise"
    )
    seeds: CountOrAuto = Field("auto", description="seeds of each setting; auto: those of the study's file")
    only: str = Field(
        "",
        description="settings to run now, by their names in --dry-run, separated by commas; empty: all; "
        "the table has all that are done",
    )
    parallel: CountOrAuto = Field(
        "auto", description="trainings at a time; auto: as many as the cluster's CPUs, or GPUs, have room for"
    )
    reuse: bool = Field(
        True,
        description="take a training that another study has made, in place of one with the same settings, "
        "seed, start and data",
    )
    dry_run: bool = Field(False, description="only say what would be run, and about how long it takes")
