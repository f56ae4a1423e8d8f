"""Fixtures that the tests of the published benchmarks share.

A test file names its benchmark in ``BENCHMARK``, and has ``plain_content``, which reads the benchmark's files
the plain way: from their folder to the content that copies in other forms are made of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gare.data.benchmarks.registry import Benchmark
from tests.helpers.annotation_copies import read


@pytest.fixture(scope="session")
def annotations(shared: Path) -> Path:
    """The folders of all benchmarks' annotation files."""
    return shared / "data" / "annotations"


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, annotations: Path) -> Path:
    """The benchmark's annotation files."""
    return annotations / request.module.BENCHMARK


@pytest.fixture(scope="module")
def original(request: pytest.FixtureRequest, folder: Path) -> Benchmark:
    """The benchmark as it is read from them."""
    return read(request.module.BENCHMARK, folder)


@pytest.fixture(scope="module")
def content(request: pytest.FixtureRequest, folder: Path) -> Any:
    """Their content, read the plain way."""
    return request.module.plain_content(folder)
