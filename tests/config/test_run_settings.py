"""Settings that an earlier version saved, read by this one."""

from __future__ import annotations

import pytest

from gare.config.loading import DEPENDENT_KEYS, Config, differences
from gare.config.run_settings import completed_settings, saved_config, settings_of_run
from gare.errors import ConfigError
from gare.train.checkpoint.files import CONFIG, read_config


def test_defaults_of_idle_keys_may_change(tmp_path_factory: pytest.TempPathFactory) -> None:
    """augment.probability was 1.0 with augmentation off, and no checkpoint of that time could be loaded."""
    tree = Config().model_dump(mode="json")
    assert tree["augment"]["operations"] == 0
    tree["augment"]["probability"] = 1.0
    assert saved_config(tree, where="saved") == Config()
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / CONFIG).write_text(Config().to_yaml().replace("probability: 0.5", "probability: 1.0"))
    assert read_config(str(folder)) == Config()

    saved = settings_of_run(Config())
    saved["augment"]["probability"] = 1.0
    assert not differences(completed_settings(saved), settings_of_run(Config()))


def test_keys_that_have_an_effect_are_kept() -> None:
    """A run with augmentation must not pass for one with other augmentation."""
    tree = Config().model_dump(mode="json")
    tree["augment"] |= {"operations": 4, "probability": 1.0}
    assert saved_config(tree, where="saved").augment.probability == 1.0
    assert differences(completed_settings(tree), completed_settings(Config().model_dump(mode="json"))) == [
        "augment.operations was 4, is 0",
        "augment.probability was 1.0, is 0.5",
    ]
    tree["augment"]["colour"] = 1
    with pytest.raises(ConfigError, match="unknown key"):
        saved_config(tree, where="saved")
    with pytest.raises(ConfigError, match="top level"):
        saved_config(["augment"], where="saved")


def test_idle_keys_are_keys() -> None:
    """A renamed key would silently be refused again in what earlier versions saved."""
    tree = Config().model_dump(mode="json")
    for section, switch, _, keys in DEPENDENT_KEYS:
        assert {switch, *keys} <= tree[section].keys()
