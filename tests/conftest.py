"""Fixtures that all tests share."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.servers import CREDENTIALS, DroppingProxy, Site, empty_bucket, s3_server, web_server

# Tensors here are tiny: threads would spend their time waiting for each other, most of all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The compiler's pool of processes would import torch once more, for a few small kernels.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

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


@pytest.fixture(scope="session")
def s3_proxy(session_seed: int) -> Iterator[DroppingProxy]:
    with s3_server() as upstream:
        proxy = DroppingProxy(upstream, session_seed)
        yield proxy
        proxy.close()


@pytest.fixture(scope="session")
def s3_environment(s3_proxy: DroppingProxy) -> Iterator[None]:
    """Credentials and endpoint of ``s3``, also for processes that are started before a test asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"):
            patch.delenv(name, raising=False)
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": s3_proxy.url}.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def s3(s3_environment: None, s3_proxy: DroppingProxy) -> Iterator[Any]:
    """A boto3 client of an S3 with the empty bucket ``videos``; the environment names it as for a person."""
    import boto3

    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="videos")
    yield client
    s3_proxy.disturb(0)
    empty_bucket(client, "videos")
    client.delete_bucket(Bucket="videos")


@pytest.fixture
def site() -> Iterator[Site]:
    with web_server() as site:
        yield site
