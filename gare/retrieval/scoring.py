"""Scores of whole splits.

N texts, M videos.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE


@torch.inference_mode()
def score_split(model: GARE, text: TextFeatures, video: VideoFeatures) -> Tensor:
    """Scores (N, M) float32 on the CPU; the model streams over blocks within its own budget of memory."""
    return model.score(text, video).float().cpu()
