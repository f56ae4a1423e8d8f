"""The fused kernels give the plain form's numbers and gradients, in Triton's interpreter where no GPU is."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gare.model.features import TextFeatures, VideoFeatures
from gare.model.fused import Asked, Fused, fused_pairs, merge_moments
from gare.model.gare import GARE
from gare.model.prepared import Embeddings, PreparedVideo
from gare.train.blocks import Wanted, _block
from tests.heads import clip_like, features, head

#: Read when the kernels are imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="an extra: pip install gare[kernels]")
pytestmark = pytest.mark.kernels

WIDTH = 32


def sides(model: GARE, text: TextFeatures, video: VideoFeatures) -> tuple[Embeddings, PreparedVideo]:
    return model.asking(text.embedding), model.with_basis(video, model.basis_maps(), None)


def plain(
    model: GARE, texts: Embeddings, video: PreparedVideo, asked: Asked, sample: Tensor | None
) -> Fused:
    """The same by the definition."""
    wanted = Wanted(asked.moments, False, asked.normalised, (asked.sample is not None, sample), asked.plain)
    block = _block(model.rule, "video", video, texts, wanted, sample, None)
    mean, scatter = block.moments or (None, None)
    return Fused(block.scores, block.norms, block.plain, block.sampled, mean, scatter)


def gradients(found: Fused, factors: Fused, leaves: list[Tensor]) -> list[Tensor]:
    """Of a sum of all that was found, each number with a factor of its own."""
    total = sum(
        (value * factor).sum()
        for name, value, factor in zip(Fused._fields, found, factors, strict=True)
        if value is not None and factor is not None and name != "plain"
    )
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, leaves, allow_unused=True))


def compare(model: GARE, text: TextFeatures, video: VideoFeatures, asked: Asked, *, tolerance: float) -> None:
    """Holds values and gradients against the plain form in float64."""
    sample = asked.sample if isinstance(asked.sample, Tensor) else None
    exact = GARE(model.config).double()
    exact.load_state_dict(model.state_dict())
    outcomes = []
    factors: Fused | None = None
    for one, fused in ((exact.eval(), False), (model, True)):
        kind = next(one.parameters()).dtype
        embedding = text.embedding.to(kind).requires_grad_()
        frames = video.frames.to(kind).requires_grad_()
        owners = sides(one, replace(text, embedding=embedding), VideoFeatures(frames, video.mask))
        found = fused_pairs(one.rule, *owners, asked) if fused else plain(one, *owners, asked, sample)
        if factors is None:
            factors = Fused(*(None if value is None else torch.randn_like(value) for value in found))
        leaves = [embedding, frames, *one.increment.parameters()]  # type: ignore[union-attr]
        scaled = Fused(*(None if factor is None else factor.to(kind) for factor in factors))
        outcomes.append((found, gradients(found, scaled, leaves)))
    (expected, expected_grads), (found, grads) = outcomes
    for name, value, right in zip(Fused._fields, found, expected, strict=True):
        if asked.norms or name != "norms":
            assert (value is None) == (right is None), name
        if value is not None and right is not None:
            worst = float(((value - right).abs().max() / right.abs().max().clamp(min=1)).detach())
            assert worst < tolerance / 10, f"{name}: {worst:g}"
    whole = torch.cat([grad.flatten() for grad in expected_grads if grad is not None]).norm()
    for number, (grad, right) in enumerate(zip(grads, expected_grads, strict=True)):
        assert (grad is None) == (right is None), number
        if grad is not None and right is not None:
            # Some are differences of nearly equal numbers, and vanish beside the others.
            worst = float((grad - right).norm() / torch.maximum(right.norm(), 1e-3 * whole))
            assert worst < tolerance, f"gradient {number}: {worst:g}"


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    side=st.sampled_from(["text", "video"]),
    sign=st.sampled_from([1, -1]),
    heads=st.sampled_from([1, 2, 4]),
    num_frames=st.sampled_from([1, 2, 3, 5]),
    num_texts=st.integers(1, 9),
    num_videos=st.integers(1, 5),
    normalised=st.booleans(),
    sampled=st.sampled_from(["none", "all", "some"]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_are_those_of_the_plain_form(
    side: str,
    sign: int,
    heads: int,
    num_frames: int,
    num_texts: int,
    num_videos: int,
    normalised: bool,
    sampled: str,
    seed: int,
) -> None:
    """On a GPU training would otherwise learn something else than on a CPU, and nobody would see it."""
    torch.manual_seed(seed)
    model = head(WIDTH, corrected_side=side, gap_sign=sign, increment_heads=heads)
    text, video = features(num_texts, num_videos, num_frames, 3, WIDTH, torch.float64)
    some: Any = {"none": None, "all": "all", "some": torch.arange(0, num_texts, 2)}[sampled]
    asked = Asked(norms=True, plain=True, sample=some, moments=True, normalised=normalised)
    compare(model, text, video, asked, tolerance=1e-8)


@pytest.mark.parametrize(("num_frames", "heads"), [(12, 1), (16, 1), (13, 1), (12, 8), (64, 1)])
@pytest.mark.parametrize("side", ["text", "video"])
def test_tiles_of_every_size(num_frames: int, heads: int, side: str, seed: int) -> None:
    """Clips of the paper's benchmarks have 12 and 64 frames; a tile that is cut off would lose some."""
    torch.manual_seed(seed)
    model = head(WIDTH, corrected_side=side, increment_heads=heads)
    text, video = features(70, 2, num_frames, 3, WIDTH, torch.float64)
    asked = Asked(norms=True, sample=torch.tensor([3, 69]), moments=True)
    compare(model, text, video, asked, tolerance=1e-8)


@pytest.mark.parametrize("side", ["text", "video"])
def test_float32_keeps_the_promise(side: str, seed: int) -> None:
    """Scores to 1e-5 of float64's and gradients to 1e-4 is what "exact" means here, on features like CLIP's."""
    torch.manual_seed(seed)
    model = head(WIDTH, corrected_side=side, spread=0.0, dtype=torch.float32)
    text, video = clip_like(65, 12, 3, WIDTH)
    asked = Asked(norms=True, sample=torch.tensor([0, 64]), moments=True)
    compare(model, text, video, asked, tolerance=1e-4)


def test_extreme_logits_and_equal_frames(seed: int) -> None:
    """A softmax that is all at one frame, or even to the last bit, must not make NaN."""
    torch.manual_seed(seed)
    model = head(WIDTH, spread=3.0)
    text, video = features(5, 4, 6, 3, WIDTH, torch.float64)
    frames = video.frames.clone()
    frames[1] = frames[1, :1]
    frames[2] *= 1e4
    video = VideoFeatures(frames, torch.ones_like(video.mask))
    asked = Asked(norms=True, sample="all", moments=True)
    compare(model, text, video, asked, tolerance=1e-6)


def test_moments_of_parts_make_those_of_the_whole(seed: int) -> None:
    """The bottleneck's σ comes from parts of the texts; raw second moments would be off by percents."""
    torch.manual_seed(seed)
    values = 100 + torch.randn(3, 9, 4, dtype=torch.float64)
    parts = values.split([2, 3, 4], dim=1)
    means = torch.stack([part.mean(dim=1) for part in parts])
    scatters = torch.stack([(part - part.mean(1, True)).mT @ (part - part.mean(1, True)) for part in parts])
    mean, scatter = merge_moments(means, scatters, torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64))
    apart = values - values.mean(1, True)
    torch.testing.assert_close(mean, values.mean(1))
    torch.testing.assert_close(scatter, apart.mT @ apart)
