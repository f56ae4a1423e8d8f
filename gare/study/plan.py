"""The plan of a study, from its file: a grid of settings, and the runs for its seeds.

A study file is YAML: ``title``, ``question``, ``factors`` (by name, the levels of each with their settings),
``reference`` (the factor and level that others are compared with), and optionally ``measure``, ``split``,
``seeds``, ``common`` settings of all runs, ``start``, and ``expected`` directions by level. Where there is a
``start``, a run with its settings is trained first for each seed and data set, and the others start from its
weights, but for levels with a ``train.start_from`` of their own, such as an empty one.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gare.config import Config, parse_config
from gare.config.loading import without_idle_keys
from gare.config.section import Seed
from gare.config.strict_yaml import Typed, load_yaml
from gare.errors import ConfigError
from gare.storage.files import json_sha256

#: The studies that come with this repository.
SHIPPED = Path(__file__).resolve().parents[2] / "conf" / "studies"
#: Sections whose settings change the data, so that such runs have a data set of their own.
DATA_SECTIONS = ("data", "extract", "features", "sources")
#: Settings that a study decides itself.
_OWN = ("name", "train.run", "train.seed", "train.overwrite", "storage", "tracking", "study")

#: Name of the runs that others start from, and the key for their weights.
START, _START_KEY = "start", "train.start_from"

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=40)]
#: Settings by dotted key.
Settings = dict[str, Any]


class Reference(BaseModel):
    """The level of a factor that its other levels are compared with, other factors being equal."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    factor: Word
    level: Word


class StudyFile(BaseModel):
    """The content of a study file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    question: str = ""
    factors: Annotated[dict[Word, dict[Word, Settings]], Field(min_length=1)]
    reference: Reference
    common: Settings = {}
    #: Settings of the runs that the others start from; None: they start from nothing.
    start: Settings | None = None
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    measure: Literal["t2v/R1", "t2v/R5", "t2v/R10", "t2v/MnR", "v2t/R1", "v2t/R5", "v2t/R10", "v2t/MnR"] = (
        "t2v/R1"
    )
    split: Literal["val", "test"] = "test"
    #: By level of the reference's factor: what the paper reports against the reference.
    expected: dict[Word, Literal["better", "worse", "level"]] = {}

    @model_validator(mode="after")
    def _reference_exists(self) -> StudyFile:
        levels = self.factors.get(self.reference.factor)
        if levels is None or self.reference.level not in levels:
            raise ValueError(
                f"reference {self.reference.factor}: {self.reference.level} is no level of a factor"
            )
        if unknown := sorted(set(self.expected) - set(levels)):
            raise ValueError(f"expected names {', '.join(unknown)}, which are no levels of the reference")
        if self.start is not None and START in next(iter(self.factors.values())):
            raise ValueError(f"a level has the name {START}, as have the runs that others start from")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds are given twice")
        for where, settings in self._settings():
            if own := [key for key in settings if key.split(".")[0] in _OWN or key in _OWN]:
                raise ValueError(f"{where} sets {', '.join(own)}, which the study sets itself")
            if bare := [key for key in settings if "." not in key]:
                raise ValueError(f"{where} sets {', '.join(bare)}; keys are section.key")
        return self

    def _settings(self) -> list[tuple[str, Settings]]:
        by_level = [
            (f"factors.{factor}.{level}", settings)
            for factor, levels in self.factors.items()
            for level, settings in levels.items()
        ]
        return [("common", self.common), ("start", self.start or {}), *by_level]


@dataclass(frozen=True)
class Cell:
    """A combination of levels, which is trained once a seed.

    Attributes:
        name: its levels, joined by ``-``.
        levels: level by factor.
        settings: by dotted key.
        is_start: whether others start from its runs.
    """

    name: str
    levels: Mapping[str, str]
    settings: Mapping[str, Any]
    is_start: bool = False


@dataclass(frozen=True)
class PlannedRun:
    """A training and its evaluation.

    Attributes:
        cell: the combination of levels.
        seed: of the training.
        config: complete settings.
        start: the run that it starts from; None: it starts from nothing, or from what its settings name.
    """

    cell: Cell
    seed: int
    config: Config
    start: PlannedRun | None = None

    @property
    def name(self) -> str:
        """The run's name below its data set."""
        return self.config.train.run

    @property
    def digest(self) -> str:
        """SHA-256 of all settings that the result depends on."""
        settings = self.config.identity() | {"data": self.config.data.model_dump(mode="json")}
        settings["evaluate"] = self.config.evaluate.model_dump(mode="json")
        return json_sha256(settings)


