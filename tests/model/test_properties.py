"""What must hold for any features, drawn by hypothesis.

N texts, M videos, F frames, D embedding width.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.model.pooling import pool
from gare.retrieval.ranking.metrics import retrieval_metrics
from tests.helpers.tiny import tiny_config
from tests.retrieval.ranking.test_metrics import brute_force

D = 32
FEW = settings(max_examples=30, deadline=None)
#: Lengths of features as encoders give them and far beyond.
LENGTHS = st.sampled_from([1e-3, 1.0, 10.0, 1e3])
OVERRIDES = st.sampled_from(
    ["model.increment=true", "model.corrected_side=video", "model.query=text", "model.increment=false"]
)


def drawn(
    seed: int, override: str, texts: int, videos: int, frames: int, length: float
) -> tuple[GARE, TextFeatures, VideoFeatures]:
    torch.manual_seed(seed)
    model = GARE(tiny_config(override, "model.max_frames=8", "extract.num_frames=8").model).eval().double()
    mask = torch.arange(frames) < torch.randint(1, frames + 1, (videos, 1))
    features = length * torch.randn(videos, frames, D, dtype=torch.float64) * mask.unsqueeze(-1)
    # With learned lengths exp(Σ c t·v) at their start, c = 0.
    text = length * torch.randn(texts, D, dtype=torch.float64)
    return (
        model,
        TextFeatures(text, None, torch.ones(texts, 1, dtype=torch.bool)),
        VideoFeatures(features, mask),
    )


@FEW
@given(st.integers(0, 2**31), OVERRIDES, st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), LENGTHS)
def test_scores_are_cosines_and_columns_follow_their_videos(
    seed: int, override: str, texts: int, videos: int, frames: int, length: float
) -> None:
    """A score must not depend on which other videos are in the gallery, nor leave [−1, 1]."""
    model, text, video = drawn(seed, override, texts, videos, frames, length)
    scores = model.score(text, video)
    assert scores.isfinite().all()
    assert scores.abs().max() <= 1 + 1e-12
    order = torch.randperm(videos)
    torch.testing.assert_close(model.score(text, video[order]), scores[:, order], rtol=1e-9, atol=1e-9)
    queries_in_key_space = torch.randperm(texts)
    torch.testing.assert_close(
        model.score(text[queries_in_key_space], video), scores[queries_in_key_space], rtol=1e-9, atol=1e-9
    )


@FEW
@given(st.integers(0, 2**31), OVERRIDES, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_padding_changes_nothing(seed: int, override: str, texts: int, videos: int, frames: int) -> None:
    """However many padded frames a batch brings."""
    model, text, video = drawn(seed, override, texts, videos, frames, 1.0)
    pad = (0, 0, 0, 8 - frames)
    longer = VideoFeatures(
        torch.nn.functional.pad(video.frames, pad), torch.nn.functional.pad(video.mask, (0, 8 - frames))
    )
    torch.testing.assert_close(model.score(text, longer), model.score(text, video), rtol=1e-9, atol=1e-9)


@FEW
@given(
    st.integers(0, 2**31),
    st.sampled_from(["model.increment=true", "model.increment=false"]),
    st.integers(1, 4),
)
def test_a_repeated_frame_counts_twice(seed: int, override: str, frames: int) -> None:
    """Pooling, mean and attention are averages: all frames twice is the same clip, one frame twice is not."""
    model, text, video = drawn(seed, override, 3, 2, frames, 1.0)
    video = VideoFeatures(video.frames, torch.ones_like(video.mask))
    twice = VideoFeatures(video.frames.repeat(1, 2, 1), video.mask.repeat(1, 2))
    torch.testing.assert_close(model.score(text, twice), model.score(text, video), rtol=1e-9, atol=1e-9)
    once_more = VideoFeatures(
        torch.cat([video.frames, video.frames[:, :1]], dim=1), torch.ones(2, frames + 1, dtype=torch.bool)
    )
    weights = torch.ones(frames, dtype=torch.float64)
    weights[0] = 2
    torch.testing.assert_close(once_more.mean, (weights[:, None] * video.frames).sum(1) / (frames + 1))
    temperature = model.config.pool_temperature
    pooled = pool(text.embedding, once_more, temperature)
    torch.testing.assert_close(pooled, weighted_pool(text.embedding, video.frames, weights, temperature))
    if frames > 1:
        assert not torch.allclose(once_more.mean, video.mean)


def weighted_pool(text_ND: Tensor, frames_MFD: Tensor, weights_F: Tensor, temperature: float) -> Tensor:
    share = weights_F * (torch.einsum("nd,mfd->nmf", text_ND, frames_MFD) / temperature).exp()
    return torch.einsum("nmf,mfd->nmd", share / share.sum(-1, keepdim=True), frames_MFD)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_metrics_equal_a_brute_force_count(data: st.DataObject) -> None:
    """Ties get the mean rank of the tied, so that a model that scores all alike is in the middle."""
    videos = data.draw(st.integers(1, 12))
    owner = data.draw(st.lists(st.integers(0, videos - 1), min_size=1, max_size=20))
    levels = st.integers(0, data.draw(st.sampled_from([0, 2, 1000])))
    row = st.lists(levels, min_size=videos, max_size=videos)
    scores = torch.tensor(data.draw(st.lists(row, min_size=len(owner), max_size=len(owner)))) / 7
    found = retrieval_metrics(scores, torch.tensor(owner))
    expected = brute_force(scores.numpy(), torch.tensor(owner).numpy())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(found[name] - value) < 1e-4, name
