"""Scores of many pairs, block by block, and features computed in another process, are the model's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gare.data.images import normalise
from gare.data.store.frame_reader import FrameReader
from gare.errors import DataError
from gare.model.encoders.tokenizer import tokenize
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.retrieval.ranking.encode import Encoder
from gare.retrieval.ranking.scoring import score_split
from tests.helpers.stores import write_store
from tests.helpers.tiny import tiny_config

CAPTIONS = ["a red circle", "two blue squares that move to the left", "nothing"]


@pytest.fixture
def model(seed: int) -> GARE:
    torch.manual_seed(seed)
    return GARE(tiny_config("model.clip.vocab_size=49408").model).eval()


def test_a_split_is_scored_as_its_pairs_are(model: GARE) -> None:
    """The published numbers must not depend on the memory of the machine that computed them."""
    mask = torch.arange(4) < torch.randint(1, 5, (11, 1))
    text = TextFeatures(torch.randn(7, 32), None, torch.ones(7, 1, dtype=torch.bool))
    video = VideoFeatures(torch.randn(11, 4, 32) * mask.unsqueeze(-1), mask)
    scores = score_split(model, text, video)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    torch.testing.assert_close(scores, model.score(text, video).detach())


def test_the_encoder_gives_the_models_features(model: GARE, rng: np.random.Generator, tmp_path: Path) -> None:
    """Evaluation encodes on actors; what comes back must be what training saw, without dropout."""
    config = tiny_config()
    write_store(str(tmp_path), config.extract, ["a", "b", "c"], rng)
    encoder = Encoder(model.train(), str(tmp_path))
    clips = encoder.clips(["c", "a"])
    frames, mask = FrameReader(str(tmp_path)).read(["c", "a"])
    with torch.inference_mode():
        video = model.eval().encode_video(normalise(torch.from_numpy(frames)), torch.from_numpy(mask))
        text = model.encode_text(*tokenize(CAPTIONS, 8))
    assert np.array_equal(clips["mask"], mask)
    np.testing.assert_allclose(clips["frames"], video.frames.numpy(), rtol=1e-5, atol=1e-6)
    embedding = encoder.captions(CAPTIONS)["embedding"]
    assert embedding.dtype == clips["frames"].dtype == np.float32
    np.testing.assert_allclose(embedding, text.embedding.numpy(), rtol=1e-5, atol=1e-6)


def test_captions_need_no_store(model: GARE, tmp_path: Path) -> None:
    """A text query is answered from an index, where no frames are at hand."""
    encoder = Encoder(model, str(tmp_path / "no store"))
    assert encoder.captions(CAPTIONS)["embedding"].shape == (3, 32)
    with pytest.raises(DataError, match="there is no store here"):
        encoder.clips(["a"])
