"""conf/: settings a person runs. The benchmarks' hold the paper's values."""

from __future__ import annotations

from pathlib import Path

import pytest

from gare.config import load_config
from gare.errors import ConfigError

#: words, frames, epochs, corrected side, GARE's and the baseline's R@1 / R@5 / R@10 / MnR.
PAPER = {
    "msrvtt": (32, 12, 5, "text", "49.1 / 74.7 / 83.6 / 12.0", "46.6 / 73.4 / 82.2 / 12.6"),
    "msvd": (32, 12, 5, "text", "46.4 / 76.1 / 84.5 / 10.6", "45.0 / 75.5 / 84.5 / 10.7"),
    "didemo": (64, 64, 5, "text", "47.6 / 75.4 / 83.1 / 12.0", "45.4 / 74.3 / 82.0 / 12.3"),
    "activitynet": (64, 64, 10, "video", "42.6 / 73.2 / 84.8 / 6.6", "40.2 / 72.5 / 83.6 / 7.5"),
}


@pytest.mark.parametrize("name", PAPER)
def test_benchmarks_have_the_papers_values(name: str, repository: Path) -> None:
    """A run that is to be held against the paper must not differ in a setting that nobody looks at."""
    path = repository / "conf" / f"{name}.yaml"
    config = load_config(path)
    words, frames, epochs, side, gare, baseline = PAPER[name]
    assert config.name == config.data.benchmark == name
    assert (config.model.max_words, config.model.max_frames, config.train.epochs) == (words, frames, epochs)
    assert config.extract.num_frames == frames
    assert config.extract.sample_fps == 1.0
    assert config.model.corrected_side == side
    train, loss, model = config.train, config.loss, config.model
    assert (train.batch_size, train.clip_lr, train.lr, train.weight_decay) == (128, 1e-7, 1e-4, 0.2)
    assert (train.warmup_fraction, train.max_grad_norm, train.optimizer) == (0.1, 1.0, "bert_adam")
    assert train.captions_per_video == 0
    assert (loss.bottleneck_weight, loss.kl_reduction, loss.prior_std) == (0.07, "mean", 1.0)
    assert (loss.radii_weight, loss.radii_bound, loss.direction_weight) == (0.01, 0.5, 0.01)
    assert (loss.direction_alpha, loss.radii_bound_form, loss.positives) == (2.0, "hard", "diagonal")
    assert (model.increment_dropout, model.increment_dropout_per) == (0.3, "pair")
    assert model.temporal == ("none" if name == "msvd" else "transformer")
    assert (model.temporal_layers, model.num_temporal_heads, model.pool_temperature) == (4, 8, 3.0)
    assert (config.augment.operations, config.augment.magnitude, config.augment.noise) == (4, 7.0, 0.5)
    assert config.augment.probability == 0.5
    clip = model.clip
    assert (clip.patch_size, clip.vision_width, clip.text_width, clip.embed_dim) == (32, 768, 512, 512)
    assert config.evaluate.split == "test"
    text = path.read_text(encoding="utf-8")
    assert f"GARE      {gare}" in text
    assert f"baseline  {baseline}" in text


@pytest.mark.parametrize("name", PAPER)
def test_the_baseline_beside_it_is_accepted(name: str, repository: Path) -> None:
    """The line in the file's comment is what a person copies."""
    path = repository / "conf" / f"{name}.yaml"
    line = next(
        line for line in path.read_text(encoding="utf-8").splitlines() if "train.run=baseline" in line
    )
    overrides = line[line.index("(") + 1 : line.index(")")].split()
    config = load_config(path, overrides)
    assert not config.model.increment
    assert config.train.run == "baseline"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.benchmark=msvd", "data.train_list=7k"], "train_list would change nothing: benchmark is msvd"),
        (["data.annotations=/a", "data.verify=true"], "annotations, verify would change nothing"),
        (["data.benchmark=msvd", "data.captions=/a.csv"], "captions would change nothing"),
        (["data.benchmark=msvd", "data.verify=true", "data.allow_missing=true"], "verify only lists"),
        (["data.benchmark=msrvt"], "data.benchmark: got 'msrvt'"),
    ],
)
def test_keys_of_benchmarks_have_an_effect(overrides: list[str], message: str, repository: Path) -> None:
    """A key that is silently ignored is a run of another protocol than was asked for."""
    with pytest.raises(ConfigError) as caught:
        load_config(repository / "conf" / "own.yaml", overrides)
    assert message in str(caught.value)
