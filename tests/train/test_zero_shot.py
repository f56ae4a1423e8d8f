"""Zero-shot: the score that every comparison starts from, of towers as they are.

N texts, M clips, F frames, D embedding width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from gare.config import parse_config
from gare.data.images import normalise
from gare.data.store.feature_reader import FeatureReader
from gare.data.store.frame_reader import FrameReader
from gare.errors import ConfigError
from gare.model.encoders.tokenizer import tokenize
from gare.model.gare import GARE
from gare.retrieval.ranking.encode import Encoder, encode_stored, text_of, video_of
from gare.retrieval.ranking.scoring import score_split
from gare.retrieval.results.evaluation import model_label
from gare.train.checkpoint.files import save_checkpoint
from gare.train.checkpoint.initial_model import fault_of_zero_shot, zero_shot_model
from gare.train.step import build_learner
from tests.helpers.features import write_feature_store
from tests.helpers.stores import write_store
from tests.helpers.tiny import TREE, tiny_config

IDS = [f"v{number}" for number in range(6)]
WHOLE = ("model.clip.vocab_size=49408", "model.max_words=16")
#: Switches of a configuration that a zero-shot score must not depend on.
SWITCHES: tuple[tuple[str, ...], ...] = (
    (),
    ("model.corrected_side=video", "model.context=words", "model.increment_layers=2"),
    ("model.increment=false", "model.pool_temperature=1"),
    ("model.adapters=true", "model.temporal_layers=1"),
)


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: " ".join(switches) or "gare")
def test_scores_are_cosines_with_the_mean_of_unit_frames(
    tmp_path: Path, rng: np.random.Generator, seed: int, switches: tuple[str, ...]
) -> None:
    """A first row of the table that is not CLIP's own would make every gain after it another number."""
    torch.manual_seed(seed)
    source = tiny_config(*WHOLE)
    weights = tmp_path / "weights"
    trained = GARE(source.model)
    save_checkpoint(str(weights), build_learner(trained, source, 4, torch.device("cpu")), 1)
    config = tiny_config(*WHOLE, *switches, f"features.weights={weights}")
    model = zero_shot_model(config)
    assert [name for name in model.state_dict() if not name.startswith("towers.")] == []

    store = str(tmp_path / "frames")
    write_store(store, config.extract, IDS, rng)
    captions = [f"a caption, the {number}th" for number in range(8)]
    encoder = Encoder(model, store)
    arrays = {f"video/{name}": array for name, array in encoder.clips(IDS).items()}
    arrays |= {f"text/{name}": array for name, array in encoder.captions(captions).items()}
    scores_NM = score_split(model, text_of(arrays), video_of(arrays))

    clip: Any = trained.towers.clip.eval()
    frames, mask = map(torch.from_numpy, FrameReader(store).read(IDS))
    token_ids, _ = tokenize(captions, config.model.max_words)
    with torch.inference_mode():
        text_ND = clip.text_projection(clip.text_model(input_ids=token_ids).pooler_output)
        expected = torch.empty(len(captions), len(IDS))
        for column, (clip_F, real_F) in enumerate(zip(frames, mask, strict=True)):
            images = normalise(clip_F[real_F].unsqueeze(0))[0]
            frames_FD = clip.visual_projection(clip.vision_model(pixel_values=images).pooler_output)
            mean_D = functional.normalize(frames_FD, dim=-1).mean(dim=0)
            expected[:, column] = functional.cosine_similarity(text_ND, mean_D, dim=-1)
    torch.testing.assert_close(scores_NM, expected, rtol=1e-4, atol=1e-5)


