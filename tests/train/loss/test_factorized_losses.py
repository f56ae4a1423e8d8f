"""The factorised loss terms and all their gradients are the direct form's."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gare.config import LossConfig
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.train.loss.blocks import BlockRequest, blocks_of, sides_of
from gare.train.loss.direction import factorized_direction
from gare.train.loss.losses import direction, orthogonality
from gare.train.loss.objective import LossTerms, StepRandomness, loss_terms, sharded_terms
from gare.train.loss.sharded import spread_by_dropout
from tests.helpers.heads import clip_like, features, head

#: Weights at which no term drowns in another, and a bound that radii do not reach.
LOUD = {"bottleneck_weight": 0.1, "radii_weight": 0.5, "radii_bound": 1e3, "direction_weight": 0.5}


def gradients(
    form: str,
    model: GARE,
    text: TextFeatures,
    video: VideoFeatures,
    config: LossConfig,
    draws: StepRandomness,
    video_ids: Tensor | None = None,
) -> tuple[LossTerms, dict[str, Tensor]]:
    leaves = {"text": text.embedding, "words": text.words, "frames": video.frames}
    leaves = {
        name: value.detach().clone().requires_grad_() for name, value in leaves.items() if value is not None
    }
    model.zero_grad()
    given_text = TextFeatures(leaves["text"], leaves["words"], text.mask)
    given_video = VideoFeatures(leaves["frames"], video.mask)
    call = loss_terms if form == "direct" else sharded_terms
    terms = call(model, given_text, given_video, config, draws, video_ids)
    terms.objective.backward()
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and (
            name == "towers.clip.logit_scale" or not name.startswith("towers")
        ):
            found[name] = parameter.grad.clone()
    return terms, found


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest ‖found − expected‖ / ‖expected‖; what is below 1e-6 of the whole is zero in theory."""
    whole = float(torch.stack([value.norm() for value in expected.values()]).norm())
    return max(
        (float((found[name].double() - value).norm()) / max(float(value.norm()), 1e-6 * whole), name)
        for name, value in expected.items()
        # Zero in theory: what is there is rounding.
        if name != "increment.layers.0.key.bias"
    )


def rounding_of_small_deviations(
    model: GARE, text: TextFeatures, video: VideoFeatures, config: LossConfig, draws: StepRandomness
) -> float:
    """Returns float64's relative error of the smallest σ² that is a quadratic form of the coefficients.

    Its terms are as large as the largest deviations of the same owner, and the gradient of log σ is 1/σ. Two
    texts can have nearly the same number in one of 32 dimensions: with seed 348188921 σ is 6e-8 beside 1e-3,
    and the error 4e-8. The direct form subtracts the numbers themselves and loses half as many digits.
    """
    with torch.no_grad():
        deltas = model.scorer.deltas(text, video, draws.keep)
    if deltas is None or not config.bottleneck_weight:
        return 0.0
    spread = deltas.std(dim=0 if config.bottleneck_anchor == "video" else 1)
    share = spread / spread.square().mean(dim=-1, keepdim=True).sqrt()
    return float(torch.finfo(torch.float64).eps / share.amin().square())


MODELS: list[dict[str, Any]] = [
    {"corrected_side": side, "context": context, "gap_sign": sign, "increment_heads": heads}
    for side, context, sign, heads in itertools.product(
        ("text", "video"), ("frames", "words"), (1, -1), (1, 2)
    )
]
MODELS += [{"query": "text", "corrected_side": side} for side in ("text", "video")]
MODELS += [{"increment": False}, {"increment": False, "pooling": "mean"}]


#: Where σ of one dimension is 6e-8, see ``rounding_of_small_deviations``.
SMALL_DEVIATION: dict[str, Any] = {
    "variant": MODELS[0],
    "switches": {
        "kl_reduction": "sum",
        "kl_normalised": False,
        "bottleneck_anchor": "video",
        "prior_std": 1.0,
        "radii_bound_form": "hard",
        "direction_form": "log_mean_exp",
        "direction_over": "all",
    },
    "pairs": {},
    "dropout": 0.3,
    "memory_mb": 1.0,
    "num_pairs": 2,
    "seed": 348188921,
}


