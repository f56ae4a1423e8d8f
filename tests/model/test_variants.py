"""Every switch of the paper's variants: what it changes, against the formula written out pair by pair.

N texts, M videos, F frames, W words, D embedding width.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gare.errors import ConfigError
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.train.loss.objective import Objective
from tests.helpers.tiny import moved_model, tiny_batch, tiny_config

N, M, F, W, D = 3, 4, 4, 8, 32

VARIANTS = [
    (),
    ("model.corrected_side=video",),
    ("model.context=words",),
    ("model.gap_sign=-1",),
    ("model.query=text",),
    ("model.query=text", "model.corrected_side=video"),
    ("model.context=words", "model.corrected_side=video", "model.gap_sign=-1"),
]


def variant(seed: int, *overrides: str) -> GARE:
    torch.manual_seed(seed)
    return moved_model(*overrides)


def features(seed: int) -> tuple[TextFeatures, VideoFeatures]:
    generator = torch.Generator().manual_seed(seed)
    word_mask = torch.arange(W) < torch.tensor([[3], [8], [5]])
    frame_mask = torch.arange(F) < torch.tensor([[1], [4], [3], [2]])
    words = torch.randn(N, W, D, generator=generator) * word_mask.unsqueeze(-1)
    frames = torch.randn(M, F, D, generator=generator) * frame_mask.unsqueeze(-1)
    text = TextFeatures(torch.randn(N, D, generator=generator), words, word_mask)
    return text, VideoFeatures(frames, frame_mask)


def delta_of_one_pair(model: GARE, text: TextFeatures, video: VideoFeatures, i: int, j: int) -> Tensor:
    """gare.md, one pair at a time, from real frames and words alone."""
    config, psi = model.config, model.increment
    assert psi is not None
    assert text.words is not None
    t = text.embedding[i]
    frames, words = video.frames[j][video.mask[j]], text.words[i][text.mask[i]]
    context = frames if config.context == "frames" else words
    everything = torch.ones(1, len(context), dtype=torch.bool)

    def attend(query: Tensor) -> Tensor:
        return psi(query[None, None], context[None], everything)[0, 0]

    mean = frames.mean(dim=0)
    if config.query == "gap":
        return attend(config.gap_sign * (mean - t))
    assert model.radius is not None
    radius = torch.exp(model.radius.bias + (model.radius.coefficient[: len(frames)] * (frames @ t)).sum())
    goal = mean - attend(t)
    return radius * goal / goal.norm()


@pytest.mark.parametrize("overrides", VARIANTS, ids=lambda given: " ".join(given) or "default")
def test_variant_is_its_formula(seed: int, overrides: tuple[str, ...]) -> None:
    """A switch that does something else than the paper's table says compares nothing with the paper."""
    model = variant(seed, *overrides)
    text, video = features(seed)
    pairs = model.scorer.pairs(text, video)
    assert pairs.delta is not None
    for i, j in itertools.product(range(N), range(M)):
        delta = delta_of_one_pair(model, text, video, i, j)
        torch.testing.assert_close(pairs.delta[i, j], delta, rtol=1e-4, atol=1e-4)
        t, frames = text.embedding[i], video.frames[j][video.mask[j]]
        pooled = ((frames @ t) / model.config.pool_temperature).softmax(0) @ frames
        left, right = (t + delta, pooled) if model.config.corrected_side == "text" else (t, pooled + delta)
        torch.testing.assert_close(
            pairs.scores[i, j], functional.cosine_similarity(left, right, dim=0), rtol=1e-4, atol=1e-5
        )


def test_every_switch_changes_the_scores(seed: int) -> None:
    """A switch that is read nowhere would make two rows of a table equal."""
    text, video = features(seed)
    states = variant(seed, "model.query=text").state_dict()
    scores = []
    for overrides in [*VARIANTS, ("model.increment=false",)]:
        model = GARE(tiny_config(*overrides).model).eval()
        model.load_state_dict({name: states[name] for name in model.state_dict()})
        scores.append(model.score(text, video))
    for one, other in itertools.combinations(scores, 2):
        assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize("overrides", VARIANTS, ids=lambda given: " ".join(given) or "default")
def test_padding_changes_nothing(seed: int, overrides: tuple[str, ...]) -> None:
    """Else scores depend on the longest caption and clip of a batch."""
    model = variant(seed, *overrides, "model.max_frames=6", "extract.num_frames=6")
    text, video = features(seed)
    assert text.words is not None
    longer_text = TextFeatures(
        text.embedding, functional.pad(text.words, (0, 0, 0, 5)), functional.pad(text.mask, (0, 5))
    )
    longer_video = VideoFeatures(
        functional.pad(video.frames, (0, 0, 0, 2)), functional.pad(video.mask, (0, 2))
    )
    torch.testing.assert_close(
        model.score(longer_text, longer_video), model.score(text, video), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("overrides", VARIANTS, ids=lambda given: " ".join(given) or "default")
def test_every_parameter_of_a_variant_learns(
    seed: int, overrides: tuple[str, ...], rng: np.random.Generator
) -> None:
    """DDP waits for every parameter's gradient."""
    torch.manual_seed(seed)
    config = tiny_config(*overrides)
    model = GARE(config.model)
    Objective(model, config.loss, config.train)(tiny_batch(config, rng)).objective.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing


def test_words_are_asked_for_where_they_are_needed(seed: int) -> None:
    """Features from a cache made without words must not be scored as if they had them."""
    text, video = features(seed)
    bare = TextFeatures(text.embedding, None, text.mask)
    with pytest.raises(ConfigError, match=r"model\.context.*no words"):
        variant(seed, "model.context=words").score(bare, video)
    assert variant(seed).score(bare, video).shape == (N, M)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("model.increment=false", "model.context=words"), "context would change nothing: increment is off"),
        (("model.increment=false", "model.corrected_side=video"), "corrected_side would change nothing"),
        (("model.query=text", "model.gap_sign=-1"), "gap_sign would change nothing: query text"),
        (("model.query=text", "model.context=words"), "would not look at the frames"),
        (
            ("loss.direction_form=orthogonality", "loss.direction_alpha=3"),
            "direction_alpha would change nothing",
        ),
        (("loss.radii_bound=0",), "radii_bound 0 holds the radii term at 0"),
        (("model.method=factorized", "model.increment_layers=2"), "no form for increment_layers above 1"),
        (("train.freeze=towers",), "would keep random weights"),
        (("augment.magnitude=3",), "magnitude would change nothing: operations is 0"),
    ],
)
def test_combinations_without_sense_are_refused(overrides: tuple[str, ...], said: str) -> None:
    """A study would report a switch that did nothing."""
    with pytest.raises(ConfigError, match=said):
        tiny_config("loss.radii_bound=0.5", *overrides)


def test_the_baseline_of_a_variant(seed: int) -> None:
    """The demo compares each variant with the baseline, which has no switches."""
    config = tiny_config("model.context=words", "model.corrected_side=video").model
    baseline = config.baseline()
    assert not baseline.increment
    assert baseline == tiny_config("model.increment=false").model
