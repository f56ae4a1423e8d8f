"""Clips with fewer frames than the model has places for, as the released code treats them.

N texts, M videos, F frames, D embedding width.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gare.data.batch import Batch
from gare.errors import ConfigError, DataError
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.model.pooling import pool
from gare.retrieval.ranking.scoring import ModelBlocks
from gare.train.step import build_learner, compute_gradients, train_step
from gare.train.validation import Validation
from tests.helpers.plain_temporal import plain_temporal
from tests.helpers.tiny import moved_model, tiny_batch, tiny_config

RELEASED = "model.padding=released"
NO_TEMPORAL = ("model.temporal=none", "model.temporal_layers=4", "model.temporal_heads=0")
VARIANTS = [
    (),
    ("model.corrected_side=video",),
    ("model.context=words",),
    ("model.gap_sign=-1", "model.adapters=true"),
    ("model.query=text",),
    NO_TEMPORAL,
    ("model.increment_layers=2",),
]


def encoded(model: GARE, batch: Batch) -> tuple[TextFeatures, VideoFeatures]:
    text = model.encode_text(batch.token_ids, batch.token_mask)
    return text, model.encode_video(batch.frames, batch.frame_mask)


def frames_as_released(model: GARE, frames: Tensor, mask: Tensor) -> Tensor:
    """(F, D) of one clip: every place through CLIP, padded ones as grey, and masked as keys alone."""
    clip = model.towers.clip
    pictures = torch.stack(
        [frame if real else torch.zeros_like(frame) for frame, real in zip(frames, mask, strict=True)]
    )
    x = torch.cat(
        [clip.visual_projection(clip.vision_model(pixel_values=one[None]).pooler_output) for one in pictures]
    )
    if model.adapters is not None:
        x = model.adapters.video(x)
    return x if model.temporal is None else plain_temporal(model.temporal, x, mask)


def score_as_released(model: GARE, text: TextFeatures, i: int, v: Tensor, mask: Tensor) -> Tensor:
    """The score of one pair; v (F, D) holds features at padded places, too."""
    config, t = model.config, text.embedding[i]
    pooled = ((v @ t / config.pool_temperature).softmax(dim=0) * mask) @ v
    psi, mean = model.increment, v.mean(dim=0)
    assert psi is not None
    assert text.words is not None
    context = v if config.context == "frames" else text.words[i][text.mask[i]]
    query = t if config.query == "text" else config.gap_sign * (mean - t)
    delta = psi(query[None, None], context[None], torch.ones(1, len(context), dtype=torch.bool))[0, 0]
    if model.radius is not None:
        radius = model.radius.bias + (model.radius.coefficient[mask] * (v[mask] @ t)).sum()
        delta = radius.exp() * (mean - delta) / (mean - delta).norm()
    left, right = (t + delta, pooled) if config.corrected_side == "text" else (t, pooled + delta)
    return functional.cosine_similarity(left, right, dim=0)


@pytest.mark.parametrize("overrides", VARIANTS, ids=lambda given: " ".join(given) or "default")
def test_released_padding_is_its_formula(
    overrides: tuple[str, ...], seed: int, rng: np.random.Generator
) -> None:
    """More than a third of MSR-VTT's clips are padded: else the paper's numbers are of another model."""
    torch.manual_seed(seed)
    model = moved_model(RELEASED, *overrides)
    batch = tiny_batch(tiny_config(), rng)
    with torch.no_grad():
        text, video = encoded(model, batch)
        expected = torch.empty(len(text.embedding), len(video))
        for j, mask in enumerate(batch.frame_mask):
            v = frames_as_released(model, batch.frames[j], mask)
            torch.testing.assert_close(video.frames[j], v, rtol=1e-4, atol=1e-4)
            for i in range(len(text.embedding)):
                expected[i, j] = score_as_released(model, text, i, v, mask)
        for method in ("auto", "direct"):
            torch.testing.assert_close(model.score(text, video, method), expected, rtol=1e-4, atol=1e-5)
        masked = moved_model(*overrides)
        masked.load_state_dict(model.state_dict())
        assert (masked.score(*encoded(masked, batch)) - expected)[:, 0].abs().max() > 1e-4


@pytest.mark.parametrize("overrides", VARIANTS, ids=lambda given: " ".join(given) or "default")
def test_without_padding_nothing_differs(
    overrides: tuple[str, ...], seed: int, rng: np.random.Generator
) -> None:
    """Scores and gradients are the same bits: the switch is about padding and nothing else."""
    whole = tiny_batch(tiny_config(), rng)
    frames = torch.from_numpy(rng.standard_normal(whole.frames.shape, dtype=np.float32))
    batch = Batch(
        whole.token_ids, whole.token_mask, frames, torch.ones_like(whole.frame_mask), whole.video_ids
    )
    found = []
    for padding in ("masked", "released"):
        torch.manual_seed(seed)
        config = tiny_config(f"model.padding={padding}", "model.method=direct", *overrides)
        model = moved_model(f"model.padding={padding}", "model.method=direct", *overrides)
        with torch.no_grad():
            scores = model.score(*encoded(model, batch))
        learner = build_learner(model, config, 10, torch.device("cpu"))
        compute_gradients(learner, batch)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((scores, gradients))
    (scores, gradients), (released_scores, released) = found
    assert torch.equal(scores, released_scores)
    assert gradients.keys() == released.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, released[name]), name


def test_what_stands_at_padded_places_does_not_count(seed: int, rng: np.random.Generator) -> None:
    """Stores pad with black, the released code with the mean colour; the picture must be the latter."""
    torch.manual_seed(seed)
    model = moved_model(RELEASED)
    batch = tiny_batch(tiny_config(), rng)
    rest = torch.where(batch.frame_mask[:, :, None, None, None], batch.frames, torch.tensor(float("nan")))
    with torch.no_grad():
        expected = model.encode_video(batch.frames, batch.frame_mask)
        found = model.encode_video(rest, batch.frame_mask)
    assert torch.equal(found.frames, expected.frames)


def test_one_grey_picture_stands_for_all(seed: int, rng: np.random.Generator) -> None:
    """DiDeMo's clips are padded from 30 to 64 frames: encoding each grey one would double the step."""
    torch.manual_seed(seed)
    model = moved_model(RELEASED)
    batch = tiny_batch(tiny_config(), rng)
    seen: list[int] = []
    model.towers.clip.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    model.encode_video(batch.frames, batch.frame_mask)
    assert seen == [int(batch.frame_mask.sum()) + 1]