@example(**SMALL_DEVIATION)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    variant=st.sampled_from(MODELS),
    switches=st.fixed_dictionaries(
        {
            "kl_reduction": st.sampled_from(["sum", "mean"]),
            "kl_normalised": st.booleans(),
            "bottleneck_anchor": st.sampled_from(["video", "text"]),
            "prior_std": st.sampled_from([1.0, 0.1]),
            "radii_bound_form": st.sampled_from(["hard", "smooth"]),
            "direction_form": st.sampled_from(["log_mean_exp", "orthogonality"]),
            "direction_over": st.sampled_from(["all", "sample"]),
        }
    ),
    pairs=st.sampled_from([{}, {"positives": "video"}, {"false_negatives": 0.1}]),
    dropout=st.sampled_from([0.0, 0.3]),
    memory_mb=st.sampled_from([1.0, 256.0]),
    num_pairs=st.integers(2, 9),
    seed=st.integers(0, 2**31),
)
def test_losses_and_gradients_equal_the_direct_form(
    variant: dict[str, Any],
    switches: dict[str, Any],
    pairs: dict[str, Any],
    dropout: float,
    memory_mb: float,
    num_pairs: int,
    seed: int,
) -> None:
    """In float64, where rounding is no excuse; every term, form, anchor, draw and mask together."""
    torch.manual_seed(seed)
    model = head(32, increment_dropout=dropout, memory_mb=memory_mb, **variant).train()
    text, video = features(num_pairs, num_pairs, 4, 5, 32, torch.float64)
    config = LossConfig(**LOUD, direction_texts=2, **switches, **pairs)
    video_ids = torch.randint(0, num_pairs, (num_pairs,)) if config.positives == "video" else None
    draws = StepRandomness.of_step(model.scorer, config, num_pairs, seed)
    direct, expected = gradients("direct", model, text, video, config, draws, video_ids)
    factorised, found = gradients("factorised", model, text, video, config, draws, video_ids)
    for name, value in direct.named().items():
        torch.testing.assert_close(factorised.named()[name], value, rtol=1e-9, atol=1e-12, msg=name)
    difference, name = worst(found, expected)
    # Between nearly equal increments of length 1 the direct form itself is left with few digits.
    bound = 1e-7 if config.kl_normalised else 1e-9
    if difference >= bound:
        # So it is with some clips of two frames and two texts, where σ is small: 3e-9 with seed 1636117.
        # Features that are off by 1e-12 must then change the direct form's gradient by more than that.
        text = replace(text, embedding=text.embedding * (1 + 1e-12 * torch.randn_like(text.embedding)))
        video = replace(video, frames=video.frames * (1 + 1e-12 * torch.randn_like(video.frames)))
        _, beside = gradients("direct", model, text, video, config, draws, video_ids)
        bound = max(
            worst(beside, expected)[0], rounding_of_small_deviations(model, text, video, config, draws)
        )
    assert difference < bound, name


@pytest.mark.parametrize("spread", [0.0, 0.05])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"context": "words", "corrected_side": "video"},
        {"corrected_side": "video", "increment_heads": 2},
        {"query": "text"},
    ],
    ids=lambda given: " ".join(map(str, given.values())) or "default",
)
def test_float32_is_near_float64(variant: dict[str, Any], spread: float, seed: int) -> None:
    """Also at ψ's start and with features like CLIP's, where increments differ in their last digits.

    There the direct form in float32 is off by up to 1e-2: both are judged by the direct form in float64.
    """
    torch.manual_seed(seed)
    model = head(512, dtype=torch.float32, spread=spread, **variant).train()
    text, video = clip_like(24, 12, 16, 512)
    if variant.get("query") != "text":
        video.mask[0, 1:] = False  # a single frame, where increments do not vary at all
        video.frames[0, 1:] = 0
    config, draws = LossConfig(radii_bound=1e3), StepRandomness()
    exact_text = TextFeatures(text.embedding.double(), text.words.double(), text.mask)  # type: ignore[union-attr]
    exact_video = VideoFeatures(video.frames.double(), video.mask)
    exact, expected = gradients(
        "direct", copy.deepcopy(model).double(), exact_text, exact_video, config, draws
    )
    rough, found = gradients("factorised", model, text, video, config, draws)
    # One number, the sum over all pairs of parts that cancel: in float32 the direct form is off by as much.
    expected.pop("radius.bias", None)
    for name, value in exact.named().items():
        assert float(rough.named()[name]) == pytest.approx(float(value), rel=1e-4), name
    difference, name = worst(found, expected)
    if difference >= 1e-4:
        # One clip in some thousands has three frames whose increments hardly differ in one dimension:
        # 1.0001e-4 with seed 591781672, where the direct form is off by 0.1.
        _, direct = gradients("direct", model, text, video, config, draws)
        assert difference < worst(direct, expected)[0] / 100, name


