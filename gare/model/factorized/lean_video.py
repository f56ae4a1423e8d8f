"""Reduced forms of videos and texts that give all products of pairs without any basis vector.

Without dropout the basis vectors are linear maps of the frames, and the transposed maps can be applied to the
text instead. So a video keeps F + 1 vectors in place of 2F + H·F + 3, and a text is 1 + 2H vectors: itself
and, for each head, the attention query and the text after ψ's transposed maps.

N texts, M videos, F frames, H heads, D embedding width. n is LN1 of a frame without its affine part.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from gare.model.factorized.basis import centred
from gare.model.factorized.quadratic_forms import NORM_EPS
from gare.model.features import VideoFeatures
from gare.model.increment import Increment
from gare.tensor_group import ROWS_SECOND, TensorGroup


@dataclass(frozen=True, repr=False)
class FrameScales(TensorGroup):
    """Means and scales that LN1 removes from frames, 0 at padding.

    Attributes:
        mean: (M, F) μ_f, the mean of a frame over D.
        scale: (M, F) sd_f, so that a frame is μ_f + sd_f·n_f.
    """

    mean: Tensor
    scale: Tensor

    def frames(self, rows: Tensor) -> Tensor:
        """Rebuilds frame features (M, F, D) from the rows of ``lean_rows``, zero at padding."""
        about_MFD, mean_M1D = rows[:, :-1], rows[:, -1:]
        return torch.addcmul(self.mean.unsqueeze(2), self.scale.unsqueeze(2), about_MFD + mean_M1D)


def lean_rows(video: VideoFeatures, share_MF: Tensor) -> tuple[Tensor, FrameScales]:
    """Computes the rows (M, F + 1, D) that lean videos keep: n_f − n̄, 0 at padding, and n̄ last.

    The difference is kept, not n_f: frames of a clip are much alike, and subtracting two nearly equal
    products would lose digits in float32.

    Args:
        video: M clips.
        share_MF: 1 over the number of real frames, 0 at padding.
    """
    real_MF1 = video.mask.unsqueeze(2)
    frames_MFD = torch.where(real_MF1, video.frames, 0)
    normed_MFD = functional.layer_norm(frames_MFD, frames_MFD.shape[2:], eps=NORM_EPS)
    variance_MF, mean_MF = torch.var_mean(frames_MFD, dim=2, correction=0)
    mean_M1D = share_MF.unsqueeze(1) @ normed_MFD
    rows = torch.cat([torch.where(real_MF1, normed_MFD - mean_M1D, 0), mean_M1D], dim=1)
    scale_MF = torch.where(video.mask, (variance_MF + NORM_EPS).sqrt(), 0)
    return rows, FrameScales(mean_MF, scale_MF)


@dataclass(frozen=True, repr=False)
class MappedText(TensorGroup):
    """Texts mapped to queries of lean videos.

    Attributes:
        turned: (H, N, D) γ1 ⊙ ``queries_in_key_space`` of the texts, with their sign in the query.
        along: (H, N, D) γ1 ⊙ M_hᵀt, where M_h maps LN1 of a frame to the basis vector of its attention
            weight.
        constants: (N, 3), what the biases add to the products with the vectors along LN2's and LN3's scale
            and with even attention's increment.
    """

    turned: Tensor = field(metadata=ROWS_SECOND)
    along: Tensor = field(metadata=ROWS_SECOND)
    constants: Tensor


def map_text(increment: Increment, text_ND: Tensor, turned_HND: Tensor) -> MappedText:
    """Applies the transposes of ψ's linear maps to texts: four products with a D×D matrix for each text.

    Args:
        increment: ψ, with one layer, without dropout.
        text_ND: embeddings.
        turned_HND: from ``queries_in_key_space``, with their sign.

    Source: M_h = W_μ diag(γ3) P (I + W_1) diag(γ2) P W_o[:, h] W_v[h]; docs/design/factorized.md, points 2 to
        4.
    """
    layer, heads = increment.first, increment.heads
    back_ND = text_ND @ increment.mean.weight
    even_N = back_ND @ layer.norm3.bias + text_ND @ increment.mean.bias
    back_ND = centred(back_ND * layer.norm3.weight)
    base_D = layer.norm2.bias + functional.linear(
        layer.norm2.bias, layer.residual.weight, layer.residual.bias
    )
    base_N = back_ND @ base_D
    back_ND = centred((back_ND + back_ND @ layer.residual.weight) * layer.norm2.weight)
    mixed_ND = back_ND @ layer.out.weight
    along_HND = torch.unflatten(mixed_ND, 1, (heads, -1)).transpose(0, 1) @ torch.unflatten(
        layer.value.weight, 0, (heads, -1)
    )
    first_N = along_HND.sum(dim=0) @ layer.norm1.bias + mixed_ND @ layer.value.bias + back_ND @ layer.out.bias
    scale_D = layer.norm1.weight
    constants_N3 = torch.stack([first_N, base_N, even_N], dim=1)
    return MappedText(turned_HND * scale_D, along_HND * scale_D, constants_N3)
