"""Captions become the tokens that CLIP was trained with."""

from __future__ import annotations

import html
import json
import re

import ftfy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gare.errors import DataError
from gare.model.encoders.tokenizer import clean_text, tokenize
from tests.helpers.golden import GOLDEN

START, END = 49406, 49407


def test_tokens_equal_the_released_tokeniser() -> None:
    """Other ids would feed pretrained towers noise."""
    golden = json.loads((GOLDEN / "clip_tokens.json").read_text(encoding="utf-8"))
    special = [case for case in golden if "<|" in case["text"]]
    plain = [case for case in golden if "<|" not in case["text"]]
    assert len(plain) > 30
    assert special
    token_ids, token_mask = tokenize([case["text"] for case in plain], 32)
    for found, mask, case in zip(token_ids, token_mask, plain, strict=True):
        assert found.tolist() == case["token_ids"], case["text"]
        assert mask.tolist() == [token != 0 for token in case["token_ids"]], case["text"]


@pytest.mark.parametrize("text", ["<|endoftext|>", "a cat <|endoftext|> a dog", "<|startoftext|>"])
def test_special_tokens_cannot_be_spelt(text: str) -> None:
    """Else a caption could end itself early, or pose as another."""
    row = tokenize([text], 32)[0][0].tolist()
    assert row.count(START) == 1
    assert row.count(END) == 1
    assert row[0] == START


def test_long_captions_keep_their_end_marker() -> None:
    """The caption's embedding is read at the end marker; cut off, it would be read from a word."""
    token_ids, token_mask = tokenize(["word " * 100, "short", ""], 8)
    assert token_ids.shape == token_mask.shape == (3, 8)
    assert token_ids.dtype == torch.int64
    assert token_mask.dtype == torch.bool
    assert token_ids[0].tolist()[-1] == END
    assert token_mask.sum(dim=1).tolist() == [8, 3, 2]
    assert token_ids[2].tolist() == [START, END, 0, 0, 0, 0, 0, 0]


def test_cleaning_is_clips() -> None:
    """Mojibake, entities and white space of scraped captions must not become other words."""
    assert clean_text("  A &amp;amp; B\n\tcaf\u00c3\u00a9  ") == "a & b caf\u00e9"


@given(st.text(st.characters(codec="ascii"), max_size=40))
@settings(max_examples=300, deadline=None)
def test_plain_ascii_is_cleaned_as_all_else(text: str) -> None:
    """It goes a shorter way, in a tenth of the time; another result would be other tokens than CLIP's."""
    longer = html.unescape(html.unescape(ftfy.fix_text(text)))
    assert clean_text(text) == re.sub(r"\s+", " ", longer).strip().lower()


def test_what_is_no_text_is_named() -> None:
    """A caption column with a number or a gap must be found by its row."""
    with pytest.raises(DataError, match="caption 1: is None"):
        tokenize(["a", None])  # type: ignore[list-item]
    assert tokenize([], 5)[0].shape == (0, 5)
