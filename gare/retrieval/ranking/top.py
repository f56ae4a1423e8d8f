"""The best candidates of queries, gathered block by block; their order does not depend on the blocks.

Q queries, C candidates, K kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Candidates kept for a query.
TOP = 10
#: Key of no candidate, below all keys of scores.
NONE = torch.iinfo(torch.int64).min
_LOW = 0xFFFFFFFF


def pack_keys(scores: Tensor, candidates: Tensor) -> Tensor:
    """Packs a score and its candidate into one int64: greater for a better score, then for a lower number.

    Args:
        scores: (Q, C), taken as float32.
        candidates: (C,) int64, below 2³².
    """
    # The bits of a float32 sort like the number itself once those of negative numbers are reversed.
    bits = (scores.float() + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (_LOW - candidates)


def unpack_keys(keys_QK: Tensor) -> tuple[Tensor, Tensor]:
    """Unpacks candidates (Q, K) int64, −1 for none, and their scores (Q, K) float32, nan for none."""
    ordered = (keys_QK >> 32).int()
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    none = keys_QK == NONE
    candidates = _LOW - (keys_QK & _LOW)
    return candidates.masked_fill(none, -1), scores.masked_fill(none, torch.nan)


def merge(first: Tensor, second: Tensor) -> Tensor:
    """Returns the K greatest keys of each query out of (Q, K) and any number of others, greatest first."""
    if second.shape[1] > first.shape[1]:
        second = second.topk(first.shape[1], dim=1).values
    return torch.cat([first, second], dim=1).topk(first.shape[1], dim=1).values


def no_candidates(num_queries: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns keys of no candidates."""
    return torch.full((num_queries, TOP), NONE, dtype=torch.int64, device=device)