def test_two_frames_are_better_off_than_in_the_direct_form(seed: int) -> None:
    """Of two frames the products round too much for 1e-4, and the direct form is off by more.

    The increments of a clip of two frames lie on a line, and the bottleneck asks for the logarithm of their
    spread in every dimension, also in those that the line is nearly perpendicular to: there the products
    themselves round. (Of a single frame they lie on a line where ψ is asked with the text.)
    """
    torch.manual_seed(seed)
    model = head(512, dtype=torch.float32, spread=0.0).train()
    text, video = clip_like(24, 2, 2, 512, least_frames=2)
    config, draws = LossConfig(radii_bound=1e3), StepRandomness()
    exact_text = TextFeatures(text.embedding.double(), text.words.double(), text.mask)  # type: ignore[union-attr]
    exact_video = VideoFeatures(video.frames.double(), video.mask)
    exact = copy.deepcopy(model).double()
    _, expected = gradients("direct", exact, exact_text, exact_video, config, draws)
    _, direct = gradients("direct", model, text, video, config, draws)
    _, found = gradients("factorised", model, text, video, config, draws)
    assert worst(found, expected)[0] < worst(direct, expected)[0] / 3


@pytest.mark.parametrize("form", ["log_mean_exp", "orthogonality"])
@pytest.mark.parametrize("owner", ["video", "text"])
@pytest.mark.parametrize("memory", [1, 10**9])
def test_direction_equals_its_reference(form: Any, owner: Any, memory: int, seed: int) -> None:
    """Value, gradient (also against finite differences), and chunks of any size."""
    torch.manual_seed(seed)
    num_texts, num_videos, length, width = 5, 4, 3, 6
    by_video = owner == "video"
    shape = (num_videos, length, num_texts) if by_video else (num_texts, length, num_videos)
    weights = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(shape[0], length, width, dtype=torch.float64, requires_grad=True)

    def term(weights: Tensor, vectors: Tensor) -> Tensor:
        return factorized_direction(weights, vectors, owner, form, 2.0, memory)

    delta = weights.transpose(1, 2) @ vectors
    delta = delta.transpose(0, 1) if by_video else delta
    expected = direction(delta) if form == "log_mean_exp" else orthogonality(delta)
    torch.testing.assert_close(term(weights, vectors) / num_texts, expected)
    assert torch.autograd.gradcheck(term, (weights, vectors))


