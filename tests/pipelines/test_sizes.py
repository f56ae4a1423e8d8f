"""``model.clip: auto`` at the command line; what it settles is tested in tests/train/test_auto_sizes.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cluster.layout import layout
from gare.config import load_config
from gare.errors import ConfigError
from gare.model.importing.weights import import_clip
from pipelines.sizes import sizes_for_evaluation
from tests.helpers.pipelines import command, tiny
from tests.model.importing.test_weights import SMALL, OpenAIClip, published

AUTO = (
    "name: sized\ndata: {benchmark: synthetic, num_train: 2, num_val: 1, num_test: 1}\nmodel: {clip: auto}\n"
)


@pytest.fixture
def auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A configuration without sizes; outputs go below the test's folder."""
    monkeypatch.setenv("GARE_ROOT", str(tmp_path / "root"))
    path = tmp_path / "auto.yaml"
    path.write_text(AUTO)
    return str(path)


def test_steps_settle_the_sizes_or_say_why_not(
    repository: Path, auto: str, tmp_path: Path, seed: int
) -> None:
    """The driver settles them once; a scheduler sees by the status whether settings or weights are wrong."""
    torch.manual_seed(seed)
    import_clip(published(OpenAIClip(**SMALL))).towers.clip.save_pretrained(tmp_path / "hf")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    weights = f"train.clip_weights={tmp_path}"
    command(repository, "prepare", ["--config", auto]).refused(
        2, "model.clip: auto", "train.clip_weights=FILE"
    )
    command(repository, "extract", ["--config", auto, f"{weights}/cut.pt"]).refused(3, "cut.pt: is truncated")
    done = command(repository, "prepare", ["--config", auto, f"{weights}/hf"])
    assert done.status == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["train"]["videos"] == 2


def test_evaluation_takes_the_sizes_of_the_run(auto: str, tmp_path: Path) -> None:
    """A run that has ended knows its sizes; the weights it began with may lie on another machine."""
    with pytest.raises(ConfigError, match=r"train\.clip_weights=FILE, .*there is no .*runs/mine/best"):
        load_config(auto, ["train.run=mine"], sizes_of=sizes_for_evaluation)
    trained = tiny("name=sized")
    fitting = ["model.max_frames=4", "extract.num_frames=4"]
    for run, override in (("mine", "train.run=mine"), ("else", "evaluate.checkpoint={}")):
        folder = Path(layout(trained).checkpoint(run))
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(trained.to_yaml())
        config = load_config(auto, [override.format(folder), *fitting], sizes_of=sizes_for_evaluation)
        assert config.model.clip == trained.model.clip
        assert config.extract.image_size == 32


@pytest.mark.parametrize("task", ['evaluate.compare=["a", "b"]', "evaluate.suite=all", "evaluate.sync=true"])
def test_tasks_without_a_model_need_no_sizes(task: str, auto: str) -> None:
    """Results are compared years later, where the weights are no more."""
    for file in (auto, "own", "demo", "msrvtt"):
        fitted = ["model.clip=auto", "extract.image_size=64", "model.increment_heads=7", "model.max_words=99"]
        load_config(file, [task, *fitted], sizes_of=sizes_for_evaluation)
        with pytest.raises(ConfigError, match=r"1 fault:\n.*train\.lrr: unknown key"):
            load_config(file, [task, *fitted, "train.lrr=3"], sizes_of=sizes_for_evaluation)


def test_zero_shot_asks_for_weights_alone(auto: str) -> None:
    """It has no run: a message that names one sends a person off to train."""
    trained = tiny("name=sized")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"train\.clip_weights=FILE") as caught:
            load_config(auto, ["evaluate.zero_shot=true"], sizes_of=sizes_for_evaluation)
        assert "run that has ended" not in str(caught.value)
        best = Path(layout(trained).checkpoint("gare"))  # of a run that is no business of zero-shot
        best.mkdir(parents=True, exist_ok=True)
        (best / "config.yaml").write_text(trained.to_yaml())
