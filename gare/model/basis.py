"""The part of the factorised increment that belongs to the owner of the context alone.

With one attention layer every increment of an owner, the video whose frames or the text whose words ψ attends
to, lies in the span of a few vectors that depend on the owner alone: Δ_ij = Σ_k w_ijk B_jk. This module makes
those vectors, and the small matrices that lengths and variances of their combinations need.

Attention weights sum to 1, so everything is written about the mean of the owner's context: frames of a clip are
much alike and increments differ little between texts, and in float32 those differences would otherwise drown
in the rounding of what they have in common.

O owners, C context positions, H heads, K = H·C attention weights of an owner, L basis vectors, D embedding
width. L is K + 3, and one more where ψ is asked with the text itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gare.model.increment import Increment


@dataclass(frozen=True)
class Basis:
    """What owners contribute to the increments of all their pairs.

    Attributes:
        keys: (O, K, D) κ less its mean over positions, which no softmax sees: ⟨x, κ⟩ is the other side's part of
            an attention logit before its LN1 scale.
        own_logits: (O, K), the owner's part of the same.
        offset: (O, K) κ⁰, added to scaled logits; −inf at padding.
        even: (O, K), attention that is spread evenly, 0 at padding.
        own_mean: (O,) mean over D of the owner's embedding.
        own_square: (O,) squared length of the owner's embedding without its mean.
        attended_gram: (O, K + 1, K + 1) Gram matrix of the centred outputs of the attention, about their mean
            and the mean itself.
        hidden_gram: (O, K + 2, K + 2) Gram matrix of the centred inputs of LN3, and of their constant.
        vectors: (O, L, D) B.
        gram: (O, L, L) Gram matrix of B.
        heads: H.
    """

    keys: Tensor
    own_logits: Tensor
    offset: Tensor
    even: Tensor
    own_mean: Tensor
    own_square: Tensor
    attended_gram: Tensor
    hidden_gram: Tensor
    vectors: Tensor
    gram: Tensor
    heads: int

    def __getitem__(self, owners: slice) -> Basis:
        return Basis(*(tensor[owners] for tensor in self._tensors()), heads=self.heads)

    def split(self, size: int) -> Iterator[Basis]:
        """Consecutive parts of ``size`` owners, whose gradients are joined once and not added up."""
        parts = zip(*(tensor.split(size) for tensor in self._tensors()), strict=True)
        return (Basis(*part, heads=self.heads) for part in parts)

    def _tensors(self) -> list[Tensor]:
        return [value for value in vars(self).values() if isinstance(value, Tensor)]


@dataclass(frozen=True)
class BasisMaps:
    """ψ's consecutive linear maps combined, once for all owners of a step.

    Attributes:
        from_context: (3·H·D, D): LN1(c) ↦ κ, P·O and W_1(γ2⊙P·O), each by head.
        offset: (H, D): LN1(c) ↦ κ⁰.
        attended_bias: (D,) of P·O, of all heads together.
        residual_bias: (D,) of W_1(γ2⊙P·O).
        to_vectors: (D, D): U ↦ B.
        constant: (D,) the last basis vector W_μ b3 + b_μ.
        residual_constant: (D,) W_1 b2 + b_1.
    """

    from_context: Tensor
    offset: Tensor
    attended_bias: Tensor
    residual_bias: Tensor
    to_vectors: Tensor
    constant: Tensor
    residual_constant: Tensor

    @classmethod
    def of(cls, increment: Increment) -> BasisMaps:
        """The maps of a ψ with one layer, in its parameters' precision.

        Source: factorised derivation, points 1 to 4. P is the centring over D; it commutes into the maps.
        """
        layer, heads = increment.layers[0], increment.heads
        width = layer.out.weight.shape[0]
        d_head = width // heads
        query_HdD, key_HdD, value_HdD = (
            linear.weight.unflatten(0, (heads, d_head)) for linear in (layer.query, layer.key, layer.value)
        )
        # κ = P(γ1 ⊙ W_qᵀ k)/√d and κ⁰ = (W_q b1 + b_q)·k/√d with k = W_k LN1(c); b_k shifts all alike.
        scale = 1 / math.sqrt(d_head)
        turned_HDd = scale * centred(layer.norm1.weight[:, None] * query_HdD.transpose(1, 2), dim=1)
        asked_d = functional.linear(layer.norm1.bias, layer.query.weight, layer.query.bias)
        asked_Hd = scale * asked_d.unflatten(0, (heads, d_head))
        # P·O = P(W_o x + b_o) with x = W_v LN1(c) + b_v.
        out_DD = centred(layer.out.weight, dim=0)
        attended_HDD = out_DD.unflatten(1, (heads, d_head)).transpose(0, 1) @ value_HdD
        attended_bias = out_DD @ layer.value.bias + centred(layer.out.bias)
        residual_DD = layer.residual.weight * layer.norm2.weight
        # The keys' bias has no effect and so a gradient of zero, not none.
        no_effect = 0 * layer.key.bias.sum()
        maps = (turned_HDd @ key_HdD, attended_HDD, residual_DD @ attended_HDD)
        return cls(
            torch.cat([weight.flatten(0, 1) for weight in maps]),
            torch.einsum("hd,hde->he", asked_Hd, key_HdD),
            attended_bias,
            residual_DD @ attended_bias,
            centred(increment.mean.weight * layer.norm3.weight, dim=1),
            functional.linear(layer.norm3.bias, increment.mean.weight, increment.mean.bias) + no_effect,
            functional.linear(layer.norm2.bias, layer.residual.weight, layer.residual.bias),
        )


def centred(values: Tensor, dim: int = -1) -> Tensor:
    """P: values minus their mean along a dimension."""
    return values - values.mean(dim, keepdim=True)


def build_basis(
    increment: Increment,
    maps: BasisMaps,
    context_OCD: Tensor,
    mask_OC: Tensor,
    own_OD: Tensor,
    *,
    own_sign: int,
    other_sign: int,
    goal_OD: Tensor | None = None,
    keep_OD: Tensor | None = None,
) -> Basis:
    """The bases of O owners: four products with a D×D matrix for each context position and head.

    Args:
        increment: ψ, with one layer.
        maps: its combined maps.
        context_OCD: frames of videos or words of texts, anything at padding.
        mask_OC: bool, true for real positions.
        own_OD: the owner's embedding in the query own_sign·own + other_sign·other.
        own_sign: 1, −1, or 0 where the query has no part of the owner.
        other_sign: 1 or −1.
        goal_OD: v̄ where Δ points from ψ's output towards it; it becomes the last basis vector.
        keep_OD: dropout of each owner as factors, 0 or 1/(1 − p); None: no dropout.

    Source: factorised derivation, points 1 to 4.
    """
    layer, heads = increment.layers[0], increment.heads
    num_owners, num_positions, width = context_OCD.shape
    real_OC1 = mask_OC.unsqueeze(-1)
    even_OC1 = real_OC1 / real_OC1.sum(dim=1, keepdim=True).to(context_OCD.dtype)
    normed_OCD = layer.norm1(torch.where(real_OC1, context_OCD, 0))
    mean_O1D = (even_OC1 * normed_OCD).sum(dim=1, keepdim=True)
    about_OCD = torch.where(real_OC1, normed_OCD - mean_O1D, 0)
    mapped = functional.linear(torch.cat([about_OCD, mean_O1D], dim=1), maps.from_context)
    mapped = mapped.unflatten(2, (3, heads, width))
    # (O, C, 3, H, D) → three of (O, H·C, D).
    keys, attended, residual = mapped[:, :num_positions].permute(2, 0, 3, 1, 4).flatten(2, 3)
    _, mean_attended, mean_residual = mapped[:, num_positions].sum(dim=2).unsqueeze(2).unbind(1)
    attended = torch.cat([attended, mean_attended + maps.attended_bias], dim=1)
    residual = torch.cat([residual, mean_residual + maps.residual_bias], dim=1)
    constant = maps.residual_constant
    if keep_OD is not None:
        residual = residual * keep_OD.unsqueeze(1)
        constant = constant * keep_OD
    constant_OD = (layer.norm2.bias + constant).expand(num_owners, width)
    hidden = torch.cat([layer.norm2.weight * attended + residual, constant_OD.unsqueeze(1)], dim=1)
    vectors = [hidden @ maps.to_vectors.T, maps.constant.expand(num_owners, 1, width)]
    if goal_OD is not None:
        vectors.append(goal_OD.unsqueeze(1))
    vectors_OLD = torch.cat(vectors, dim=1)
    offset_OCH = functional.linear(about_OCD, maps.offset).masked_fill(~real_OC1, -torch.inf)
    return Basis(
        keys=other_sign * keys,
        own_logits=own_sign * torch.einsum("okd,od->ok", keys, own_OD),
        offset=offset_OCH.transpose(1, 2).flatten(1),
        even=even_OC1.squeeze(2).repeat(1, heads),
        own_mean=own_OD.mean(dim=1),
        own_square=centred(own_OD).square().sum(dim=1),
        attended_gram=_gram(attended),
        hidden_gram=_gram(centred(hidden)),
        vectors=vectors_OLD,
        gram=_gram(vectors_OLD),
        heads=heads,
    )


def _gram(vectors: Tensor) -> Tensor:
    return vectors @ vectors.transpose(-1, -2)
