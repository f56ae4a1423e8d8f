"""CLIP's byte-pair tokens, offline."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gare.errors import DataError

_WHITESPACE = re.compile(r"\s+")


def clean_text(caption: str) -> str:
    """Cleans a caption as CLIP does: repairs mojibake, unescapes HTML twice, folds spaces, lower-cases."""
    text = caption
    # ftfy leaves plain ASCII as it is, but would take most of a caption's time.
    if not (caption.isascii() and caption.isprintable() and "&" not in caption):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return _WHITESPACE.sub(" ", text).strip().lower()


def tokenize(captions: Sequence[str], max_words: int = 32) -> tuple[Tensor, Tensor]:
    """Tokenises captions, with start and end markers, cut to ``max_words`` keeping the end marker.

    A caption that spells a special token such as ``<|endoftext|>`` is plain text, never the token.

    Args:
        captions: N texts.
        max_words: W, tokens of a caption with both markers, at least 3.

    Returns:
        token_ids (N, W) int64, zero-padded, and token_mask (N, W) bool, true for real tokens.

    Raises:
        DataError: for a caption that is not a string, by its position, or a word limit without room.
    """
    if isinstance(captions, str):
        raise DataError("is one text", where="captions", accepted="a list of texts")
    if max_words < 3:
        raise DataError(f"is {max_words}", where="max_words", accepted="3 or more, both markers included")
    tokenizer = _tokenizer()
    token_ids = torch.zeros(len(captions), max_words, dtype=torch.int64)
    token_mask = torch.zeros(len(captions), max_words, dtype=torch.bool)
    for row, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise DataError(f"is {caption!r}", where=f"caption {row}", accepted="a text")
        body = tokenizer.encode(clean_text(caption))[: max_words - 2]
        ids = [tokenizer.start_of_text(), *body, tokenizer.end_of_text()]
        token_ids[row, : len(ids)] = torch.tensor(ids)
        token_mask[row, : len(ids)] = True
    return token_ids, token_mask


@cache
def _tokenizer() -> Any:
    from instant_clip_tokenizer import Tokenizer

    return Tokenizer()
