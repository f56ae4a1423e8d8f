"""The precision of a run, settled before it begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from gare.config import Config
from gare.errors import ConfigError
from gare.storage.files import write_json
from gare.storage.run_folder import RunFolder
from gare.train.optim.optimizer import reach_of_towers
from gare.train.optim.precision import resolve_precision
from pipelines.training.precision import warn_of_towers_that_stay, with_precision, with_saved_precision
from tests.helpers.tiny import tiny_config


@pytest.mark.parametrize(
    ("asked", "on_gpus", "have_bf16", "expected"),
    [
        ("auto", True, True, "bf16"),
        ("auto", True, False, "float32"),
        ("auto", False, False, "float32"),
        ("float32", True, True, "float32"),
        ("bf16", False, False, "bf16"),
        ("fp16_released", True, False, "fp16_released"),
    ],
)
def test_auto_follows_the_devices(asked: str, on_gpus: bool, have_bf16: bool, expected: str) -> None:
    """bf16 that is emulated is slower than float32; what was asked for by name is never changed."""
    config = tiny_config(
        f"train.precision={asked}", f"cluster.use_gpu={on_gpus}", "train.optimizer=bert_adam"
    )
    assert resolve_precision(asked, on_gpus=on_gpus, have_bf16=have_bf16) == expected
    assert with_precision(config, have_bf16=have_bf16).train.precision == expected


def test_a_gpu_without_bf16_is_refused() -> None:
    """It would train many times slower than anyone expects, and say nothing."""
    config = tiny_config("train.precision=bf16", "cluster.use_gpu=true")
    with pytest.raises(ConfigError, match="does not have in hardware") as raised:
        with_precision(config, have_bf16=False)
    assert (raised.value.where, raised.value.exit_code) == ("train.precision", 2)


def test_a_run_goes_on_with_what_it_began_with(tmp_path: Path) -> None:
    """On another machine auto would mean something else, and half the run would be another recipe."""
    write_json(str(tmp_path / "run.json"), {"settings": {"train": {"precision": "bf16"}}})
    assert with_saved_precision(tiny_config(), RunFolder(str(tmp_path))).train.precision == "bf16"
    asked = tiny_config("train.precision=float32")  # which the run is then compared with
    assert with_saved_precision(asked, RunFolder(str(tmp_path))).train.precision == "float32"


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ("train.precision=float32", True),
        ("train.precision=bf16", True),
        ("train.precision=bf16 train.clip_lr=1e-6", False),
        ("train.precision=fp16_released train.optimizer=bert_adam", False),
        ("train.precision=float32 train.clip_lr=0", False),
        ("train.precision=float32 train.freeze=towers train.clip_weights=some.pt", False),
        ("train.precision=float32 train.input=features", False),
    ],
)
def test_towers_that_stay_are_said(changes: str, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The paper's rate with other precisions costs three points of R@1, and looks right in the settings."""
    config = tiny_config("train.clip_lr=1e-7", *changes.split())
    warn_of_towers_that_stay(config, 7031)
    assert ("can move by about 3.2e-04" in caplog.text) == warned


def test_a_rate_of_float32_in_fp16_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Taken over with the paper's precision it is a step of ten times the gradient."""
    released = ["train.precision=fp16_released", "train.optimizer=bert_adam"]
    warn_of_towers_that_stay(tiny_config(*released, "train.clip_lr=1e-7"), 100)
    assert not caplog.text
    warn_of_towers_that_stay(tiny_config(*released, "train.clip_lr=1e-5"), 100)
    assert "is about 10 times the gradient" in caplog.text


def test_gpus_that_could_not_be_looked_at_settle_nothing() -> None:
    """A probe that timed out must not make a month's run one in float32, nor refuse what was asked for."""
    with pytest.raises(ConfigError, match="is auto, and the GPUs could not be checked") as raised:
        with_precision(tiny_config("cluster.use_gpu=true"), have_bf16=None)
    assert raised.value.where == "train.precision"
    asked = tiny_config("cluster.use_gpu=true", "train.precision=bf16")
    assert with_precision(asked, have_bf16=None) == asked


@pytest.mark.parametrize(("steps", "reach"), [(9000 * 20 * 5 // 128, 3.2e-4), (8395 * 5 // 128, 1.5e-5)])
def test_how_far_a_weight_moves(steps: int, reach: float) -> None:
    """The numbers by which the released rate was found to mean something else: MSR-VTT and DiDeMo."""
    train = Config().train.model_copy(update={"clip_lr": 1e-7, "optimizer": "bert_adam"})
    assert reach_of_towers(train, steps) == pytest.approx(reach, rel=0.05)
