"""What must hold of the model whatever its weights are.

N texts, M videos, F frames, W words, D embedding width.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gare.errors import ConfigError
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.train.loss.objective import Objective
from tests.helpers.tiny import moved_model, tiny_batch, tiny_config


@pytest.fixture
def model(seed: int) -> GARE:
    torch.manual_seed(seed)
    return moved_model()


def random_text(model: GARE, num_texts: int) -> TextFeatures:
    width = model.config.clip.embed_dim
    return TextFeatures(torch.randn(num_texts, width), None, torch.ones(num_texts, 8, dtype=torch.bool))


def random_video(model: GARE, num_videos: int, num_frames: int) -> VideoFeatures:
    mask = torch.arange(num_frames) < torch.randint(1, num_frames + 1, (num_videos, 1))
    frames = torch.randn(num_videos, num_frames, model.config.clip.embed_dim)
    return VideoFeatures(frames * mask.unsqueeze(-1), mask)


@pytest.mark.parametrize("padding", [0.0, torch.nan, torch.inf, 1e6])
def test_padded_frames_change_nothing(model: GARE, rng: np.random.Generator, padding: float) -> None:
    """Else a clip's score would depend on the longest clip of its batch, or a nan would end a run."""
    config = tiny_config("train.batch_size=5")
    batch = tiny_batch(config, rng)
    more = torch.full((5, 3, *batch.frames.shape[2:]), padding)
    filled = torch.where(batch.frame_mask[:, :, None, None, None], batch.frames, torch.tensor(padding))
    frames = torch.cat([filled, more], dim=1)
    mask = torch.cat([batch.frame_mask, torch.zeros(5, 3, dtype=torch.bool)], dim=1)
    text = random_text(model, 4)

    results = []
    for given, given_mask in ((batch.frames, batch.frame_mask), (frames, mask)):
        model.zero_grad()
        video = model.encode_video(given, given_mask)
        scores = model.score(text, video)
        scores.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((video, scores, gradients))
    (short, scores, gradients), (long, long_scores, long_gradients) = results
    torch.testing.assert_close(long.frames[:, :4], short.frames, rtol=1e-5, atol=1e-5)
    assert not long.frames[~mask].any()
    torch.testing.assert_close(long.mean, short.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(long_scores, scores, rtol=1e-5, atol=1e-5)
    whole = torch.stack([value.norm() for value in gradients.values()]).norm()
    assert gradients.keys() == long_gradients.keys()
    for name, value in gradients.items():
        assert (long_gradients[name] - value).norm() < 1e-4 * whole, name


def test_padded_words_change_nothing(model: GARE, rng: np.random.Generator) -> None:
    """Else a caption's score would depend on the word limit and on what follows the end marker."""
    batch = tiny_batch(tiny_config("train.batch_size=7"), rng)
    short = model.encode_text(batch.token_ids, batch.token_mask).embedding
    noise = torch.randint(1, 64, (7, 16))
    mask = torch.nn.functional.pad(batch.token_mask, (0, 8))
    token_ids = torch.where(mask, torch.nn.functional.pad(batch.token_ids, (0, 8)), noise)
    long = model.encode_text(token_ids, mask.to(torch.int64))
    torch.testing.assert_close(long.embedding, short, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("increment", ["true", "false"])
def test_scores_are_cosines_and_follow_their_rows_and_columns(seed: int, increment: str) -> None:
    """Else a score would depend on which other videos were asked for, or leave the range that it promises."""
    torch.manual_seed(seed)
    model = GARE(tiny_config(f"model.increment={increment}").model).eval()
    text, video = random_text(model, 6), random_video(model, 9, 4)
    scores = model.score(text, video)
    assert scores.shape == (6, 9)
    assert scores.abs().max() <= 1 + 1e-6
    assert scores.std() > 0
    rows, columns = torch.randperm(6), torch.randperm(9)
    torch.testing.assert_close(model.score(text[rows], video[columns]), scores[rows][:, columns])
    torch.testing.assert_close(model.score(text[2:3], video[4:6]), scores[2:3, 4:6])
    with pytest.raises(ConfigError, match="auto, direct or factorized"):
        model.score(text, video, method="fast")  # type: ignore[arg-type]


def test_the_baseline_has_no_increment(seed: int) -> None:
    """Else the comparison of baseline and GARE would not be one of the increment alone."""
    torch.manual_seed(seed)
    baseline = GARE(tiny_config("model.increment=false").model).eval()
    torch.manual_seed(seed)
    full = GARE(tiny_config().model).eval()
    names = {name for name, _ in baseline.named_parameters()}
    assert not {name for name in names if "increment" in name}
    assert {name for name, _ in full.named_parameters()} - names == {
        name for name, _ in full.named_parameters() if name.startswith("increment.")
    }
    for name, value in baseline.state_dict().items():
        assert torch.equal(value, full.state_dict()[name]), f"{name} starts elsewhere"
    text, video = random_text(baseline, 3), random_video(baseline, 4, 4)
    pairs = baseline.scorer.pairs(text, video)
    assert pairs.delta is None
    # s_ij = cos(t_i, p_ij), written out.
    for i in range(3):
        for j in range(4):
            frames = video.frames[j][video.mask[j]]
            pooled = ((frames @ text.embedding[i] / 3).softmax(0).unsqueeze(1) * frames).sum(0)
            expected = torch.cosine_similarity(text.embedding[i], pooled, dim=0)
            torch.testing.assert_close(pairs.scores[i, j], expected)


def test_gap_sign_turns_the_query(model: GARE) -> None:
    """Else the row of Table 7 with t − v would report the default's numbers."""
    turned = GARE(tiny_config("model.gap_sign=-1").model).eval()
    turned.load_state_dict(model.state_dict())
    text, video = random_text(model, 3), random_video(model, 4, 4)
    assert model.increment is not None
    gap = text.embedding[:, None] - video.mean[None]
    torch.testing.assert_close(
        turned.scorer.pairs(text, video).delta, model.increment(gap, video.frames, video.mask)
    )
    assert not torch.allclose(turned.score(text, video), model.score(text, video))


def test_increment_is_the_papers_formula(model: GARE) -> None:
    """ψ pair by pair, frame by frame, head by head, as the paper writes it; padded frames left out."""
    text, video = random_text(model, 3), random_video(model, 4, 4)
    assert model.increment is not None
    psi = model.increment.layers[0]
    found = model.scorer.pairs(text, video).delta
    assert found is not None
    for i in range(3):
        for j in range(4):
            frames = video.frames[j][video.mask[j]]
            query = psi.query(psi.norm1(frames.mean(0) - text.embedding[i])).view(psi.heads, -1)
            keys = psi.key(psi.norm1(frames)).view(len(frames), psi.heads, -1)
            values = psi.value(psi.norm1(frames)).view(len(frames), psi.heads, -1)
            mixed = [
                (keys[:, head] @ query[head] / query.shape[1] ** 0.5).softmax(0) @ values[:, head]
                for head in range(psi.heads)
            ]
            y = psi.norm2(psi.out(torch.cat(mixed)))
            expected = model.increment.mean(psi.norm3(y + psi.residual(y)))
            torch.testing.assert_close(found[i, j], expected, rtol=1e-4, atol=1e-5)


def test_temporal_transformer_starts_from_the_text_tower(seed: int) -> None:
    """Released training starts it there; a random start costs points that pretraining has paid for."""
    torch.manual_seed(seed)
    model = GARE(tiny_config().model)
    text = model.towers.clip.text_model
    assert torch.equal(model.temporal.positions.weight, text.embeddings.position_embedding.weight)
    assert len(model.temporal.blocks.layers) == 2
    for ours, clips in zip(model.temporal.blocks.layers, text.encoder.layers, strict=True):
        for name, value in clips.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
            # A copy: training one must not move the other.
            assert ours.state_dict()[name].data_ptr() != value.data_ptr()
    wider = GARE(tiny_config("model.clip.text_width=64").model)
    positions = wider.towers.clip.text_model.embeddings.position_embedding.weight
    assert wider.temporal.positions.weight.shape != positions.shape


def test_temporal_transformer_sees_the_future(model: GARE) -> None:
    """A causal mask, which CLIP's text blocks use, would hide the end of a clip from its beginning."""
    frames, mask = torch.randn(2, 4, 32), torch.ones(2, 4, dtype=torch.bool)
    later = frames.clone()
    later[:, 3] = torch.randn(2, 32)  # not a shift of all numbers by the same, which LayerNorm takes out
    changed = (model.temporal(later, mask) - model.temporal(frames, mask)).norm(dim=-1)
    assert (changed > 1e-4).all()
    # Order matters too: "a then b" is not "b then a".
    turned = model.temporal(frames.flip(1), mask).flip(1)
    assert not torch.allclose(turned, model.temporal(frames, mask), atol=1e-3)


@pytest.mark.parametrize("increment", ["true", "false"])
def test_every_parameter_learns(seed: int, rng: np.random.Generator, increment: str) -> None:
    """A parameter without gradient is a part that training silently leaves out, and that DDP waits for."""
    torch.manual_seed(seed)
    config = tiny_config(f"model.increment={increment}")
    model = GARE(config.model)
    Objective(model, config.loss, config.train)(tiny_batch(config, rng)).objective.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.increment_heads=3", "increment_heads 3"),
        ("model.temporal_heads=5", "temporal_heads 5"),
        ("model.gap_sign=0", "model.gap_sign"),
        ("model.gap_sign=2", "model.gap_sign"),
        ("model.pool_temperature=0", "model.pool_temperature"),
        ("model.increment_dropout=1", "model.increment_dropout"),
        ("model.max_words=17", "max_words 17"),
        ("model.clip.patch_size=5", "patch_size 5"),
        ("model.clip.text_heads=3", "text_heads 3"),
        ("train.batch_size=1", "train.batch_size"),
    ],
)
def test_a_model_that_cannot_be_is_refused_by_its_key(override: str, said: str) -> None:
    """Else a person reads a shape error of PyTorch, after the videos have been decoded."""
    with pytest.raises(ConfigError, match=said):
        tiny_config(override)
