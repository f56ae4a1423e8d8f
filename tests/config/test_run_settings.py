"""Settings that an earlier version saved, read by this one."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from gare.config import ExtractConfig, FeaturesConfig, TrainConfig, parse_config
from gare.config.loading import Config, differences
from gare.config.run_settings import completed_settings, saved_config
from gare.config.section import Mark, Section
from gare.data.store.feature_schema import feature_settings
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

    saved = Config().identity()
    saved["augment"]["probability"] = 1.0
    assert not differences(completed_settings(saved), Config().identity())


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
    marked = 0
    for name, section in Config().__iter__():
        for key, mark in section.idle_keys() if isinstance(section, Section) else ():
            marked += 1
            assert {key, mark.switch} <= tree[name].keys()
            accepted = get_args(type(section).model_fields[mark.switch].annotation)
            assert not accepted or set(mark.values) <= set(accepted)
    assert marked > 20


def test_keys_of_a_store_say_so() -> None:
    """A key that changes frames and is not in the fingerprint would mix two kinds of frames in one store."""
    other: dict[str, Any] = {
        "num_frames": 5,
        "sampling": "uniform",
        "sample_fps": 2.0,
        "decoder": "pyav",
        "image_size": 64,
        "crop": "none",
        "encoding": "raw",
        "jpeg_quality": 50,
        "words": True,
        "precision": "bf16",
    }
    assert other.keys() == ExtractConfig.marked(Mark.STORED) | FeaturesConfig.marked(Mark.STORED)
    plain = Config()
    known = feature_settings(plain, "sha")
    for section in ("extract", "features"):
        config = getattr(plain, section)
        for key in type(config).model_fields:
            if key not in other and not isinstance(getattr(config, key), bool | int | float):
                continue
            changed = config.model_copy(update={key: other.get(key, 77)})
            settings = feature_settings(plain.model_copy(update={section: changed}), "sha")
            assert (settings != known) == (key in other), key


def test_free_keys_do_not_identify_a_run() -> None:
    """A run that moves to another cluster goes on there, and one with another loss is another run."""
    assert Config.marked(Mark.FREE) == set(Config.model_fields) - {
        "name",
        "model",
        "loss",
        "train",
        "augment",
    }
    assert Config.marked(Mark.UNLOGGED) == {"storage", "tracking", "demo", "evaluate", "study"}
    identity = Config().identity()
    assert identity.keys() == {"name", "model", "loss", "train", "augment"}
    assert {"method", "kernel", "products", "memory_mb"}.isdisjoint(identity["model"])
    assert parse_config({"model": {"products": "tf32"}}).identity()["model"]["products"] == "tf32"
    free = {"resume", "overwrite", "keep_checkpoints", "max_failures", "profile", "compile", "micro_batch"}
    free |= {"diagnostics_every", "diagnostics_texts", "trust_region_radius", "activation_checkpointing"}
    free |= {"checkpoint_every_steps", "checkpoint_every_s"}
    assert identity["train"].keys() == TrainConfig.model_fields.keys() - free


@pytest.mark.parametrize(
    ("text", "found"), [("2", 2), ('"2"', 2), ("3.0", 3), ("0", "auto"), ("auto", "auto")]
)
def test_numbers_or_auto(text: str, found: int | str) -> None:
    """Templates of clusters quote all values."""
    config = parse_config({}, [f"cluster.train_workers={text}"])
    assert config.cluster.train_workers == found
    assert type(config.cluster.train_workers) is type(found)


@pytest.mark.parametrize("text", ["null", "true", "-1", "2.5", "many", ".inf", "[1]"])
def test_other_values_than_numbers_and_auto_are_refused(text: str) -> None:
    """A key that is left empty, or a switch, is a mistake."""
    with pytest.raises(ConfigError, match=r"a whole number from 1 on, or the word auto|no value of this key"):
        parse_config({}, [f"cluster.train_workers={text}"])
    with pytest.raises(
        ConfigError, match=r"model\.memory_mb: got None; a number from 1 on, or the word auto"
    ):
        parse_config({"model": {"memory_mb": None}})