@dataclass(frozen=True)
class StudyPlan:
    """All runs of a study.

    Attributes:
        name: of the study.
        file: its file.
        seeds: of the trainings.
        cells: all combinations of levels.
        runs: one for each cell and seed, seed by seed, so that an interrupted study has whole seeds.
        starts: the runs that others start from, which are not compared.
    """

    name: str
    file: StudyFile
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    runs: tuple[PlannedRun, ...]
    starts: tuple[PlannedRun, ...] = ()

    def select(self, only: str) -> tuple[PlannedRun, ...]:
        """Returns the runs of some settings, after those that they start from.

        Args:
            only: names of settings, separated by commas; empty: all.

        Raises:
            ConfigError: for a name that no setting has.
        """
        names = [name for part in only.split(",") if (name := part.strip())]
        known = [cell.name for cell in self.cells]
        if unknown := [name for name in names if name not in known]:
            raise ConfigError(
                f"no setting {', '.join(unknown)} in study {self.name}",
                where="study.only",
                accepted=", ".join(known),
            )
        runs = tuple(run for run in self.runs if not names or run.cell.name in names)
        return (*(one for one in self.starts if any(run.start is one for run in runs)), *runs)

    def comparisons(self) -> list[tuple[Cell, Cell]]:
        """Returns the pairs of reference and other cell, which differ in the reference's factor alone."""
        reference = self.file.reference
        pairs = []
        for cell in self.cells:
            if cell.levels[reference.factor] == reference.level:
                continue
            levels = {**cell.levels, reference.factor: reference.level}
            pairs.append((next(one for one in self.cells if one.levels == levels), cell))
        return pairs

    def data_sets(self) -> dict[str, Config]:
        """Returns one configuration for each data set that has to be made, by the data set's name."""
        return {run.config.name: run.config for run in self.runs}


def read_study(name: str) -> tuple[str, StudyFile]:
    """Reads a study file.

    Args:
        name: a path, or the name of a shipped study, such as noise.

    Returns:
        The study's name, and the content.

    Raises:
        ConfigError: for a file that is missing, or with a fault; all faults are in the one message.
    """
    path, shipped = Path(name), {one.stem: one for one in sorted(SHIPPED.glob("*.yaml"))}
    if not path.is_file() and re.fullmatch(r"[A-Za-z0-9._-]+", name):
        # Looked up, never joined to a path.
        path = shipped.get(name.removesuffix(".yaml"), path)
    if not path.is_file():
        near = difflib.get_close_matches(name, shipped, n=1)
        raise ConfigError(
            f"there is no study {name!r}" + (f" (nearest: {near[0]})" if near else ""),
            where="study.file",
            accepted=f"a YAML file, or one of {', '.join(shipped)}",
        )
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path), accepted="a study file") from error
    try:
        return path.stem, StudyFile.model_validate(_without_types(tree))
    except ValidationError as error:
        faults = "\n".join(
            f"  - {'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors(include_url=False)
        )
        raise ConfigError(f"{error.error_count()} fault(s):\n{faults}", where=str(path)) from error