def test_stored_features_give_the_same_formula(tmp_path: Path, rng: np.random.Generator, seed: int) -> None:
    """A collection of which only features were kept has the same first row."""
    source = tiny_config()
    weights = tmp_path / "weights"
    learner = build_learner(GARE(source.model), source, 4, torch.device("cpu"))
    save_checkpoint(str(weights), learner, 1)
    config = tiny_config("train.input=features", f"features.weights={weights}")
    store = str(tmp_path / "features")
    stored = write_feature_store(store, config, IDS, rng)
    model = zero_shot_model(config)
    arrays = encode_stored(model, FeatureReader(store, cache_mb=10), IDS, batch=4)
    scores_NM = score_split(model, text_of(arrays), video_of(arrays))
    text_ND = torch.cat([torch.from_numpy(stored[one]["text"]).float() for one in IDS])
    for column, one in enumerate(IDS):
        row = stored[one]
        frames_FD = torch.from_numpy(row["frames"][: row["num_frames"]]).float()
        mean_D = functional.normalize(frames_FD, dim=-1).mean(dim=0)
        expected = functional.cosine_similarity(text_ND, mean_D, dim=-1)
        torch.testing.assert_close(scores_NM[:, column], expected, rtol=1e-4, atol=1e-5)


def test_random_towers_have_no_zero_shot_score() -> None:
    """Numbers at chance would be published as CLIP's."""
    with pytest.raises(ConfigError, match=r"features\.weights or train\.clip_weights"):
        zero_shot_model(tiny_config())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.checkpoint=/there"], "checkpoint would change nothing: zero_shot has none"),
        (["evaluate.test_curve=true"], "exclude each other"),
        (["evaluate.suite=all"], "exclude each other"),
    ],
)
def test_zero_shot_is_a_task_of_its_own(overrides: list[str], message: str) -> None:
    """A setting that is silently ignored leaves another number than was asked for."""
    with pytest.raises(ConfigError, match=message):
        parse_config(TREE, ["evaluate.zero_shot=true", *overrides])


def test_towers_that_a_training_changed_are_said_to_be(tmp_path: Path) -> None:
    """A fine-tuned model's score under CLIP's name makes every gain over zero-shot too small."""

    def trained(name: str, *overrides: str) -> str:
        config = tiny_config(f"train.run={name}", *overrides)
        model = GARE(config.model)
        save_checkpoint(str(tmp_path / name), build_learner(model, config, 4, torch.device("cpu")), 1)
        return str(tmp_path / name)

    published = f"train.clip_weights={tmp_path / 'published.pt'}"
    tuned = trained("tuned", published, "train.freeze=text")
    assert fault_of_zero_shot(tuned) == "the training tiny/tuned changed them"
    for name, *overrides in (
        ("frozen", "train.freeze=towers"),
        ("still", "train.clip_lr=0"),
        ("stored", "train.input=features"),
    ):
        assert fault_of_zero_shot(trained(name, published, *overrides)) == ""
        # Towers that this training left alone may be those of one before it.
        of_tuned = trained(f"{name}-of-tuned", f"train.clip_weights={tuned}", *overrides)
        assert fault_of_zero_shot(of_tuned) == "the training tiny/tuned changed them"
    of_features = trained("of-features", published, "train.input=features", f"features.weights={tuned}")
    assert "tiny/tuned changed" in fault_of_zero_shot(of_features)
    random = trained("random", "train.input=features")
    assert fault_of_zero_shot(random) == "the training tiny/random left them random"
    assert fault_of_zero_shot(str(tmp_path / "published.pt")) == ""
    itself = str(tmp_path / "itself")
    assert fault_of_zero_shot(trained("itself", f"train.clip_weights={itself}", "train.freeze=towers")) == ""


def test_padding_is_no_hindrance_to_a_zero_shot_score_from_features() -> None:
    """The paper's own file has padding released, and its first row is wanted from features all the same."""
    released = ["model.padding=released", "evaluate.input=features"]
    config = parse_config(TREE, [*released, "evaluate.zero_shot=true"])
    assert config.model.zero_shot().padding == "masked"
    with pytest.raises(ConfigError, match="padding released needs"):
        parse_config(TREE, released)


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        ([], "gare"),
        (["model.increment=false"], "baseline"),
        (["model.increment=false", "model.pooling=mean"], "seqTransf"),
    ],
)
def test_kinds_of_models_have_names_of_their_own(overrides: list[str], label: str) -> None:
    """MLflow averages the runs of one name: a mean over two models is the mean of nothing."""
    assert model_label(tiny_config(*overrides).model.identity()) == label
    assert model_label(tiny_config().model.zero_shot().identity()) == "meanP"
    assert model_label({}) == "gare"
    assert model_label({"increment": False}) == "baseline"
