"""ψ, the learned increment Δ_ij, in the direct form: every pair computed as the paper writes it.

N texts, M videos, F frames, H heads, D embedding width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Increment(nn.Module):
    """One cross-attention layer from the semantic gap of a pair to the frames of its video.

    For the query g_ij and the context v_j, with the same LN1 on both sides:
        q = W_q·LN1(g_ij)+b_q,  k_f = W_k·LN1(v_jf)+b_k,  x_f = W_v·LN1(v_jf)+b_v
        a = softmax_f(q·k_f/√d_head),  o = W_o Σ_f a_f x_f + b_o
        y = LN2(o),  z = LN3(y + Dropout(W_1 y + b_1)),  Δ_ij = W_μ z + b_μ

    Source: the paper's ψ; linear layers start at N(0, 0.02²) with zero biases, as in the released code,
    whose identity start is overwritten by this.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.residual = nn.Linear(width, width)
        self.mean = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, query_NMD: Tensor, context_MFD: Tensor, mask_MF: Tensor) -> Tensor:
        """Increments (N, M, D).

        Args:
            query_NMD: the semantic gap g_ij of every pair.
            context_MFD: frame features of the M videos.
            mask_MF: bool, true for real frames; padded ones get no attention.
        """
        d_head = context_MFD.shape[-1] // self.heads
        normed_MFD = self.norm1(context_MFD)
        query_NMHd = self.query(self.norm1(query_NMD)).unflatten(-1, (self.heads, d_head))
        key_MFHd = self.key(normed_MFD).unflatten(-1, (self.heads, d_head))
        value_MFHd = self.value(normed_MFD).unflatten(-1, (self.heads, d_head))
        logits_NMHF = torch.einsum("nmhd,mfhd->nmhf", query_NMHd, key_MFHd) / math.sqrt(d_head)
        logits_NMHF = logits_NMHF.masked_fill(~mask_MF[:, None, :], -torch.inf)
        mixed_NMHd = torch.einsum("nmhf,mfhd->nmhd", logits_NMHF.softmax(dim=-1), value_MFHd)
        y_NMD = self.norm2(self.out(mixed_NMHd.flatten(-2)))
        z_NMD = self.norm3(y_NMD + self.dropout(self.residual(y_NMD)))
        delta_NMD: Tensor = self.mean(z_NMD)
        return delta_NMD
