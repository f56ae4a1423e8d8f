"""Each step, interrupted at random moments: nothing is half there, and the same command continues.

GARE_TEST_SEED makes the moments the same again; GARE_INTERRUPT_MINUTES goes on with new ones for so long.
"""

from __future__ import annotations

import csv
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.layout import Layout, layout
from cluster.runtime.signals import NAMES
from cluster.tracking import resolve_tracking_uri
from cluster.tracking.client import client
from gare.data.manifest import read_manifest
from gare.data.store.contents import Store
from gare.storage.files import exists, join, list_files, read_json
from pipelines import prepare
from tests.helpers.interrupts import Ended, assert_ended_in_order, run_command
from tests.helpers.pipelines import losses, tiny
from tests.helpers.stores import stored_values

pytestmark = pytest.mark.faults

MINUTES = float(os.environ.get("GARE_INTERRUPT_MINUTES", "0"))
#: Seconds that a step takes at first, roughly; then what it took.
SECONDS = {"prepare": 3.0, "extract": 12.0, "train": 30.0, "evaluate": 15.0, "compact": 4.0}
SIGNALS = tuple(NAMES)


@dataclass
class Steps:
    """The steps of a data set as commands.

    Attributes:
        repository: where they run.
        tiny_yaml: their configuration.
        overrides: of it.
        environment: variables to add.
        places: where their outputs are.
        tracking_uri: of MLflow.
        seconds: that each takes.
    """

    repository: Path
    tiny_yaml: str
    overrides: list[str]
    environment: dict[str, str]
    places: Layout
    tracking_uri: str
    seconds: dict[str, float] = field(default_factory=lambda: dict(SECONDS))

    def run(self, step: str, interrupt: tuple[signal.Signals, float] | None = None) -> Ended:
        name, *flags = {"compact": ("extract", "--compact")}.get(step, (step,))
        arguments = ["--config", self.tiny_yaml, *flags, *self.overrides]
        return run_command(self.repository, name, arguments, interrupt=interrupt, **self.environment)

    def interrupt(self, step: str, rng: np.random.Generator, number: signal.Signals) -> None:
        """Interrupts a step once, at any moment of the time that it takes."""
        after = float(rng.uniform(0, 1.1 * self.seconds[step]))
        print(f"{step}: {NAMES[number]} after {after:.2f} s", flush=True)
        ended = self.run(step, (number, after))
        print(f"  status {ended.status} after {ended.seconds - after:.1f} s more", flush=True)
        assert_ended_in_order(ended, number)
        self.assert_nothing_is_open(ended)

    def finish(self, step: str) -> dict[str, Any]:
        """Runs a step to its end."""
        ended = self.run(step)
        assert ended.status == 0, ended.stderr
        assert ended.result is not None
        return ended.result

    def assert_nothing_is_open(self, ended: Ended) -> None:
        """No lock, no half description, and no run that MLflow shows as running."""
        places = self.places
        locked = [places.frames, *(join(places.data, one) for one in ("run-locks", "evaluation-locks"))]
        for folder in locked:
            left = [one for one in list_files(folder, recursive=True) if "/lock/" in one]
            assert left == [], (left, ended.stderr)
        if exists(join(places.frames, "_META.json")):
            Store(places.frames).read_meta()
        tracking = client(self.tracking_uri)
        for experiment in tracking.search_experiments():
            for run in tracking.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'"):
                assert not str(run.info.run_name).startswith(Path(places.data).name), ended.stderr


def local_steps(repository: Path, tiny_yaml: str, root: Path, name: str, address: str) -> Steps:
    uri = resolve_tracking_uri("sqlite:///mlflow.db", str(root))
    environment = {"RAY_ADDRESS": address} if address else {}
    config = tiny(f"name={name}")
    return Steps(repository, tiny_yaml, [f"name={name}"], environment, layout(config), uri)


