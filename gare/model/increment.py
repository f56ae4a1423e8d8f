"""ψ, the learned increment Δ_ij, in the direct form: every pair computed as the paper writes it.

A queries, B contexts, C positions (frames or words), H heads, N texts, M videos, F frames, D embedding width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class IncrementLayer(nn.Module):
    """One cross-attention layer from a query to the context of its pair.

    For the query g and the context c (the frames of the pair's video or the words of its text), with the same
    LN1 on both sides:
        q = W_q·LN1(g)+b_q,  k_f = W_k·LN1(c_f)+b_k,  x_f = W_v·LN1(c_f)+b_v
        a = softmax_f(q·k_f/√d_head),  o = W_o Σ_f a_f x_f + b_o
        y = LN2(o),  z = LN3(y + Dropout(W_1 y + b_1))

    Source: the paper's ψ.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.residual = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, query_ABD: Tensor, context_BCD: Tensor, mask_BC: Tensor, keep_BD: Tensor | None
    ) -> Tensor:
        """Computes z (A, B, D); see ``Increment.forward``."""
        d_head = context_BCD.shape[-1] // self.heads
        normed_BCD = self.norm1(context_BCD)
        query_ABHd = self.query(self.norm1(query_ABD)).unflatten(-1, (self.heads, d_head))
        key_BCHd = self.key(normed_BCD).unflatten(-1, (self.heads, d_head))
        value_BCHd = self.value(normed_BCD).unflatten(-1, (self.heads, d_head))
        logits_ABHC = torch.einsum("abhd,bchd->abhc", query_ABHd, key_BCHd) / math.sqrt(d_head)
        logits_ABHC = logits_ABHC.masked_fill(~mask_BC[:, None, :], -torch.inf)
        mixed_ABHd = torch.einsum("abhc,bchd->abhd", logits_ABHC.softmax(dim=-1), value_BCHd)
        y_ABD = self.norm2(self.out(mixed_ABHd.flatten(-2)))
        inner_ABD = self.residual(y_ABD)
        inner_ABD = self.dropout(inner_ABD) if keep_BD is None else inner_ABD * keep_BD
        z_ABD: Tensor = self.norm3(y_ABD + inner_ABD)
        return z_ABD


class Increment(nn.Module):
    """ψ: cross-attention layers, each with the previous one's output as query, then Δ_ij = W_μ z + b_μ.

    Source: the paper's ψ, which has one layer; linear layers start at N(0, 0.02²) with zero biases, as in the
    released code, where they overwrite an identity start.
    """

    def __init__(self, width: int, heads: int, dropout: float, layers: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.layers = nn.ModuleList(IncrementLayer(width, heads, dropout) for _ in range(layers))
        self.mean = nn.Linear(width, width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @torch.no_grad()
    def start_at_zero(self) -> None:
        """Sets the output layer to zero: no increment, until it has learned one."""
        self.mean.weight.zero_()
        self.mean.bias.zero_()

    @property
    def first(self) -> IncrementLayer:
        """The first layer, the only one in the factorised form."""
        layer = self.layers[0]
        assert isinstance(layer, IncrementLayer)
        return layer

    def forward(
        self, query_ABD: Tensor, context_BCD: Tensor, mask_BC: Tensor, keep_BD: Tensor | None = None
    ) -> Tensor:
        """Computes ψ's outputs (A, B, D) for A queries to each of B contexts.

        Args:
            query_ABD: the query of every pair.
            context_BCD: frames of B videos, or words of B texts, to attend to.
            mask_BC: bool, true for real positions; padded ones get no attention.
            keep_BD: dropout of each context as factors, 0 or 1/(1 − p), shared by its queries; None, in
                training, for dropout drawn for each pair.
        """
        for layer in self.layers:
            query_ABD = layer(query_ABD, context_BCD, mask_BC, keep_BD)
        output_ABD: Tensor = self.mean(query_ABD)
        return output_ABD


class IncrementRadius(nn.Module):
    """Length of the increment if ψ's query is the text itself: R_ij = exp(b + Σ_f c_f t_i·v_jf).

    One learned number c_f per frame position, and b, all starting at 0; padded frames count 0.

    Source: the paper's Table 5.
    """

    def __init__(self, max_frames: int) -> None:
        super().__init__()
        self.coefficient = nn.Parameter(torch.zeros(max_frames))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, text_ND: Tensor, frames_MFD: Tensor, mask_MF: Tensor) -> Tensor:
        """Computes radii (N, M) of texts (N, D) and frame features (M, F, D) with their mask (M, F)."""
        products_MFN = torch.einsum("nd,mfd->mfn", text_ND, frames_MFD)
        return self.log_from_products(products_MFN, mask_MF).exp().T

    def log_from_products(self, products_MFN: Tensor, mask_MF: Tensor) -> Tensor:
        """Computes log R_ij (M, N) from t_i·v_jf."""
        weight_MF = self.coefficient[: mask_MF.shape[1]] * mask_MF
        return self.bias + torch.einsum("mfn,mf->mn", products_MFN, weight_MF)


def increments_towards(goal_MD: Tensor, start_NMD: Tensor, radius_NM: Tensor) -> Tensor:
    """Computes increments of given length from starts towards goals: R_ij·unit(v̄_j − t*_ij), (N, M, D)."""
    return radius_NM.unsqueeze(-1) * functional.normalize(goal_MD - start_NMD, dim=-1)
