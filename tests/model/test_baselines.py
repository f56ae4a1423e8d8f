"""The field's baselines are settings of this model, each equal to a few lines of plain PyTorch.

N texts, M videos, F frames, D embedding width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gare.errors import ConfigError, DataError
from gare.model.features import VideoFeatures
from gare.model.gare import GARE
from gare.train.loss.objective import Objective
from gare.train.step import build_learner, train_step
from gare.train.validation import Validation
from tests.helpers.heads import features, head
from tests.helpers.plain_temporal import plain_temporal
from tests.helpers.tiny import moved_model, tiny_batch, tiny_config, tiny_feature_batch

MEAN = ("model.increment=false", "model.pooling=mean")
NO_TEMPORAL = ("model.temporal=none", "model.temporal_layers=4", "model.temporal_heads=0")
#: Each of the field's methods by the settings that make it.
BASELINES = {
    "meanP": (*MEAN, *NO_TEMPORAL),
    "seqTransf": MEAN,
    "X-Pool": ("model.increment=false",),
    "GARE": (),
}


def tower_output(model: GARE, frames: Tensor) -> Tensor:
    """(F, D) of the real frames of one clip."""
    clip = model.towers.clip
    pooled = clip.vision_model(pixel_values=frames).pooler_output
    return clip.visual_projection(pooled)


def plain_score(name: str, model: GARE, t: Tensor, frames_FD: Tensor) -> Tensor:
    """The score of one text and one clip, from the image tower's output of its real frames."""
    v = frames_FD
    if name != "meanP":
        assert model.temporal is not None
        v = plain_temporal(model.temporal, v, torch.ones(len(v), dtype=torch.bool))
    if name in ("meanP", "seqTransf"):
        mean = (v / v.norm(dim=1, keepdim=True)).mean(dim=0)
        return t @ mean / (t.norm() * mean.norm())
    pooled = (v @ t / 3).softmax(dim=0) @ v
    if name == "X-Pool":
        return t @ pooled / (t.norm() * pooled.norm())
    psi = model.increment
    assert psi is not None
    gap, mask = v.mean(dim=0) - t, torch.ones(1, len(v), dtype=torch.bool)
    corrected = t + psi(gap[None, None], v[None], mask)[0, 0]
    return corrected @ pooled / (corrected.norm() * pooled.norm())


@pytest.mark.parametrize("name", BASELINES)
def test_each_baseline_is_its_formula(name: str, seed: int, rng: np.random.Generator) -> None:
    """A table whose rows are not the methods that they are called after compares nothing."""
    torch.manual_seed(seed)
    model = moved_model(*BASELINES[name])
    batch = tiny_batch(tiny_config(), rng)
    with torch.no_grad():
        text = model.encode_text(batch.token_ids, batch.token_mask)
        video = model.encode_video(batch.frames, batch.frame_mask)
        expected = torch.empty(len(text.embedding), len(video))
        for j, (frames, mask) in enumerate(zip(batch.frames, batch.frame_mask, strict=True)):
            frames_FD = tower_output(model, frames[mask])
            for i, t in enumerate(text.embedding):
                expected[i, j] = plain_score(name, model, t, frames_FD)
        for method in ("auto", "direct", "factorized"):
            torch.testing.assert_close(model.score(text, video, method), expected, rtol=1e-4, atol=1e-5)
        prepared = model.prepare_video(video)
        for method in ("auto", "direct", "factorized"):
            torch.testing.assert_close(model.score(text, prepared, method), expected, rtol=1e-4, atol=1e-5)


def test_the_baselines_differ(seed: int) -> None:
    """A switch that is read nowhere would make two rows of a table equal."""
    torch.manual_seed(seed)
    states = moved_model().state_dict()
    batch = tiny_batch(tiny_config(), np.random.default_rng(seed))
    scores = []
    for overrides in BASELINES.values():
        model = GARE(tiny_config(*overrides).model).eval()
        model.load_state_dict({name: states[name] for name in model.state_dict()})
        with torch.no_grad():
            text = model.encode_text(batch.token_ids, batch.token_mask)
            scores.append(model.score(text, model.encode_video(batch.frames, batch.frame_mask)))
    for one in range(len(scores)):
        for other in range(one):
            assert (scores[one] - scores[other]).abs().max() > 1e-4


def test_no_temporal_transformer_has_no_weights(seed: int) -> None:
    """Weights that nothing uses would be decayed, saved and, over several workers, waited for."""
    torch.manual_seed(seed)
    model = moved_model(*NO_TEMPORAL)
    assert not [name for name in model.state_dict() if name.startswith("temporal")]
    with_temporal = {name for name in moved_model().state_dict() if not name.startswith("temporal.")}
    assert set(model.state_dict()) == with_temporal


