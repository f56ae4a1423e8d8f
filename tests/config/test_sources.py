"""The keys of ``sources``: nonsense is refused before a night's run, not in the middle of it."""

from __future__ import annotations

from typing import Any

import pytest

from gare.config import load_config, parse_config
from gare.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schemes", []),
        ("schemes", ["s3", "s3"]),
        ("schemes", ["ftp"]),
        ("retries", -1),
        ("retries", True),
        ("timeout_s", 0),
        ("deadline_s", -1.0),
        ("max_video_mb", 0),
        ("backoff_s", float("inf")),
    ],
)
def test_nonsense_is_refused_by_key(key: str, value: Any) -> None:
    """A slip in a limit would otherwise show as ten thousand failed videos."""
    with pytest.raises(ConfigError, match=f"sources.{key}"):
        parse_config({"sources": {key: value}})


def test_schemes_are_given_on_the_command_line(tmp_path: Any) -> None:
    """What restricts a foreign manifest has to be at hand where it is run."""
    (tmp_path / "own.yaml").write_text("name: own\n")
    config = load_config(tmp_path / "own.yaml", ["sources.schemes=[s3, https]"])
    assert config.sources.schemes == ("s3", "https")
    assert parse_config({}).sources.private_addresses is False
