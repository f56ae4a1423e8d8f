"""One Ray, one MLflow database, one benchmark and one trained run for all tests of the pipelines."""

from __future__ import annotations

import dataclasses
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.layout import Layout, layout
from cluster.runtime.session import ray_session
from gare.data.manifest import read_manifest, write_manifest
from pipelines import evaluate, extract, prepare, train
from tests.helpers.pipelines import POISONED, TINY, tiny
from tests.helpers.recovery import SECONDS, recovering

#: Warnings that Ray and MLflow give about themselves; all others are errors.
LIBRARY_WARNINGS = ("ignore::DeprecationWarning:ray.data.context",)
WATCHED = (
    "train.run=watched",
    "train.profile=true",
    "tracking.system_metrics=true",
    "tracking.system_metrics_every_s=0.2",
    "cluster.train_workers=auto",
    "cluster.cpus_per_worker=auto",
    "cluster.use_gpu=auto",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for warning in LIBRARY_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the tests of faults measured, for the README's table."""
    for fault, seconds in sorted(SECONDS.items()):
        times = ", ".join(f"{value:.0f}" for value in sorted(seconds))
        terminalreporter.write_line(f"time to recover: {fault}: {times} s")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """GARE_ROOT of these tests, and a token, so that nothing is written to the home folder."""
    folder = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GARE_ROOT", str(folder))
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Nobody asks for these; test_secrets.py looks where they have got to.
        for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD"):
            patch.setenv(name, secrets.token_hex(32))
        # A report waits for the controller, which looks every two seconds by default; an epoch is less.
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        for name in ("RAY_ADDRESS", "GARE_DEBUG", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        yield folder


@pytest.fixture(scope="session")
def tiny_yaml(root: Path) -> str:
    """The tiny configuration as a file."""
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return str(path)


@pytest.fixture(scope="session")
def ray_local(root: Path, s3_environment: None) -> Iterator[None]:
    """A local Ray of two CPUs, which every run(config) of this process uses, with the tests' S3."""
    with ray_session(tiny().cluster):
        yield


@pytest.fixture(scope="session")
def places(root: Path) -> Layout:
    """Where the tiny benchmark's outputs are."""
    return layout(tiny())


@pytest.fixture(scope="session")
def benchmark(ray_local: None, places: Layout) -> dict[str, Any]:
    """The tiny benchmark, prepared and extracted; results by step."""
    return {"prepare": prepare.run(tiny()), "extract": extract.run(tiny())}


@pytest.fixture(scope="session")
def trained(benchmark: dict[str, Any]) -> dict[str, Any]:
    """The result of the run ``first``: two workers, never disturbed, and evaluated."""
    result = train.run(tiny())
    return result | {"evaluation": evaluate.run(tiny())}


@pytest.fixture(scope="session")
def watched(trained: dict[str, Any]) -> dict[str, Any]:
    """The result of the run ``watched``: as ``first``, by one worker, with its profile and system metrics."""
    return train.run(tiny(*WATCHED))


@pytest.fixture(scope="session")
def poisoned(trained: dict[str, Any], watched: dict[str, Any], places: Layout) -> dict[str, Any]:
    """The run ``first`` again, on a manifest whose test videos have each other's captions.

    It is trained over a run of that name that one worker trained.
    """
    manifest = read_manifest(places.manifest)
    test = manifest.of_split("test")
    captions = {row.video_id: other.captions for row, other in zip(test, [*test[1:], test[0]], strict=True)}
    rows = tuple(
        dataclasses.replace(row, captions=captions.get(row.video_id, row.captions)) for row in manifest.rows
    )
    there = layout(tiny(POISONED))
    write_manifest(dataclasses.replace(manifest, rows=rows), there.manifest)
    shutil.copytree(places.frames, there.frames)
    shutil.copytree(places.run("watched"), there.run("first"))
    # More checkpoints than the other run keeps, of which none may matter either.
    return train.run(tiny(POISONED, "train.keep_checkpoints=all", "train.overwrite=true"))


@pytest.fixture(scope="session")
def calm(benchmark: dict[str, Any]) -> dict[str, Any]:
    """The result of a run of 48 steps, never disturbed, with checkpoints at the ends of epochs alone."""
    return train.run(recovering("calm", "train.checkpoint_every_steps=0"))
