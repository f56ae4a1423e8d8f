"""Writers of one store in any order: they sleep, die, wake up, take over and compact, while clocks are set.

GARE_MODEL_EXAMPLES sets the number of histories, GARE_TEST_SEED the seed from which they are drawn. ``make
model`` runs many of them.
"""

from __future__ import annotations

import os

import pytest

from tests.writers.machine import run_machine
from tests.writers.storage import S3Server, serve


def _examples(default: int) -> int:
    return int(os.environ.get("GARE_MODEL_EXAMPLES", default))


def test_writers_lose_and_double_nothing(seed: int) -> None:
    """Whatever order machines fail in, nights of extraction must leave each clip once, as it was made."""
    run_machine(seed, _examples(25))


@pytest.mark.parametrize("conditions", S3Server.KINDS)
def test_writers_on_s3_lose_and_double_nothing(seed: int, conditions: str) -> None:
    """The same on object stores, of which some have no conditional writes."""
    with serve(conditions) as server:
        run_machine(seed, _examples(2), server)