def _without_types(tree: Any, depth: int = 0, *, keep: bool = False) -> Any:
    """Replaces values as they were typed by their values, but for settings, whose keys decide what they mean.

    Args:
        tree: of the file, or a part of it.
        depth: levels below the file's top.
        keep: whether this is a part with settings: common, or the factors.
    """
    if isinstance(tree, Mapping):
        return {
            str(key): _without_types(
                value, depth + 1, keep=keep or (depth == 0 and key in ("common", "factors"))
            )
            for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [_without_types(value, depth + 1) for value in tree]
    return tree.value if isinstance(tree, Typed) and not keep else tree


def plan_study(
    config: Config,
    name: str,
    file: StudyFile,
    seeds: int | None = None,
    *,
    checkpoint_of: Callable[[Config], str],
) -> StudyPlan:
    """Plans all runs of a study.

    A cell that changes the data has a data set of its own, named after the configuration's and the levels
    that do so.

    Args:
        config: settings that the study changes.
        name: of the study.
        file: its file.
        seeds: number of seeds, the file's first ones and then those that follow; None: the file's.
        checkpoint_of: returns the folder of a run's best checkpoint.

    Raises:
        ConfigError: for a level with settings that do not fit; all faults are in the one message.
    """
    chosen = file.seeds if seeds is None else _first_seeds(file.seeds, seeds)
    cells = tuple(_cells(file))
    runs, faults = [], []
    starts: dict[tuple[str, int], PlannedRun] = {}
    for seed, cell in itertools.product(chosen, cells):
        try:
            start, checkpoint = _start_of(config, name, file, cell, seed), ""
            if start is not None:
                start = starts.setdefault((start.config.name, seed), start)
                checkpoint = checkpoint_of(start.config)
            runs.append(PlannedRun(cell, seed, _config_of(config, name, file, cell, seed, checkpoint), start))
        except ConfigError as error:
            if seed == chosen[0]:
                faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(faults)), where=f"study {name}")
    return StudyPlan(name, file, chosen, cells, tuple(runs), tuple(starts.values()))


def _start_of(config: Config, study: str, file: StudyFile, cell: Cell, seed: int) -> PlannedRun | None:
    """Returns the run that those of a cell start from, on the same data; None if there is none."""
    if file.start is None or _START_KEY in cell.settings:
        return None
    levels = {
        factor: level for factor, level in cell.levels.items() if _changes_data(file.factors[factor][level])
    }
    settings: Settings = {}
    for factor, level in levels.items():
        settings |= file.factors[factor][level]
    start = Cell("-".join([START, *levels.values()]), levels, settings | file.start, is_start=True)
    return PlannedRun(start, seed, _config_of(config, study, file, start, seed))


def _first_seeds(seeds: tuple[int, ...], count: int) -> tuple[int, ...]:
    following = itertools.count(max(seeds) + 1)
    return tuple(itertools.islice(itertools.chain(seeds, following), count))


def _cells(file: StudyFile) -> list[Cell]:
    cells = []
    for levels in itertools.product(*(factor.items() for factor in file.factors.values())):
        names = dict(zip(file.factors, (level for level, _ in levels), strict=True))
        settings: Settings = {}
        for _, some in levels:
            settings |= some
        cells.append(Cell("-".join(names.values()), names, settings))
    return cells


def _config_of(
    config: Config, study: str, file: StudyFile, cell: Cell, seed: int, checkpoint: str = ""
) -> Config:
    """Returns the settings of a run; ``checkpoint`` is that of the run that it starts from, if any."""
    settings = {**file.common, **cell.settings} | ({_START_KEY: checkpoint} if checkpoint else {})
    settings |= {"train.run": f"{study}-{cell.name}-seed{seed}", "train.seed": seed}
    settings |= {"evaluate.split": file.split, "train.overwrite": False}
    if own := _own_data(file, cell):
        settings["name"] = f"{config.name}-{own}"
    overrides = [f"{key}={as_typed(value)}" for key, value in settings.items()]
    tree = without_idle_keys(config.model_dump(mode="json"))
    return parse_config(tree, overrides, where=f"study {study}, {cell.name}")


def as_typed(value: Any) -> str:
    """Returns a setting as it is given on the command line; JSON is YAML, and keeps the type."""
    return value.text if isinstance(value, Typed) else json.dumps(value)


def _own_data(file: StudyFile, cell: Cell) -> str:
    """Names what of a cell changes the data: its levels, and the start where that is on data of its own."""
    own = [level for factor, level in cell.levels.items() if _changes_data(file.factors[factor][level])]
    if cell.is_start and _changes_data(file.start or {}):
        own.append(START)
    return "-".join(own)


def _changes_data(settings: Mapping[str, Any]) -> bool:
    return any(key.split(".")[0] in DATA_SECTIONS for key in settings)
