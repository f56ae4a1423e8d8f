"""pipelines/import_features.py: one's own features to a store, learned and evaluated from, without towers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from cluster.layout import Layout, layout
from gare import load_checkpoint, tokenize
from gare.config import Config, parse_config
from gare.data.manifest import read_manifest
from gare.data.store.contents import Store
from gare.data.store.feature_reader import FeatureReader
from gare.errors import CheckpointError, ConfigError, DataError
from gare.train.checkpoint.initial_model import initial_model
from pipelines import evaluate, extract, import_features, prepare, train
from pipelines.evaluating.served_model import predict
from tests.helpers.imported import draw_arrays, draw_records, write_npz, write_records
from tests.helpers.pipelines import in_process, snapshot, tiny

VIDEOS = 40
SETTINGS: dict[str, Any] = {
    "name": "imported",
    "data": {"benchmark": "features"},
    "model": {
        "clip": {"embed_dim": 16},
        "max_frames": 4,
        "temporal_layers": 1,
        "temporal_heads": 2,
        "adapters": True,
    },
    "train": {"run": "own", "input": "features", "epochs": 10, "batch_size": 20, "lr": 1e-2},
    "cluster": {"num_cpus": 2, "train_workers": 2, "cpus_per_worker": 0.5},
    "tracking": {"system_metrics": False},
}


def own(*overrides: str) -> Config:
    return parse_config(SETTINGS, overrides)


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GARE_ROOT for tests that need no Ray."""
    monkeypatch.setenv("GARE_ROOT", str(tmp_path / "root"))
    return tmp_path / "root"


@pytest.fixture
def settings(tmp_path: Path) -> str:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return str(path)


def paths_of(folder: Path, rng: np.random.Generator, videos: int = VIDEOS, **splits: int) -> list[str]:
    """Writes tiny arrays and records; returns the overrides that name them."""
    arrays, records = draw_arrays(rng, videos), draw_records(videos, **splits)
    return [
        f"data.features={write_npz(folder / 'features.npz', arrays)}",
        f"data.records={write_records(folder / 'videos.jsonl', records)}",
    ]


@pytest.fixture(scope="module")
def imported(root: Path, tmp_path_factory: pytest.TempPathFactory, session_seed: int) -> dict[str, Any]:
    """The tiny features, imported below the tests' shared root."""
    folder, rng = tmp_path_factory.mktemp("arrays"), np.random.default_rng(session_seed)
    return import_features.run(own(*paths_of(folder, rng, 120, val=20, test=20)))


@pytest.fixture(scope="module")
def learned(imported: dict[str, Any], ray_local: None) -> dict[str, Any]:
    """A run on the imported features by two workers, with its evaluation."""
    result = train.run(own())
    return result | {"evaluation": evaluate.run(own())}


@pytest.fixture(scope="module")
def places(root: Path) -> Layout:
    return layout(own())


