"""Tags that describe runs: what they say must be true of the run."""

from __future__ import annotations

import pytest

from cluster.tracking import run_tags
from gare.config import parse_config


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ((), "2"),
        (("cluster.min_workers=1",), "1 to 2"),
        (("cluster.train_workers=auto",), None),
        (("cluster.train_workers=auto", "cluster.min_workers=1"), None),
    ],
)
def test_the_number_of_workers_is_told_where_it_is_known(
    overrides: tuple[str, ...], found: str | None
) -> None:
    """A checkpoint is evaluated with a configuration that does not say on how many workers it was trained."""
    tags = run_tags(parse_config({}, overrides), "folder", "own")
    assert (str(tags["world_size"]) if "world_size" in tags else None) == found
