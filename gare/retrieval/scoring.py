"""Scores of many texts against many videos, block by block.

N texts, M videos.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE


@torch.inference_mode()
def score_blocks(model: GARE, text: TextFeatures, video: VideoFeatures, block: int) -> Tensor:
    """Scores (N, M) float32 on the CPU, from blocks of at most ``block`` texts by ``block`` videos."""
    rows = []
    for start in range(0, len(text.embedding), block):
        some = text[start : start + block]
        columns = [
            model.score(some, video[first : first + block]).float().cpu()
            for first in range(0, len(video.mask), block)
        ]
        rows.append(torch.cat(columns, dim=1))
    return torch.cat(rows)
