"""The settings of evaluation, and of what training keeps for it."""

from __future__ import annotations

import pytest
import yaml

from gare.config import Config, parse_config
from gare.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.split=val"], "test_curve is of split test, and split is val"),
        (["evaluate.checkpoint=/there"], "checkpoint would change nothing: test_curve"),
        (["evaluate.dsl=true", "evaluate.qbnorm=true"], "dsl, qbnorm would change nothing: test_curve"),
        (["evaluate.suite=all"], "exclude each other"),
        (["evaluate.compare=[a, b]"], "exclude each other"),
        (["evaluate.sync=true"], "exclude each other"),
    ],
)
def test_a_test_curve_is_that_and_nothing_else(overrides: list[str], message: str) -> None:
    """A setting that is silently ignored leaves another number than was asked for."""
    with pytest.raises(ConfigError) as caught:
        parse_config({}, ["evaluate.test_curve=true", *overrides])
    assert message in str(caught.value)
    assert "1 fault:" in str(caught.value)


@pytest.mark.parametrize("kept", ["1", "3", "all"])
def test_checkpoints_are_kept_by_number_or_all(kept: str) -> None:
    """Who wants the curve needs every checkpoint, by a word and not by a number that may be too small."""
    config = parse_config({}, [f"train.keep_checkpoints={kept}"])
    assert config.train.keep_checkpoints == yaml.safe_load(kept)
    assert parse_config(yaml.safe_load(config.to_yaml())) == config
    assert Config().train.keep_checkpoints == 2


@pytest.mark.parametrize("kept", ["0", "-1", "none", "1.5", "true", "[1]", "'3'"])
def test_other_numbers_of_checkpoints_are_refused(kept: str) -> None:
    """A run of a week that keeps nothing is noticed when it is too late."""
    with pytest.raises(ConfigError) as caught:
        parse_config({}, [f"train.keep_checkpoints={kept}"])
    message = str(caught.value)
    assert "1 fault:" in message
    assert f"train.keep_checkpoints: got {yaml.safe_load(kept)!r}" in message