def test_clip_lengths_are_checked_without_temporal_transformer(seed: int) -> None:
    """A clip without a frame has no mean; one that is too long was made with other settings."""
    torch.manual_seed(seed)
    model = moved_model(*NO_TEMPORAL)
    with pytest.raises(DataError, match="clips of 5 frames"):
        model.video_from_towers(torch.zeros(1, 5, 32), torch.ones(1, 5))
    with pytest.raises(DataError, match="clip 0 has no frame"):
        model.video_from_towers(torch.zeros(1, 4, 32), torch.zeros(1, 4))
    long = ("model.max_frames=20", "extract.num_frames=20")
    with pytest.raises(ConfigError, match=r"clip\.max_positions"):
        tiny_config(*long)
    found = moved_model(*NO_TEMPORAL, *long).video_from_towers(torch.ones(1, 20, 32), torch.ones(1, 20))
    assert torch.equal(found.frames, torch.ones(1, 20, 32))


@pytest.mark.parametrize("name", BASELINES)
def test_each_baseline_trains_and_validates(name: str, seed: int, rng: np.random.Generator) -> None:
    """From frames and from features, with diagnostics; every weight gets a gradient, which DDP waits for."""
    torch.manual_seed(seed)
    overrides = [*BASELINES[name], "train.diagnostics_every=1", "train.micro_batch=2"]
    config = tiny_config(*overrides)
    model = GARE(config.model)
    Objective(model, config.loss, config.train)(tiny_batch(config, rng)).objective.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    learner = build_learner(GARE(config.model), config, 10, torch.device("cpu"))
    values = train_step(learner, tiny_batch(config, rng))
    assert all(np.isfinite(value) for value in values.values())
    assert {"tension/net_before", "gap/modality"} <= values.keys()
    assert ("delta/norm_positive" in values) == (name == "GARE")
    if name == "meanP":
        with pytest.raises(ConfigError, match="would learn nothing"):
            tiny_config(*overrides, "train.input=features")
        overrides.append("model.adapters=true")
    config = tiny_config(*overrides, "train.input=features")
    model = GARE(config.model)
    model.drop_towers()
    train_step(build_learner(model, config, 10, torch.device("cpu")), tiny_feature_batch(config, rng))
    validation = Validation(model, torch.device("cpu"))
    batch = tiny_feature_batch(config, rng)
    stored = {"frames": batch.frames, "frame_mask": batch.frame_mask, "text": batch.text.unsqueeze(1)}
    stored |= {"token_mask": batch.token_mask.unsqueeze(1), "caption_mask": torch.ones(6, 1).bool()}
    validation.add_features(range(6), stored)
    assert validation.metrics()["t2v/MnR"] >= 1


@pytest.mark.parametrize("shape", [(5, 5), (7, 3)])
def test_mean_pooling_by_blocks_and_in_any_precision(shape: tuple[int, int], seed: int) -> None:
    """The published numbers must not depend on memory, and features may be stored in half precision."""
    torch.manual_seed(seed)
    model = head(32, increment=False, pooling="mean", dtype=torch.float32, memory_mb=1)
    text, video = features(shape[0] * 200, shape[1] * 200, 4, 5, 32, torch.float32)
    unit = functional.normalize(video.frames, dim=2)
    mean = unit.sum(dim=1) / video.mask.sum(dim=1, keepdim=True)
    expected = functional.cosine_similarity(text.embedding.unsqueeze(1), mean, dim=2)
    with torch.no_grad():
        for method in ("direct", "factorized"):
            torch.testing.assert_close(model.score(text, video, method), expected, rtol=0, atol=1e-5)
        for given in (video, model.prepare_video(video)):
            torch.testing.assert_close(model.score(text, given), expected, rtol=0, atol=1e-5)
        half = model.score(text, VideoFeatures(video.frames.half(), video.mask))
        assert half.dtype == torch.float32
        assert (half - expected).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("model.temporal=none", "model.temporal_layers=2", "model.temporal_heads=2"),
            "temporal_layers, temporal_heads would change nothing: temporal is none",
        ),
        (("model.pooling=mean",), "pooling mean has no increment"),
        (
            (*BASELINES["meanP"], "train.freeze=towers", "train.clip_weights=/clip.pt"),
            "freeze towers would leave nothing to learn",
        ),
        ((*MEAN, "model.pool_temperature=5"), "pool_temperature would change nothing"),
    ],
)
def test_settings_without_effect_are_refused(overrides: tuple[str, ...], said: str) -> None:
    """A study would report a switch that did nothing."""
    with pytest.raises(ConfigError, match=said):
        tiny_config(*overrides)


@pytest.mark.parametrize("name", BASELINES)
def test_the_baseline_keeps_temporal_and_pooling(name: str) -> None:
    """Only the increment is to differ between a model and its baseline."""
    config: Any = tiny_config(*BASELINES[name]).model
    assert config.baseline() == config.model_copy(update={"increment": False})
