"""``model.clip: auto``: the sizes of whatever weights a person has, before anything else is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gare.config import ClipConfig, Config, load_config, parse_config
from gare.config.yaml_files import shipped_files
from gare.errors import CheckpointError, ConfigError
from gare.model.gare import GARE
from gare.model.importing.weights import import_clip
from gare.train.checkpoint.files import save_checkpoint
from gare.train.checkpoint.initial_model import initial_model, sizes_of_weights
from gare.train.step import build_learner
from tests.helpers.tiny import tiny_config
from tests.model.importing.test_weights import SMALL, OpenAIClip, published, scripted

#: ``SMALL`` as a configuration has it; heads are 64 wide.
SIZES: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 16,
    "vision_width": 128,
    "vision_layers": 2,
    "vision_heads": 2,
    "text_width": 64,
    "text_layers": 4,
    "text_heads": 1,
    "vocab_size": 100,
    "max_positions": 77,
    "embed_dim": 64,
}


@pytest.fixture
def auto(tmp_path: Path) -> Path:
    """Settings with the sizes left to the weights."""
    path = tmp_path / "auto.yaml"
    path.write_text("name: mine\nmodel: {clip: auto, temporal_layers: 1}\n")
    return path


def settled(path: Path | str, *overrides: str) -> Config:
    return load_config(path, overrides, sizes_of=sizes_of_weights)


@pytest.fixture
def clip(seed: int) -> OpenAIClip:
    torch.manual_seed(seed)
    return OpenAIClip(**SMALL)


def test_the_sizes_are_those_of_the_weights(clip: OpenAIClip, auto: Path, tmp_path: Path) -> None:
    """Eleven numbers that a person would copy from a table, of which one wrong ends the run."""
    torch.save(published(clip), tmp_path / "plain.pt")
    scripted(clip, tmp_path / "jit.pt")
    import_clip(published(clip)).towers.clip.save_pretrained(tmp_path / "hf")
    for name in ("plain.pt", "jit.pt", "hf"):
        config = settled(auto, f"train.clip_weights={tmp_path / name}")
        assert config.model.clip == ClipConfig(**SIZES), name
        assert config.extract.image_size == 32
        assert config.model.num_temporal_heads == 1
        # Saved as the sizes that they are: what reads a checkpoint needs no weights.
        assert parse_config(yaml.safe_load(config.to_yaml())) == config
    assert initial_model(config).config == config.model
    # features.weights make the features, and win.
    both = f"features.weights={tmp_path / 'plain.pt'}", f"train.clip_weights={tmp_path / 'none.pt'}"
    assert settled(auto, *both).model.clip == ClipConfig(**SIZES)


def test_auto_on_the_command_line_replaces_a_files_sizes(clip: OpenAIClip, tmp_path: Path) -> None:
    """ViT-L/14 on any benchmark is two settings."""
    torch.save(published(clip), tmp_path / "plain.pt")
    overrides = ["model.clip=auto", f"train.clip_weights={tmp_path / 'plain.pt'}"]
    config = settled("didemo", *overrides)
    assert config.model.clip == ClipConfig(**SIZES)
    assert (config.extract.image_size, config.extract.num_frames) == (32, 64)
    (tmp_path / "own.yaml").write_text("extends: didemo\nmodel: {clip: auto}")
    assert settled(tmp_path / "own.yaml", overrides[1]) == config


#: Files of a model that has towers; imported features have none.
WITH_TOWERS = [name for name in shipped_files() if not load_config(name).data.is_imported]


@pytest.mark.parametrize("name", WITH_TOWERS)
def test_auto_works_with_every_shipped_file(name: str, clip: OpenAIClip, tmp_path: Path) -> None:
    """The picture size of a small model's file would hold up everyone who has weights."""
    torch.save(published(clip), tmp_path / "plain.pt")
    overrides = ["model.clip=auto", f"train.clip_weights={tmp_path / 'plain.pt'}"]
    config = settled(name, *overrides)
    assert config.model.clip == ClipConfig(**SIZES)
    assert config.extract.image_size == 32
    with pytest.raises(ConfigError, match=r"64 differs .* 32, which model\.clip=auto read from the weights"):
        settled(name, *overrides, "extract.image_size=64")
    # The command line's, as a section too, is what somebody wants now.
    frames = load_config(name).model.max_frames
    with pytest.raises(ConfigError, match=r"64 differs .*model\.clip=auto"):
        settled(name, *overrides, f"extract={{image_size: 64, num_frames: {frames}}}")


