"""Captions as tokens, made once: the same as of each caption by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gare.errors import DataError
from gare.model.encoders.tokenizer import tokenize
from gare.train.input import tokens
from gare.train.input.tokens import CaptionTokens

CAPTIONS = [["a dog runs", "one cat"], ["the <|endoftext|> sign"], ["wörd " * 20, "", "two\tmen"]]


def test_every_caption_is_its_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caption beside another video, or cut by the table's width, would teach the wrong pair."""
    monkeypatch.setattr(tokens, "_AT_ONCE", 4)
    table = CaptionTokens.of(CAPTIONS, 12)
    pairs = [(video, caption) for video, group in enumerate(CAPTIONS) for caption in range(len(group))]
    videos, captions = (np.array(column) for column in zip(*pairs, strict=True))
    found = table.of_pairs(videos[::-1], captions[::-1])
    ids, mask = tokenize([CAPTIONS[video][caption] for video, caption in pairs[::-1]], 12)
    assert torch.equal(torch.from_numpy(found["token_ids"]).long(), ids)
    assert torch.equal(torch.from_numpy(found["token_mask"]), mask)
    found = table.of_videos(np.array([2, 0]))
    ids, mask = tokenize([*CAPTIONS[2], *CAPTIONS[0]], 12)
    assert torch.equal(torch.from_numpy(found["token_ids"]).long(), ids)
    assert torch.equal(torch.from_numpy(found["token_mask"]), mask)
    assert found["caption_counts"].tolist() == [3, 2]


def test_the_largest_token_fits() -> None:
    """An end marker that wraps around is another word, and the text's embedding is taken where it stands."""
    table = CaptionTokens.of([["dog"]], 4)
    assert int(table.ids.max()) == 49407
    assert CaptionTokens.of([], 4).of_videos(np.empty(0, np.int64))["token_ids"].shape == (0, 4)


def test_a_caption_that_is_no_text_is_refused() -> None:
    """A number from a spreadsheet must not become a caption by accident."""
    with pytest.raises(DataError, match="caption 1"):
        CaptionTokens.of([["dog", 7]], 4)  # type: ignore[list-item]
