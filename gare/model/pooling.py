"""Pooling of a clip's frames to one vector: for each text, or the same for all texts.

N texts, M videos, F frames, D embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gare.model.factorized.quadratic_forms import SHORTEST
from gare.model.features import VideoFeatures


def pool(
    text_ND: Tensor, video: VideoFeatures, temperature: float, *, released_padding: bool = False
) -> Tensor:
    """Pools frames for each text: p_ij = Σ_f softmax_f(t_i·v_jf / τ_pool) v_jf, padded frames excluded.

    Args:
        text_ND: t_i.
        video: M encoded clips.
        temperature: τ_pool.
        released_padding: whether padded frames are excluded as in the released code: after the softmax, so
            that the other weights add up to less than 1.

    Returns:
        (N, M, D).
    """
    logits_NMF = torch.einsum("nd,mfd->nmf", text_ND, video.frames) / temperature
    if released_padding:
        weights_NMF = logits_NMF.softmax(dim=-1) * video.mask
    else:
        weights_NMF = logits_NMF.masked_fill(~video.mask, -torch.inf).softmax(dim=-1)
    return torch.einsum("nmf,mfd->nmd", weights_NMF, video.frames)


def unit_mean(video: VideoFeatures) -> Tensor:
    """Averages a clip's real frames, each scaled to length 1, to p_j (M, D); the mean itself is shorter.

    Source: CLIP4Clip's mean pooling (arXiv 2104.08860).
    """
    lengths_MF = torch.linalg.vector_norm(video.frames, dim=2).clamp(min=SHORTEST)
    shares_MF = video.mask / (video.mask.sum(dim=1, keepdim=True) * lengths_MF)
    # As a matrix product, which makes no copy of the frames.
    mean_MD: Tensor = (shares_MF.unsqueeze(1) @ video.frames).squeeze(1)
    return mean_MD