def test_a_picture_size_beside_auto_in_a_file_gives_way(clip: OpenAIClip, tmp_path: Path) -> None:
    """Files are kept while weights change: only the command line is of this run."""
    torch.save(published(clip), tmp_path / "plain.pt")
    path = tmp_path / "own.yaml"
    path.write_text("model: {clip: auto}\nextract: {image_size: 64}")
    assert settled(path, f"train.clip_weights={tmp_path / 'plain.pt'}").extract.image_size == 32


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.clip=auto", "model.clip.patch_size=16"],
        ["model.clip.patch_size=16", "model.clip=auto"],
        ["model.clip.patch_size=16"],
    ],
)
def test_a_size_beside_auto_is_refused(
    overrides: list[str], clip: OpenAIClip, auto: Path, tmp_path: Path
) -> None:
    """Taken in silence it trains ViT-B/32's sizes with another patch, which no weights have."""
    torch.save(published(clip), tmp_path / "plain.pt")
    path = auto if len(overrides) == 1 else "didemo"
    with pytest.raises(ConfigError, match=r"1 fault:\n.*model\.clip\.patch_size: model\.clip is auto, which"):
        settled(path, *overrides, f"train.clip_weights={tmp_path / 'plain.pt'}")
    own = settled(auto, "model.clip={}", "model.clip.patch_size=16")
    assert own.model.clip == ClipConfig(patch_size=16)


def test_auto_without_sizes_hides_no_other_fault(auto: Path, tmp_path: Path) -> None:
    """Found one by one, these are four runs; and sizes that nobody knows are no fault of other keys."""
    wrong = ["train.lrr=3", "extract.sampling=all", "model.increment_heads=7", "extract.image_size=64"]
    for override, said in (
        ("train.run=x", "model.clip: auto takes the sizes of the weights, and none are named"),
        ("train.clip_weights=[5]", "train.clip_weights: got [5]"),
        (f"train.clip_weights={tmp_path / 'none.pt'}", "none.pt: there is no such file"),
    ):
        with pytest.raises(ConfigError) as caught:
            settled(auto, *wrong, override)
        message = str(caught.value)
        assert "3 faults:" in message
        for part in (said, "train.lrr: unknown key", "extract.sampling: got 'all'"):
            assert part in message


def test_the_rest_is_checked_with_the_weights_sizes(clip: OpenAIClip, auto: Path, tmp_path: Path) -> None:
    """What does not fit them is told before hours of extraction."""
    torch.save(published(clip), tmp_path / "plain.pt")
    weights = f"train.clip_weights={tmp_path / 'plain.pt'}"
    with pytest.raises(ConfigError, match=r"extract.image_size 224 differs from model.clip.image_size 32"):
        settled(auto, weights, "extract.image_size=224")
    with pytest.raises(ConfigError, match=r"max_words 78 exceeds clip\.max_positions 77"):
        settled(auto, weights, "model.max_words=78")
    with pytest.raises(ConfigError, match="embed_dim 64 is not a multiple of increment_heads 3"):
        settled(auto, weights, "model.increment_heads=3")
    assert settled(auto, weights, "extract.image_size=32").extract.image_size == 32


def checkpoint_at(uri: str) -> Config:
    config = tiny_config()
    save_checkpoint(uri, build_learner(GARE(config.model), config, 10, torch.device("cpu")), epoch=1)
    return config


def test_sizes_of_a_checkpoint(auto: Path, tmp_path: Path, s3: Any) -> None:
    """A run that starts from a run of ours, on this machine or in an object store."""
    for folder in (str(tmp_path / "checkpoint"), "s3://videos/run/best"):
        config = checkpoint_at(folder)
        fitting = ["model.max_words=8", "model.max_frames=4", "extract.num_frames=4"]
        found = settled(auto, f"features.weights={folder}", *fitting)
        assert found.model.clip == config.model.clip
        assert found.extract.image_size == 16
    with pytest.raises(ConfigError, match=r"max_words 32 exceeds clip\.max_positions 16"):
        settled(auto, f"features.weights={folder}")


def test_weights_that_do_not_tell_their_sizes(clip: OpenAIClip, auto: Path, tmp_path: Path) -> None:
    """The message is the one that training would end with, and names the key where none are given."""
    with pytest.raises(ConfigError, match=r"model\.clip: auto .*train\.clip_weights=FILE, or features"):
        settled(auto)
    torch.save(published(clip), tmp_path / "plain.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "plain.pt").read_bytes()[:3000])
    (tmp_path / "folder").mkdir()
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pt")
    for name, said in (
        ("cut.pt", "is truncated"),
        ("none.pt", "there is no such file"),
        ("folder", "no Hugging Face CLIP folder"),
        ("other.pt", "not a CLIP with a vision transformer"),
    ):
        with pytest.raises(CheckpointError, match=rf"{name}.*{said}"):
            settled(auto, f"train.clip_weights={tmp_path / name}")
    with pytest.raises(ConfigError, match=r"train\.clip_weights: got \[5\]"):
        settled(auto, "train.clip_weights=[5]")


def test_secrets_in_the_weights_location_are_not_shown(auto: Path) -> None:
    """The location is used before the rest is checked, and must be checked itself."""
    with pytest.raises(ConfigError) as caught:
        settled(auto, "train.clip_weights=https://me:hush@host/ViT-B-32.pt")
    assert "environment" in str(caught.value)
    assert "hush" not in str(caught.value)


def test_auto_needs_weights_to_be_read(auto: Path) -> None:
    """A checkpoint's settings hold sizes; whoever reads auto there would open a file that data name."""
    for refuse in (lambda: load_config(auto), lambda: parse_config({"model": {"clip": "auto"}})):
        with pytest.raises(
            ConfigError, match=r"model\.clip: auto needs .*sizes_of=gare\.train.*\.sizes_of_weights"
        ):
            refuse()