def test_the_store_holds_what_was_given(outputs: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """Padding and order decide which caption trains with which frames."""
    paths = paths_of(tmp_path, rng)
    arrays = np.load(tmp_path / "features.npz")
    result = import_features.run(own(*paths, "features.videos_per_part=16"))
    assert (result["videos"], result["new"], result["counts"]["test"]) == (
        40,
        40,
        {"videos": 6, "captions": 12},
    )
    assert result["widths"] == {"frames": 16, "captions": 12}
    meta = Store(result["store"]).read_meta()
    assert meta.complete
    assert meta.counts == {"videos": 40, "failures": 0, "parts": 3}
    assert "towers_sha256" not in meta.settings
    assert len(meta.settings["arrays_sha256"]) == 64
    manifest = read_manifest(result["manifest"])
    assert (manifest.fingerprint, manifest.benchmark) == (result["manifest_fingerprint"], "features")
    reader = FeatureReader(result["store"])
    found = reader.read([f"v{number}" for number in range(VIDEOS)])
    for number in range(VIDEOS):
        frames = arrays["frames"][arrays["frame_owner"] == number]
        assert np.array_equal(found["frames"][number][found["frame_mask"][number]], frames)
        assert not found["frames"][number][~found["frame_mask"][number]].any()
        assert np.array_equal(found["text"][number][:, :12], arrays["captions"][2 * number : 2 * number + 2])
        assert not found["text"][number][:, 12:].any()
    assert found["token_mask"].sum(axis=2).tolist() == [[2, 2]] * VIDEOS
    assert json.loads((Path(result["store"]) / "result.json").read_text()) == result

    before = snapshot(outputs)
    again = import_features.run(own(*paths))
    assert (again["attempted"], again["fingerprint"]) == (0, result["fingerprint"])
    assert snapshot(outputs) == before


def test_what_changes_an_import(outputs: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """Other features under the same name would be learned from without a word; other texts are just texts."""
    paths = paths_of(tmp_path, rng)
    first = import_features.run(own(*paths))
    records = draw_records(VIDEOS)
    records[3]["captions"][1] = "in other words"
    records[4]["split"] = "val"
    write_records(tmp_path / "videos.jsonl", records)
    second = import_features.run(own(*paths))
    assert (second["changed"], second["unchanged"], second["counts"]["val"]["videos"]) == (1, 39, 5)
    assert second["fingerprint"] == first["fingerprint"]
    assert FeatureReader(second["store"]).read(["v3"])["caption_mask"].all()

    before = snapshot(outputs)
    for overrides in (["data.noise=0.4"], ["model.max_frames=5"], ["model.clip.embed_dim=32"]):
        with pytest.raises(DataError, match=r"made with other settings.*another name"):
            import_features.run(own(*paths, *overrides))
    write_npz(tmp_path / "features.npz", draw_arrays(rng, VIDEOS))
    with pytest.raises(DataError, match="arrays_sha256 is "):
        import_features.run(own(*paths))
    assert snapshot(outputs) == before
    noisy = import_features.run(own(*paths, "name=noisy", "data.noise=0.4"))
    assert (noisy["noisy_captions"], noisy["protocol"]) == (23, "splits of the records; 40 % noise, seed 0")


def test_an_import_that_was_killed_is_finished(
    outputs: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """A store with a part of the videos is never taken for a whole one."""
    paths = [*paths_of(tmp_path, rng), "features.videos_per_part=10"]
    first = import_features.run(own(*paths))
    store = Path(first["store"])
    sorted((store / "data").iterdir())[1].unlink()
    (store / "_META.json").write_text(
        (store / "_META.json").read_text().replace('"complete": true', '"complete": false')
    )
    again = import_features.run(own(*paths))
    assert (again["new"], again["unchanged"], again["videos"]) == (10, 30, 40)
    assert Store(first["store"]).read_meta().complete


def test_bad_input_is_one_message(
    outputs: Path, tmp_path: Path, settings: str, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 3 and one message for data, 2 for settings, and nothing is written."""
    paths, run = paths_of(tmp_path, rng), import_features.run
    arrays = draw_arrays(rng, VIDEOS)
    arrays["frame_owner"][0] = VIDEOS
    bad = f"data.features={write_npz(tmp_path / 'bad.npz', arrays)}"
    config = ("--config", settings)
    in_process(capsys, run, *config, bad, paths[1]).refused(3, "bad.npz", "frame_owner is not a record")
    in_process(capsys, run, *config, *paths, "model.clip.embed_dim=14").refused(3, "model.clip.embed_dim=16")
    in_process(capsys, run, *config, *paths, "model.max_frames=1").refused(3, "model.max_frames=4")
    in_process(capsys, run, *config, paths[0]).refused(2, "data.records must be set")
    in_process(capsys, run, *config, *paths, "data.noise=0.001").refused(2, "data.noise", "chooses none")
    in_process(capsys, run, *config, "data.benchmark=folder", "train.input=frames").refused(2, "extract.num")
    in_process(capsys, prepare.run, *config, *paths).refused(2, "data.benchmark", "import_features.py")
    in_process(capsys, extract.run, *config, *paths).refused(2, "data.benchmark", "import_features.py")
    in_process(capsys, train.run, *config).refused(3, "import_features.py")
    assert not outputs.exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.input=frames", "no frames to learn from: set train.input=features"),
        ("evaluate.input=frames", "no frames to score"),
        ("evaluate.zero_shot=true", "evaluate.zero_shot scores towers as they are"),
        ("evaluate.qbnorm=true", "evaluate.qbnorm encodes captions with towers"),
        ("model.context=words", "model.context words needs features of words"),
        ("features.weights=/a.pt", "features.weights would change nothing"),
        ("train.clip_weights=/a.pt", "train.clip_weights would change nothing"),
        ("data.videos=/videos", "videos would change nothing: benchmark is features"),
        ("data.val_videos=5", "val_videos would change nothing: benchmark is features"),
        ("augment.operations=4", "augment changes pictures"),
    ],
)
def test_settings_that_need_towers_or_videos(override: str, words: str) -> None:
    """A setting without effect is a result that is not what its owner thinks."""
    with pytest.raises(ConfigError) as caught:
        own(override)
    assert words in str(caught.value)
    with pytest.raises(ConfigError, match="features would change nothing: benchmark is folder"):
        tiny("data.benchmark=folder", "data.features=a.npz", "data.num_train=700")


def test_training_needs_no_towers(learned: dict[str, Any], places: Layout) -> None:
    """What is learned is a checkpoint without towers, better than chance on videos that it never saw."""
    model = load_checkpoint(learned["checkpoint"])
    assert not [name for name, _ in model.named_parameters() if "vision" in name or "text_model" in name]
    assert model.adapters is not None
    assert model.adapters.text.weight.abs().max() > 0
    start = initial_model(own())
    assert start.logit_scale.item() == pytest.approx(np.log(1 / 0.07))
    assert learned["steps"] == 10 * 8
    evaluation = learned["evaluation"]
    assert (evaluation["num_texts"], evaluation["num_videos"]) == (40, 20)
    assert evaluation["metrics"]["t2v/MnR"] < 7  # 10.5 by chance
    assert (evaluation["registered"], evaluation["benchmark"]) == ("", "imported")
    assert not (Path(places.evaluation("own", "test")) / "gallery.safetensors").exists()
    # The same settings again go on with the finished run, and other ones are refused.
    assert train.run(own())["mlflow_run_id"] == learned["mlflow_run_id"]
    with pytest.raises(ConfigError, match="other settings or clips"):
        train.run(own("train.lr=0.1"))


def test_its_model_encodes_nothing_new(learned: dict[str, Any]) -> None:
    """The reason comes in one message, not as a missing attribute of a module."""
    model = load_checkpoint(learned["checkpoint"])
    reason = "was learned from imported features"
    with pytest.raises(ConfigError, match=reason):
        model.encode_text(*tokenize(["a dog"], 32))
    with pytest.raises(ConfigError, match=reason):
        model.encode_video(torch.zeros(1, 4, 3, 224, 224), torch.ones(1, 4))
    with pytest.raises(ConfigError, match=reason):
        predict((model, None), ["a dog"])
    with pytest.raises(CheckpointError, match=reason):
        initial_model(tiny(f"train.clip_weights={learned['checkpoint']}"))


def test_a_checkpoint_is_evaluated_where_it_belongs(
    learned: dict[str, Any], places: Layout, tmp_path: Path, rng: np.random.Generator
) -> None:
    """A score of a model on features of other encoders is a number that means nothing."""
    sizes = own().model.clip.model_dump()
    of_videos = tiny(
        "model.adapters=true",
        "model.max_words=32",
        *(f"model.clip.{key}={value}" for key, value in sizes.items()),
        f"extract.image_size={sizes['image_size']}",
        f"evaluate.checkpoint={learned['checkpoint']}",
    )
    with pytest.raises(CheckpointError, match=r"was learned from imported features.*data.benchmark=features"):
        evaluate.run(of_videos)
    swapped = layout(own("name=swapped"))
    shutil.copytree(places.run("own"), swapped.run("own"))
    import_features.run(own(*paths_of(tmp_path, rng), "name=swapped"))
    with pytest.raises(DataError, match="holds other features than those that swapped/own learned from"):
        evaluate.run(own("name=swapped"))
    import_features.run(own(*paths_of(tmp_path, rng), "name=elsewhere", "model.max_frames=5"))
    with pytest.raises(DataError, match="num_frames is 5 in the store and 4"):
        evaluate.run(own("name=elsewhere", f"evaluate.checkpoint={learned['checkpoint']}"))
