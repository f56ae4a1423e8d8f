"""Prepared videos without their basis give the scores of those with it, and take a third of the memory.

N texts, M videos, F frames, D embedding width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gare.errors import ConfigError
from gare.model.factorized.pair_products import FEW_TEXTS, video_products
from gare.model.factorized.pairs import PairNumbers
from gare.model.factorized.prepared import PreparedVideo
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from tests.helpers.heads import clip_like, features, head, held_bytes

VARIANTS: list[dict[str, Any]] = [
    {"corrected_side": side, **asked}
    for side in ("text", "video")
    for asked in ({"gap_sign": 1}, {"gap_sign": -1}, {"query": "text"})
]


def with_basis(model: GARE, video: VideoFeatures) -> PreparedVideo:
    return model.scorer.with_basis(video, model.scorer.basis_maps(), None)


def numbers(model: GARE, text: TextFeatures, video: PreparedVideo) -> PairNumbers:
    return model.scorer.pair_numbers(
        video, model.scorer.query_embeddings(text.embedding, lean=video.scales is not None)
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=False)
@given(
    variant=st.sampled_from(VARIANTS),
    heads=st.sampled_from([1, 2, 4]),
    num_texts=st.sampled_from([1, 2, 7, FEW_TEXTS, FEW_TEXTS + 1]),
    num_videos=st.integers(1, 9),
    num_frames=st.sampled_from([1, 2, 3, 12]),
    seed=st.integers(0, 2**31),
)
def test_all_numbers_of_pairs_are_those_of_the_basis(
    variant: dict[str, Any], heads: int, num_texts: int, num_videos: int, num_frames: int, seed: int
) -> None:
    """A gallery that was prepared must rank as one that was not, whatever the model's variant."""
    torch.manual_seed(seed)
    model = head(32, increment_heads=heads, **variant)
    text, video = features(num_texts, num_videos, num_frames, 2, 32, torch.float64)
    with torch.no_grad():
        lean, whole = model.prepare_video(video, lean=True), with_basis(model, video)
        assert lean.scales is not None
        found, right = (vars(numbers(model, text, one)) for one in (lean, whole))
        for name, expected in right.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-10, msg=name)
        torch.testing.assert_close(lean.features.frames, video.frames, rtol=0, atol=1e-12)
        torch.testing.assert_close(lean.mean, video.mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("noise", [1.0, 0.032, 0.0032])
def test_frames_that_are_much_alike_lose_nothing(noise: float, heads: int, seed: int) -> None:
    """Frames of a real clip have cosines of 0.999: scores in float32 must still be right, and as before."""
    torch.manual_seed(seed)
    exact = head(256, spread=0.02, increment_heads=heads)
    model = head(256, dtype=torch.float32, increment_heads=heads)
    model.load_state_dict(exact.state_dict())
    exact.load_state_dict(model.state_dict())  # as rounded
    text, video = clip_like(40, 12, 2, 256)
    around = video.frames[:, :1]
    moved = around + noise * around.norm(dim=2, keepdim=True) / 16 * torch.randn_like(video.frames)
    video = VideoFeatures(moved * video.mask.unsqueeze(2), video.mask)
    text64 = TextFeatures(text.embedding.double(), None, text.mask)
    video64 = VideoFeatures(video.frames.double(), video.mask)
    with torch.no_grad():
        right = exact.score(text64, video64, "direct")
        lean, whole = model.prepare_video(video, lean=True), with_basis(model, video)
        error = (model.score(text, lean) - right).abs().max()
        assert error < 1e-5
        assert error < 3 * (model.score(text, whole) - right).abs().max() + 1e-7
        # Scores hide differences between texts, which are made of these.
        asking = exact.scorer.query_embeddings(text64.embedding)
        expected = video_products(asking, with_basis(exact, video64)).whole
        errors = []
        for one in (lean, whole):
            asking = model.scorer.query_embeddings(text.embedding, lean=one is lean)
            apart = video_products(asking, one).whole - expected
            errors.append(apart[:, 12 : 12 + 12 * heads].abs().max())
    assert errors[0] < 2 * errors[1]


def test_parts_are_those_of_the_whole(seed: int) -> None:
    """Blocks, and a gallery's candidates by their positions, are scored as the gallery is."""
    torch.manual_seed(seed)
    model = head(32, increment_heads=2)
    text, video = features(70, 9, 5, 3, 32, torch.float64)
    with torch.no_grad():
        lean = model.prepare_video(video, lean=True)
        right = model.score(text, lean)
        for some in (slice(2, 7), torch.tensor([8, 0, 3])):
            torch.testing.assert_close(model.score(text, lean[some]), right[:, some], rtol=0, atol=1e-12)
            torch.testing.assert_close(model.score(text[some], lean), right[some], rtol=0, atol=1e-12)
        parts = list(lean.split(4))
        assert [len(part) for part in parts] == [4, 4, 1]
        scores = torch.cat([model.score(text, part) for part in parts], dim=1)
        torch.testing.assert_close(scores, right, rtol=0, atol=1e-12)
        asking = list(model.scorer.query_embeddings(text.embedding, lean=True).split(32))
        scores = torch.cat([model.scorer.pair_scores(lean, some) for some in asking], dim=1)
        torch.testing.assert_close(scores.T, right, rtol=0, atol=1e-12)


def test_a_prepared_gallery_takes_a_third(seed: int) -> None:
    """A gallery that fits in memory, or in an index, should not be three times as large for nothing."""
    torch.manual_seed(seed)
    model = head(512, dtype=torch.float32)
    _, video = features(1, 10, 12, 2, 512, torch.float32)
    with torch.no_grad():
        lean, whole = held_bytes(model.prepare_video(video, lean=True)), held_bytes(with_basis(model, video))
    assert lean < 0.37 * whole
    # F + 1 vectors and less than 5 kB besides.
    assert lean < 10 * (4 * 13 * 512 + 5000)


def test_dropout_refuses_lean_videos(seed: int) -> None:
    """Dropout falls between ψ's maps: lean videos in training would silently be another model's."""
    torch.manual_seed(seed)
    model = head(32, increment_dropout=0.5, increment_dropout_per="context").train()
    _, video = features(2, 3, 4, 2, 32, torch.float64)
    with pytest.raises(ConfigError, match=r"dropout.*model\.eval"):
        model.prepare_video(video, lean=True)
    assert model.prepare_video(video).scales is None
    assert model.eval().prepare_video(video, lean=True).scales is not None


@pytest.mark.parametrize("variant", [{"context": "words"}, {"increment": False}, {"pooling": "mean"}])
def test_models_without_a_basis_of_frames_take_lean_as_it_is(variant: dict[str, Any], seed: int) -> None:
    """Who prepares a gallery need not know which of the models keeps something besides the frames."""
    torch.manual_seed(seed)
    model = head(32, **{"increment": variant.get("pooling") != "mean"} | variant)
    text, video = features(6, 4, 5, 3, 32, torch.float64)
    with torch.no_grad():
        right = model.score(text, video, "direct")
        found = model.score(text, model.prepare_video(video, lean=True))
    torch.testing.assert_close(found, right, rtol=0, atol=1e-10)


def test_gradients_are_those_of_the_basis(seed: int) -> None:
    """Whoever optimises a query or a clip against a prepared gallery needs the gradient of its scores."""
    torch.manual_seed(seed)
    model = head(32, increment_heads=2)
    text, video = features(6, 4, 5, 3, 32, torch.float64)
    embedding, frames = text.embedding.requires_grad_(), video.frames.requires_grad_()
    leaves = [embedding, frames, *model.increment.parameters()]  # type: ignore[union-attr]
    factors, found = torch.randn(4, 6, dtype=torch.float64), []
    for lean in (True, False):
        prepared = model.prepare_video(VideoFeatures(frames, video.mask), lean=lean)
        scores = numbers(model, text, prepared).scores
        found.append(torch.autograd.grad((scores * factors).sum(), leaves, allow_unused=True))
    for one, right in zip(*found, strict=True):
        # The keys' bias shifts all logits alike.
        torch.testing.assert_close(torch.zeros_like(right) if one is None else one, right, rtol=0, atol=1e-9)
