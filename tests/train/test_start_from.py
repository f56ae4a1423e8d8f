"""A run that starts from another one's weights, encoders that learn slowly or not at all, and ψ from zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gare.config import Config
from gare.errors import ConfigError
from gare.model.gare import GARE
from gare.train.checkpoint.files import load_checkpoint, save_checkpoint
from gare.train.checkpoint.initial_model import fault_of_zero_shot, initial_model
from gare.train.step import Learner, build_learner, train_step
from tests.helpers.tiny import moved_model, tiny_batch, tiny_config

BASELINE = ("model.increment=false", "model.adapters=true")


@pytest.fixture
def baseline(tmp_path: Path) -> str:
    """Returns the folder of a trained baseline."""
    config = tiny_config(*BASELINE)
    model = moved_model(*BASELINE)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    folder = str(tmp_path / "baseline")
    save_checkpoint(folder, build_learner(model, config, 4, torch.device("cpu")), 1)
    return folder


def learner_of(config: Config) -> Learner:
    return build_learner(initial_model(config), config, 10, torch.device("cpu"))


def scores_of(model: GARE, config: Config, rng: np.random.Generator) -> torch.Tensor:
    batch = tiny_batch(config, rng)
    model.eval()
    with torch.no_grad():
        text = model.encode_text(batch.token_ids.long(), batch.token_mask)
        return model.score(text, model.encode_video(batch.frames, batch.frame_mask))


def test_what_two_models_share_is_taken(baseline: str) -> None:
    """ψ alone is new, and drawn from the run's own seed."""
    source = load_checkpoint(baseline).state_dict()
    model = initial_model(tiny_config("model.adapters=true", f"train.start_from={baseline}"))
    mine = model.state_dict()
    assert set(mine) > set(source)
    assert all(torch.equal(mine[name], value) for name, value in source.items())
    fresh = initial_model(tiny_config("model.adapters=true")).state_dict()
    new = set(mine) - set(source)
    assert {name.split(".")[0] for name in new} == {"increment"}
    assert all(torch.equal(mine[name], fresh[name]) for name in new)


def test_the_first_step_from_zero_is_the_baselines(
    baseline: str, rng: np.random.Generator, seed: int
) -> None:
    settings = ("model.adapters=true", f"train.start_from={baseline}")
    config = tiny_config(*settings, "train.increment_start=zero")
    expected = scores_of(load_checkpoint(baseline), config, np.random.default_rng(seed))
    found = scores_of(initial_model(config), config, np.random.default_rng(seed))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    other = scores_of(initial_model(tiny_config(*settings)), config, np.random.default_rng(seed))
    assert (other - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dropout", ["0", "0.3"])
@pytest.mark.parametrize("side", ["text", "video"])
def test_an_increment_of_zero_learns_in_both_forms_alike(
    rng: np.random.Generator, seed: int, side: str, dropout: str
) -> None:
    """All lengths, spreads and cosines of increments are degenerate there."""
    steps = {}
    for method in ("direct", "factorized"):
        config = tiny_config(
            "train.increment_start=zero",
            f"model.method={method}",
            f"model.corrected_side={side}",
            f"model.increment_dropout={dropout}",
        )
        learner = learner_of(config)
        batches = [tiny_batch(config, np.random.default_rng(seed + step)) for step in range(3)]
        steps[method] = [train_step(learner, batch, list("abcdef")) for batch in batches]
        assert learner.model.increment is not None
        assert learner.model.increment.mean.weight.abs().max() > 0
    for direct, factorized in zip(steps["direct"], steps["factorized"], strict=True):
        assert direct["loss/total"] == pytest.approx(factorized["loss/total"], rel=1e-3)
        assert np.isfinite(factorized["train/grad_norm"])


def test_encoders_that_are_frozen_stay(baseline: str, rng: np.random.Generator) -> None:
    config = tiny_config(
        "model.adapters=true",
        f"train.start_from={baseline}",
        "train.freeze=encoders",
        "train.weight_decay=0.5",
    )
    learner = learner_of(config)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    train_step(learner, tiny_batch(config, rng), list("abcdef"))
    after = learner.model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} == {"temporal", "increment", "towers"}
    assert {name for name in moved if name.startswith("towers")} == {"towers.clip.logit_scale"}


def test_the_increment_can_learn_alone(baseline: str, rng: np.random.Generator) -> None:
    """Then whatever it adds to the score is its own."""
    config = tiny_config("model.adapters=true", f"train.start_from={baseline}", "train.freeze=baseline")
    learner = learner_of(config)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    for _ in range(2):
        train_step(learner, tiny_batch(config, rng), list("abcdef"))
    after = learner.model.state_dict()
    stayed = {name for name, value in after.items() if torch.equal(value, before[name])}
    psi = {name for name in before if name.startswith("increment.")}
    assert set(before) - stayed == (psi | {"towers.clip.logit_scale"}) - {"increment.layers.0.key.bias"}


@pytest.mark.parametrize(
    "settings",
    [
        ("train.freeze=baseline", "model.increment=false"),
        ("train.freeze=encoders", "model.increment=false", "model.temporal=none"),
    ],
)
def test_something_must_learn(settings: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="would leave nothing to learn"):
        tiny_config("train.start_from=/a", *settings)


def test_encoders_learn_at_a_rate_of_their_own() -> None:
    config = tiny_config("model.adapters=true", "train.encoder_lr_factor=0.1", "train.lr=0.5")
    rates = {
        group["name"].split("/")[0]: group["peak_lr"] for group in learner_of(config).optimizer.param_groups
    }
    assert rates == {
        "text": pytest.approx(1e-4),
        "image": pytest.approx(1e-4),
        "scale": 1e-3,
        "adapters": pytest.approx(0.05),
        "head": 0.5,
    }


def test_groups_are_those_of_older_checkpoints_without_a_factor() -> None:
    """Optimisers are saved by position: another group would keep runs from being continued."""
    groups = learner_of(tiny_config("model.adapters=true")).optimizer.param_groups
    assert not [group["name"] for group in groups if group["name"].startswith("adapters")]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("model.temporal_layers=1",), "temporal has other sizes"),
        (("model.clip.text_layers=1",), "towers has other sizes"),
    ],
)
def test_parts_of_other_sizes_are_refused(baseline: str, settings: tuple[str, ...], words: str) -> None:
    """Half of a part would be random, and nobody would see it."""
    with pytest.raises(ConfigError, match=words):
        initial_model(tiny_config(*settings, f"train.start_from={baseline}"))


def test_frozen_encoders_must_have_learned() -> None:
    with pytest.raises(ConfigError, match="would keep random weights: set clip_weights or start_from"):
        tiny_config("train.freeze=encoders")


def test_a_score_is_no_zero_shot_if_its_start_was_trained(baseline: str, tmp_path: Path) -> None:
    config = tiny_config(f"train.start_from={baseline}", "train.freeze=towers")
    folder = str(tmp_path / "frozen")
    save_checkpoint(folder, learner_of(config), 1)
    assert fault_of_zero_shot(folder) == "the training tiny/gare changed them"