def s3_steps(repository: Path, tiny_yaml: str, root: Path, name: str, address: str, places: Layout) -> Steps:
    """The tiny benchmark's videos, and all outputs on S3."""
    captions = root / f"{name}.csv"
    with captions.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["video", "caption", "split"])
        for row in read_manifest(places.manifest).rows:
            for caption in row.captions:
                writer.writerow([Path(row.uri).name, caption, row.split])
    uri = f"sqlite:////{str(root / 'mlflow.db').lstrip('/')}"
    overrides = [
        *(f"name={name}", "data.benchmark=folder", f"data.videos={places.videos}"),
        *(f"data.captions={captions}", "storage.root=s3://videos/interrupted", f"tracking.uri={uri}"),
    ]
    environment = {"RAY_ADDRESS": address}
    return Steps(repository, tiny_yaml, overrides, environment, layout(tiny(*overrides)), uri)


@pytest.fixture
def address(ray_local: None) -> str:
    return str(ray.get_runtime_context().gcs_address)


def rounds() -> Iterator[int]:
    """Numbers from 0, until the minutes are over; at least one."""
    until = time.monotonic() + 60 * MINUTES
    number = 0
    while not number or time.monotonic() < until:
        yield number
        number += 1


@pytest.mark.filterwarnings("ignore:The ``noload``")  # of MLflow
@pytest.mark.timeout(900 + 90 * MINUTES)
@pytest.mark.parametrize("where", ["local", "s3"])
def test_steps_go_on_where_they_were_interrupted(
    where: str,
    trained: dict[str, Any],
    benchmark: dict[str, Any],
    places: Layout,
    address: str,
    repository: Path,
    root: Path,
    tiny_yaml: str,
    rng: np.random.Generator,
    request: pytest.FixtureRequest,
) -> None:
    """Whoever presses Ctrl-C, or is preempted, must lose nothing and find nothing broken the next time."""
    seconds = dict(SECONDS)
    for number in rounds():
        name = f"interrupted-{where}-{number}"
        if where == "s3":
            request.getfixturevalue("s3")
            steps = s3_steps(repository, tiny_yaml, root, name, address, places)
        else:
            steps = local_steps(repository, tiny_yaml, root, name, address)
        steps.seconds = seconds
        numbers = [SIGNALS[(number + one) % 2] for one in range(2)]
        for one in numbers:
            steps.interrupt("prepare", rng, one)
        assert steps.finish("prepare")["counts"] == benchmark["prepare"]["counts"]
        for one in numbers:
            steps.interrupt("extract", rng, one)
            steps.interrupt("compact", rng, one) if exists(steps.places.frames + "/_META.json") else None
        assert steps.finish("extract")["videos"] == 40
        assert_same_clips(steps.places.frames, places.frames)
        for one in numbers:
            steps.interrupt("train", rng, one)
        result = steps.finish("train")
        assert result["loss"] == pytest.approx(trained["loss"], abs=0)
        assert losses(steps.places.run("first")) == losses(places.run("first"))
        for one in numbers:
            steps.interrupt("evaluate", rng, one)
        evaluation = steps.finish("evaluate")
        assert evaluation["metrics"] == trained["evaluation"]["metrics"]
        assert read_json(join(steps.places.evaluation("first", "test"), "result.json")) == evaluation
        runs = client(steps.tracking_uri)
        assert runs.get_run(evaluation["mlflow_run_id"]).info.status == "FINISHED"


@pytest.mark.timeout(600 + 90 * MINUTES)
def test_a_local_ray_is_ended_with_its_command(
    benchmark: dict[str, Any],
    repository: Path,
    root: Path,
    tiny_yaml: str,
    rng: np.random.Generator,
) -> None:
    """Its start, its work and its end are where signals find most that is half open."""
    for number in rounds():
        steps = local_steps(repository, tiny_yaml, root, f"own-{number}", "")
        steps.environment["RAY_ADDRESS"] = ""
        prepare.run(tiny(f"name=own-{number}"))
        for one in SIGNALS:
            steps.interrupt("extract", rng, one)
        assert steps.finish("extract")["videos"] == 40


def assert_same_clips(store: str, undisturbed: str) -> None:
    """Every value of every clip is that of a store that nobody disturbed, but for its file."""
    own = {"video_id", "uri", "source_version"}

    def values(uri: str) -> dict[str, dict[str, Any]]:
        return {
            video_id.rpartition("/")[2]: {key: row[key] for key in row if key not in own}
            for video_id, row in stored_values(uri).items()
        }

    assert values(store) == values(undisturbed)
    assert Store(store).read_failures({}) == {}
    assert Store(store).read_meta().complete