def test_a_sample_of_texts_is_unbiased(seed: int) -> None:
    """Else the weight of the diversity would mean something else in large batches."""
    torch.manual_seed(seed)
    model = head(32)
    text, video = features(6, 6, 3, 2, 32, torch.float64)
    whole = sharded_terms(model, text, video, LossConfig(direction_over="all"), StepRandomness()).direction
    parts = [
        sharded_terms(model, text, video, LossConfig(), StepRandomness(sample=torch.tensor(sample))).direction
        for sample in itertools.combinations(range(6), 2)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    config = LossConfig(direction_over="sample", direction_texts=2)
    drawn = {
        tuple(StepRandomness.of_step(model.scorer, config, 6, step).sample.tolist()) for step in range(300)
    }  # type: ignore[union-attr]
    assert drawn == set(itertools.combinations(range(6), 2))


def test_auto_samples_where_the_increments_exceed_the_budget() -> None:
    """N·M·D numbers of 4 bytes against 256 MB, whatever the machine has."""
    config = LossConfig()
    assert not config.samples_texts(256, 512)
    assert config.samples_texts(512, 512)
    assert not LossConfig(direction_over="all").samples_texts(4096, 512)
    assert not LossConfig(direction_texts=600).samples_texts(512, 512)


@pytest.mark.parametrize("log_radius", [-6.0, -2.0, 3.0])
def test_learned_radii_of_any_size(log_radius: float, seed: int) -> None:
    """Short increments must not be the difference of long ones."""
    torch.manual_seed(seed)
    model = head(32, query="text").train()
    assert model.radius is not None
    with torch.no_grad():
        model.radius.bias.fill_(log_radius)
    text, video = features(7, 7, 4, 2, 32, torch.float64)
    for normalised in (False, True):
        config = LossConfig(**LOUD, kl_normalised=normalised)
        direct, expected = gradients("direct", model, text, video, config, StepRandomness())
        factorised, found = gradients("factorised", model, text, video, config, StepRandomness())
        torch.testing.assert_close(factorised.bottleneck, direct.bottleneck, rtol=1e-9, atol=0)
        assert worst(found, expected)[0] < (1e-7 if normalised else 1e-9)


@pytest.mark.parametrize("num_pairs", [2, 3, 6])
@pytest.mark.parametrize("normalised", [False, True], ids=["as they are", "normalised"])
@pytest.mark.parametrize("variant", [{}, {"context": "words"}, {"query": "text"}])
def test_equal_captions_have_no_spread(
    variant: dict[str, Any], normalised: bool, num_pairs: int, seed: int
) -> None:
    """Where all texts of a batch are one, σ is 1e-6 and carries no gradient, not that of rounding."""
    torch.manual_seed(seed)
    model = head(32, **variant).train()
    text, video = features(num_pairs, num_pairs, 4, 5, 32, torch.float64)
    assert text.words is not None
    same = torch.zeros(num_pairs, dtype=torch.int64)
    text = TextFeatures(text.embedding[same], text.words[same], text.mask[same])
    config = LossConfig(radii_weight=0, direction_weight=0, kl_normalised=normalised)
    direct, expected = gradients("direct", model, text, video, config, StepRandomness())
    factorised, found = gradients("factorised", model, text, video, config, StepRandomness())
    torch.testing.assert_close(factorised.bottleneck, direct.bottleneck)
    assert worst(found, expected)[0] < 1e-6


def test_still_videos_have_no_spread(seed: int) -> None:
    """Equal frames give every text one increment: σ is 1e-6 and carries no gradient, in float32 too."""
    torch.manual_seed(seed)
    model = head(64, dtype=torch.float32).train()
    text, video = features(6, 6, 4, 3, 64, torch.float32)
    frames = video.frames[:, :1].expand(-1, 4, -1).contiguous()
    still = VideoFeatures(frames, torch.ones(6, 4, dtype=torch.bool))
    config = LossConfig(radii_weight=0, direction_weight=0)
    for form in ("direct", "factorised"):
        terms, found = gradients(form, model, text, still, config, StepRandomness())
        assert float(terms.bottleneck.detach()) > 64 * 10  # −log 1e-6 for each dimension
        assert all(value.isfinite().all() for value in found.values())
        assert max(float(value.abs().max()) for value in found.values()) < 1e2


@pytest.mark.parametrize("variant", [{}, {"increment_heads": 2, "corrected_side": "video"}])
def test_the_spread_by_dropout_is_that_of_many_draws(variant: dict[str, Any], seed: int) -> None:
    """The paper's dropout of each pair widens σ_j; the closed form must widen it as much."""
    torch.manual_seed(seed)
    drop, draws = 0.3, 400
    model = head(128, increment_dropout=drop, increment_dropout_per="pair", **variant).train()
    text, video = features(6, 6, 4, 5, 128, torch.float64)
    with torch.no_grad():
        found = [model.scorer.deltas(text, video) for _ in range(draws)]
        expected = torch.stack([one for one in found if one is not None]).var(dim=0).mean(dim=0)
    model.eval()
    sides = sides_of(model.scorer, text, video, None, slice(0, 6), with_dropped=True)
    (block,) = blocks_of(model.scorer, sides, BlockRequest(True, False, False, (False, None), False), None)
    maps = model.scorer.basis_maps()
    assert block.moments is not None
    assert maps is not None
    mean, scatter = block.moments
    with torch.no_grad():
        spread = spread_by_dropout(sides, maps, mean, scatter / 6, drop)
    assert float((spread / expected).mean()) == pytest.approx(1, abs=0.03)
    # Each number has an error of the draws, √(2/2400), and one of first order.
    assert float((spread / expected - 1).abs().mean()) < 0.1


def test_the_spread_by_dropout_has_its_own_gradient(seed: int) -> None:
    torch.manual_seed(seed)
    model = head(8, increment_dropout=0.0)
    text, video = features(4, 4, 3, 2, 8, torch.float64)
    config = LossConfig(dropout_spread=0.3, bottleneck_weight=1, radii_weight=0, direction_weight=0)

    def term(embedding: Tensor, frames: Tensor, *weights: Tensor) -> Tensor:
        parameters = dict(zip(names, weights, strict=True))
        given = (
            model,
            TextFeatures(embedding, text.words, text.mask),
            VideoFeatures(frames, video.mask),
            config,
            StepRandomness(),
        )
        with torch.nn.utils.stateless._reparametrize_module(model, parameters):
            return sharded_terms(*given).objective

    names = [name for name, _ in model.named_parameters() if "residual" in name or ".mean.weight" in name]
    weights = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]
    inputs = (text.embedding.clone().requires_grad_(), video.frames.clone().requires_grad_(), *weights)
    assert torch.autograd.gradcheck(term, inputs, rtol=1e-4)
