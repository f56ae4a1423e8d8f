"""The factorised form gives the direct form's scores, at any size and within its memory."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gare.errors import ConfigError
from gare.model.features import VideoFeatures
from tests.helpers.heads import features, head

VARIANTS: list[dict[str, Any]] = [
    {"corrected_side": side, "context": context, "gap_sign": sign}
    for side in ("text", "video")
    for context in ("frames", "words")
    for sign in (1, -1)
]
VARIANTS += [{"query": "text", "corrected_side": side} for side in ("text", "video")]
VARIANTS += [{"increment": False}, {"increment": False, "pooling": "mean"}]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=False)
@given(
    variant=st.sampled_from(VARIANTS),
    heads=st.sampled_from([1, 2, 4]),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(1, 7)),
    seed=st.integers(0, 2**31),
)
def test_scores_equal_the_direct_form(
    variant: dict[str, Any], heads: int, shape: tuple[int, int, int, int], seed: int
) -> None:
    """It is the same model or it is nothing; every side, context, head count, mask and shape."""
    torch.manual_seed(seed)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = head(32, dtype=dtype, increment_heads=heads, **variant)
        text, video = features(*shape, 32, dtype)
        direct = model.score(text, video, "direct")
        assert (model.score(text, video, "factorized") - direct).abs().max() < tolerance
        with torch.no_grad():
            assert (model.score(text, video) - direct).abs().max() < tolerance
            assert (model.score(text, model.prepare_video(video)) - direct).abs().max() < tolerance


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda given: " ".join(map(str, given.values())))
def test_blocks_change_nothing(variant: dict[str, Any], seed: int) -> None:
    """The published numbers must not depend on the memory of the machine that computed them."""
    torch.manual_seed(seed)
    model = head(64, **variant)
    small = head(64, memory_mb=1, **variant)
    small.load_state_dict(model.state_dict())
    text, video = features(150, 130, 5, 6, 64, torch.float64)
    with torch.no_grad():
        whole = model.scorer.pairs(text, video).scores
        for method in ("factorized", "direct"):
            torch.testing.assert_close(small.score(text, video, method), whole, rtol=0, atol=1e-10)
        torch.testing.assert_close(small.score(text, small.prepare_video(video)), whole, rtol=0, atol=1e-10)


def test_equal_embeddings_keep_to_the_range(seed: int) -> None:
    """A text parallel to its only frame scores 1, not a rounding more."""
    torch.manual_seed(seed)
    model = head(48, dtype=torch.float32, increment=False)
    text, _ = features(20, 1, 1, 2, 48, torch.float32)
    video = VideoFeatures(3 * text.embedding.unsqueeze(1), torch.ones(20, 1, dtype=torch.bool))
    for method in ("direct", "factorized"):
        scores = model.score(text, video, method)
        assert scores.abs().max() <= 1
        torch.testing.assert_close(scores.diagonal(), torch.ones(20))


def test_scores_are_float32_at_least(seed: int) -> None:
    """Cosines and exponentials in bf16 would round R@1 away, also under autocast."""
    torch.manual_seed(seed)
    model = head(32, dtype=torch.float32)
    text, video = features(4, 5, 3, 2, 32, torch.float32)
    with torch.no_grad():
        exact = model.score(text, video)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model.score(text, video), exact)
        rough = model.score(text, VideoFeatures(video.frames.bfloat16(), video.mask))
    assert rough.dtype == torch.float32


def test_what_has_no_factorised_form_is_said_once(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Auto must never approximate, and a person must know why a run is slow."""
    torch.manual_seed(seed)
    model = head(32, increment_layers=2)
    text, video = features(3, 4, 2, 2, 32, torch.float64)
    with caplog.at_level(logging.WARNING):
        scores = model.score(text, video)
        model.score(text, video)
    assert [record.message for record in caplog.records] == [
        "increment_layers 2 has no factorised form: the direct form is used"
    ]
    torch.testing.assert_close(scores, model.scorer.pairs(text, video).scores)
    for call in (lambda: model.score(text, video, "factorized"), lambda: model.prepare_video(video)):
        with pytest.raises(ConfigError, match="no factorised form"):
            call()
    dropping = head(32, increment_dropout=0.5, increment_dropout_per="pair")
    assert not dropping.scorer.why_direct
    assert "dropout of each pair" in dropping.train().scorer.why_direct
    with pytest.raises(ConfigError, match="auto, direct or factorized"):
        model.score(text, video, "fast")  # type: ignore[arg-type]


def test_several_layers_ask_one_after_the_other(seed: int) -> None:
    """The direct form of a deeper ψ: each layer asks with what the one before found."""
    torch.manual_seed(seed)
    model = head(32, increment_layers=2)
    text, video = features(1, 1, 3, 2, 32, torch.float64)
    assert model.increment is not None
    first, second = model.increment.layers
    query = (video.mean - text.embedding).unsqueeze(0)
    z = second(first(query, video.frames, video.mask, None), video.frames, video.mask, None)
    torch.testing.assert_close(model.scorer.pairs(text, video).delta, model.increment.mean(z))


@pytest.mark.parametrize("context", ["frames", "words"])
def test_dropout_of_a_context_is_the_same_in_both_forms(context: str, seed: int) -> None:
    """One mask for each owner of a context, shared by its pairs, and a mean of 1."""
    torch.manual_seed(seed)
    model = head(64, context=context, increment_dropout=0.4).train()
    text, video = features(5, 7, 3, 4, 64, torch.float64)
    torch.manual_seed(seed)
    direct = model.score(text, video, "direct")
    torch.manual_seed(seed)
    torch.testing.assert_close(model.score(text, video, "factorized"), direct, rtol=0, atol=1e-10)
    assert (model.score(text, video) - direct).abs().max() > 1e-6  # drawn anew
    keep = model.scorer.draw_dropout(4000)
    assert keep is not None
    assert set(keep.unique().tolist()) == {0.0, 1 / 0.6}
    assert abs(float(keep.mean()) - 1) < 0.02


def test_memory_keeps_to_its_budget(repository: Path) -> None:
    """A gallery of any size is scored beside what else the machine does; N·M·D numbers would be 2 GB here."""
    code = """
import torch
from tests.helpers.heads import features, head
from tests.helpers.memory import peak_mb, reset_peak
torch.set_num_threads(1)
for context, heads, memory_mb, texts, videos, words in (
    ("frames", 1, 100, 3000, 2400, 2), ("words", 1, 100, 1500, 1400, 8), ("frames", 8, 40, 10000, 50, 2),
    ("words", 8, 100, 60, 60, 48),
):
    model = head(64, dtype=torch.float32, memory_mb=memory_mb, context=context, increment_heads=heads)
    with torch.no_grad():
        model.score(*features(40, 40, 12, words, 64, torch.float32))
        text, video = features(texts, videos, 12, words, 64, torch.float32)
        for gallery in (video, model.prepare_video(video)):
            before = reset_peak()
            scores = model.score(text, gallery)
            used = peak_mb() - before - 4 * scores.numel() / 1e6
            assert used < memory_mb, (context, heads, used)
            del scores
"""
    # Large tensors outside the heap, whose holes would count as well: 0 to 30 MB more, by chance.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repository, env=environment)
