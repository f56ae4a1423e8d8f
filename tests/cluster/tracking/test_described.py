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


def test_imported_features_have_no_decoder() -> None:
    """Runs are compared by these tags: a decoder that read nothing would be a difference that is none."""
    imported = parse_config(
        {"data": {"benchmark": "features"}, "train": {"input": "features"}, "name": "mine"}
    )
    tags = run_tags(imported, "features", "own")
    assert (tags["decoder"], tags["benchmark"], tags["frames"]) == ("none", "mine", imported.model.max_frames)
    assert run_tags(parse_config({}), "folder", "own")["decoder"] == "auto"
