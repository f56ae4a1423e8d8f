"""Fixtures that all tests share."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import numpy as np
import pytest

# Tensors here are tiny: threads would spend their time waiting for each other, most of all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real clips, annotations and broken files; CI insists that it is there."""
    folder = Path(os.environ.get("GARE_SHARED") or REPOSITORY.parent / "shared").resolve()
    if not (folder / "data").is_dir():
        message = f"the shared data are not at {folder}; set GARE_SHARED to their folder"
        if os.environ.get("GARE_REQUIRE_SHARED") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def session_seed() -> int:
    """As ``seed``, for fixtures that many tests share; such tests print it in their assertions."""
    return _draw_seed()


@pytest.fixture
def seed() -> int:
    """A fresh seed, printed, so that a failure can be repeated with GARE_TEST_SEED."""
    return _draw_seed()


def _draw_seed() -> int:
    value = int(os.environ.get("GARE_TEST_SEED") or secrets.randbits(31))
    print(f"GARE_TEST_SEED={value}")
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)
