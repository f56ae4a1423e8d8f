"""A gallery that is prepared once answers as one that is prepared for every search."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gare.model.factorized.prepared import PreparedVideo
from gare.retrieval import gallery as galleries
from gare.retrieval.gallery import Gallery, search
from tests.helpers.heads import features, head


@pytest.mark.parametrize(
    "variant",
    [{}, {"corrected_side": "video", "increment_heads": 2}, {"context": "words"}, {"padding": "released"}],
    ids=str,
)
def test_prepared_galleries_rank_alike(
    variant: dict[str, Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A served model that prepared its clips as it was loaded must name the videos that the model names."""
    torch.manual_seed(seed)
    monkeypatch.setattr(galleries, "PREPARED_AT_ONCE", 4)
    model = head(32, dtype=torch.float32, **variant)
    text, video = features(3, 10, 5, 6, 32, torch.float32)
    monkeypatch.setattr(model, "encode_text", lambda *_: text)
    plain = Gallery(tuple(map(str, range(10))), video, (video,))
    prepared = plain.prepared(model)
    if variant.get("padding") != "released":
        assert [len(part) for part in prepared.parts] == [4, 4, 2]
        assert all(isinstance(part, PreparedVideo) for part in prepared.parts)
    found, right = (search(model, one, ["a", "b", "c"], 10) for one in (prepared, plain))
    for some, expected in zip(found, right, strict=True):
        by_id = dict(expected)
        assert len(some) == 10
        assert all(score == pytest.approx(by_id[video_id], abs=1e-5) for video_id, score in some)
        assert [score for _, score in some] == sorted((score for _, score in some), reverse=True)
