"""conf/: settings a person runs. The benchmarks' hold the paper's values."""

from __future__ import annotations

from pathlib import Path

import pytest

from gare.config import differences, load_config
from gare.config.yaml_files import shipped_files
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
    assert (train.precision, train.encoder_gradient_divisor) == ("fp16_released", 4), "clip_lr fits it alone"
    assert train.captions_per_video == 0
    assert (train.schedule_epochs or train.epochs) == 5, "the released cosine is always over 5 epochs"
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


#: Commands of README.md and docs/ that are said to work with any file.
DOCUMENTED = [
    "model.increment=false",
    "model.increment=false model.pooling=mean",
    "model.increment=false model.pooling=mean model.temporal=none",
    "evaluate.zero_shot=true train.clip_weights=ViT-B-32.pt",
    "evaluate.test_curve=true",
    "cluster.use_gpu=false train.precision=float32 train.clip_lr=1e-6",
    "train.precision=auto train.clip_lr=1e-6",
    "train.optimizer=adamw train.precision=auto train.clip_lr=1e-6",
    "extract.store=both features.weights=ViT-B-32.pt",
    "train.run=features train.input=features augment.operations=0 train.clip_weights=ViT-B-32.pt "
    "model.adapters=true train.batch_size=1024",
    "train.run=features train.clip_weights=ViT-B-32.pt model.adapters=true",
    "cluster.train_workers=1 train.activation_checkpointing=true",
    "cluster.train_workers=1 train.micro_batch=32",
]


#: The file without towers, for which commands that name weights are refused.
IMPORTED = "msrvtt-features"
OF_TOWERS = [command for command in DOCUMENTED if "weights=" in command]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        (name, command)
        for command in DOCUMENTED
        for name in shipped_files()
        if (name, command) not in {(IMPORTED, one) for one in OF_TOWERS}
    ],
)
def test_documented_commands_work_with_every_shipped_file(name: str, command: str) -> None:
    """A baseline that is refused for a key of the file is a table without its first row."""
    config = load_config(name, command.split())
    if "model.increment=false" in command:
        assert not config.model.increment
        assert config.model.corrected_side == "text"


@pytest.mark.parametrize("command", OF_TOWERS)
def test_weights_are_refused_where_there_are_no_towers(command: str) -> None:
    """Weights that nothing reads would be taken for those of the result."""
    assert not load_config(IMPORTED).has_towers
    with pytest.raises(ConfigError, match=r"data\.benchmark features has no towers|has none"):
        load_config(IMPORTED, command.split())


def test_adamw_says_what_the_papers_files_need_beside_it() -> None:
    """Their precision and rate are of bert_adam, and to change them in silence would leave CLIP as it is."""
    with pytest.raises(ConfigError, match=r"for adamw set train\.precision=auto and train\.clip_lr"):
        load_config("activitynet", ["train.optimizer=adamw"])


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


def test_the_benchmarks_differ_in_what_is_their_own_alone(repository: Path) -> None:
    """A setting that was corrected in three of four files is a comparison of two recipes."""
    shared = load_config(repository / "conf" / "paper.yaml").model_dump()
    own = {
        *("name", "data.benchmark", "data.train_list", "data.val_videos", "extract.num_frames"),
        *("model.max_words", "model.max_frames", "model.corrected_side", "model.temporal"),
        *("train.epochs", "train.schedule_epochs", "train.micro_batch"),
    }
    for name in PAPER:
        lines = differences(shared, load_config(repository / "conf" / f"{name}.yaml").model_dump())
        assert {line.split()[0] for line in lines} <= own


@pytest.mark.parametrize(
    ("name", "patch_px", "widths", "heads"),
    [("vit-b-16", 16, (768, 512, 512), (12, 8, 8)), ("vit-l-14", 14, (1024, 768, 768), (16, 12, 12))],
)
def test_larger_towers_are_a_few_lines(
    name: str, patch_px: int, widths: tuple[int, ...], heads: tuple[int, ...], repository: Path
) -> None:
    """Sizes that are not the weights' are found only when these are read; the recipe is the same."""
    base, config = (load_config(one) for one in ("msrvtt", f"msrvtt-{name}"))
    clip = config.model.clip
    assert clip.patch_size == patch_px
    assert (clip.vision_width, clip.text_width, clip.embed_dim) == widths
    assert (clip.vision_heads, clip.text_heads, config.model.num_temporal_heads) == heads
    assert config.train.run != base.train.run, "a run of another model may not have the same name"
    for line in differences(base.model_dump(), config.model_dump()):
        assert line.startswith(("model.clip.", "train.run "))


def test_every_shipped_file_is_found_by_its_name(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--config msrvtt`` works from anywhere; the file of one's own that is there wins."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "msvd").mkdir()  # a folder of videos, perhaps
    for path in (repository / "conf").glob("*.yaml"):
        assert load_config(path.stem) == load_config(path.name) == load_config(path)
    (tmp_path / "msvd.yaml").write_text("name: mine")
    assert load_config("msvd.yaml").name == "mine"
    assert load_config("msvd").name == "msvd"


@pytest.mark.parametrize("name", ["msrvt", "msrvt.yaml", "MSRVTT", "..", ".", "msvd.yml"])
def test_unknown_names_list_the_shipped_ones(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slip of a name gets the names, the nearest last."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        load_config(name)
    assert caught.value.where == name
    assert "activitynet, demo, didemo" in caught.value.accepted
    if name.startswith("msrvt"):
        assert caught.value.accepted.endswith("nearest: msrvtt")