def test_only_the_direct_form_has_it(seed: int) -> None:
    """Another form would score another model without a word."""
    torch.manual_seed(seed)
    batch = tiny_batch(tiny_config(), np.random.default_rng(seed))
    model = moved_model(RELEASED)
    text, video = encoded(model, batch)
    for training in (True, False):
        model.train(training)
        assert model.scorer.why_direct == "padding released has no factorised form"
    with pytest.raises(ConfigError, match=r"padding released has no factorised form.*padding masked"):
        model.prepare_video(video)
    with pytest.raises(ConfigError, match="padding released has no factorised form"):
        model.score(text, video, "factorized")
    for overrides, said in (
        (("model.method=factorized",), "method factorized has no form for padding released"),
        (("model.increment=false",), "padding would change nothing: increment is off"),
        (("train.input=features",), "the features of its grey pictures are not stored"),
        (("evaluate.input=features",), "the features of its grey pictures are not stored"),
    ):
        with pytest.raises(ConfigError, match=said):
            tiny_config(RELEASED, *overrides)


def test_places_are_as_many_as_the_model_has(seed: int) -> None:
    """Scores depend on how many padded frames there are, so a store of shorter clips is another model."""
    torch.manual_seed(seed)
    model = moved_model(RELEASED)
    with pytest.raises(DataError, match=r"clips of 3 frames.*4, padding included"):
        model.encode_video(torch.zeros(1, 3, 3, 16, 16), torch.ones(1, 3))
    with pytest.raises(DataError, match="has no frame"):
        model.encode_video(torch.zeros(1, 4, 3, 16, 16), torch.zeros(1, 4))


def test_training_and_evaluation_go_through(seed: int, rng: np.random.Generator) -> None:
    """Micro-batches, validation and evaluation by blocks see padded frames as the score does."""
    torch.manual_seed(seed)
    overrides = (RELEASED, "model.clip.vocab_size=49408")
    batch = tiny_batch(tiny_config(), rng)
    exact = replace(batch, frames=batch.frames.double())
    gradients = []
    for micro_batch in (0, 2):
        torch.manual_seed(seed)
        config = tiny_config(*overrides, f"train.micro_batch={micro_batch}")
        # In float64: at ψ's start the direct form is left with few digits.
        learner = build_learner(GARE(config.model).double(), config, 10, torch.device("cpu"))
        compute_gradients(learner, exact)
        gradients.append(
            torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.grad is not None])
        )
        train_step(learner, exact)
    assert (gradients[0] - gradients[1]).norm() < 1e-9 * gradients[0].norm()
    model = learner.model.float().eval()
    with torch.no_grad():
        text, video = encoded(model, batch)
        expected = model.score(text, video)
        blocks = ModelBlocks(model, text, video)
        torch.testing.assert_close(blocks.block(torch.arange(6), slice(0, 6)), expected, rtol=1e-5, atol=1e-6)
    validation = Validation(model, torch.device("cpu"))
    pictures = torch.from_numpy(rng.integers(0, 256, (6, 4, 16, 16, 3), dtype=np.uint8))
    clips = {"frames": pictures, "frame_mask": batch.frame_mask, "caption_counts": torch.ones(6).long()}
    validation.add(range(6), clips | {"token_ids": batch.token_ids, "token_mask": batch.token_mask})
    assert validation.metrics()["t2v/MnR"] >= 1


def test_without_increment_padding_changes_no_cosine(seed: int) -> None:
    """So the switch is refused there, and the baseline beside it keeps the factorised form."""
    torch.manual_seed(seed)
    text, mask = torch.randn(3, 32), torch.arange(4) < torch.tensor([[1], [2], [4]])
    video = VideoFeatures(torch.randn(3, 4, 32), mask)
    masked, released = (pool(text, video, 3.0, released_padding=released) for released in (False, True))
    assert (masked[:, :2] - released[:, :2]).norm(dim=2).min() > 1e-3
    torch.testing.assert_close(*(functional.normalize(pooled, dim=2) for pooled in (masked, released)))
    assert tiny_config(RELEASED).model.baseline().padding == "masked"
