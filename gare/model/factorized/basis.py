"""The part of the factorised increment that depends on the owner of the context alone.

The owner is the video whose frames, or the text whose words, ψ attends to. With one attention layer every
increment of an owner lies in the span of a few vectors that depend on the owner alone: Δ_ij = Σ_k w_ijk B_jk.
This module computes those vectors, and the small matrices for lengths and variances of their combinations.

Attention weights sum to 1, so everything is written as a difference from the increment of evenly spread
attention. The frames of a clip are much alike and its increments differ little between texts; in float32
those differences would otherwise be lost in the rounding of their common part.

O owners, C context positions, H heads, K = H·C attention weights of an owner, L basis vectors, D embedding
width. L is K + 3, and one more if ψ's query is the text itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from gare.model.factorized.quadratic_forms import Length, gram
from gare.model.increment import Increment
from gare.tensor_group import SHARED, TensorGroup


@dataclass(frozen=True, repr=False)
class Basis(TensorGroup):
    """The owners' part of the increments of all their pairs.

    Attributes:
        context: (O, C, D) LN1 of the context minus its mean over positions; the mean cancels in the softmax.
            Products with a query from ``queries_in_key_space`` are attention logits before the query's LN1
            scale. None for lean videos, which keep its inputs instead.
        own_logits: (O, K), the owner's part of the attention logits.
        offset: (O, K) κ⁰, added to scaled logits; −inf at padding.
        even: (O, K), attention that is spread evenly, 0 at padding.
        own_mean: (O,) mean over D of the owner's embedding.
        own_square: (O,) squared length of the owner's embedding without its mean.
        attended: LN2's deviation as a function of the change of attention.
        hidden: LN3's deviation as a function of that change and of the change of LN2's scale.
        aimed: the distance to v̄ as a function of all these changes, if ψ's query is the text itself; else
            None.
        spanning: (O, L, D) B: along each attention weight, along LN2's scale, along LN3's scale, along the
            distance to v̄ where there is one, and the increment of even attention. None where ``context`` is
            None.
        gram: (O, L, L) Gram matrix of B.
        heads: H.
        dropped: (O, L, D) vectors whose combination with a pair's coefficients is what ψ's dropout acts on,
            over LN3's deviation; None unless asked for.
    """

    context: Tensor | None
    own_logits: Tensor
    offset: Tensor
    even: Tensor
    own_mean: Tensor
    own_square: Tensor
    attended: Length
    hidden: Length
    aimed: Length | None
    spanning: Tensor | None
    gram: Tensor
    heads: int = field(metadata=SHARED)
    dropped: Tensor | None = None

    @property
    def vectors(self) -> Tensor:
        """The basis vectors B (O, L, D), for owners that keep them."""
        assert self.spanning is not None, "lean videos keep no basis vectors"
        return self.spanning


@dataclass(frozen=True)
class BasisMaps:
    """ψ's consecutive linear maps combined, once for all owners of a step.

    Attributes:
        attended: (H·D, D): LN1(c) ↦ P·O, by head.
        attended_bias: (D,) bias of P·O, of all heads together.
        offset: (H, D): LN1(c) ↦ κ⁰.
        hidden: (D, D): P·O ↦ U, or with dropout W_1(γ2⊙P·O), from which U is put together for each owner.
        whole: whether ``hidden`` gives U.
        to_vectors: (D, D): U ↦ B.
        constant: (D,) the last basis vector W_μ b3 + b_μ.
        residual_constant: (D,) W_1 b2 + b_1.
    """

    attended: Tensor
    attended_bias: Tensor
    offset: Tensor
    hidden: Tensor
    whole: bool
    to_vectors: Tensor
    constant: Tensor
    residual_constant: Tensor

    @classmethod
    def of(cls, increment: Increment, *, has_dropout: bool) -> BasisMaps:
        """Combines the maps of a ψ with one layer, in its parameters' precision, with or without dropout.

        Source: docs/design/factorized.md, points 1 to 4. P is the centring over D; it commutes into the maps.
        """
        layer, heads = increment.first, increment.heads
        width = layer.out.weight.shape[0]
        d_head = width // heads
        key_HdD, value_HdD = (
            torch.unflatten(linear.weight, 0, (heads, d_head)) for linear in (layer.key, layer.value)
        )
        # κ⁰ = (W_q b1 + b_q)·W_k LN1(c)/√d.
        asked_D = functional.linear(layer.norm1.bias, layer.query.weight, layer.query.bias) / math.sqrt(
            d_head
        )
        # P·O = P(W_o x + b_o) with x = W_v LN1(c) + b_v.
        out_DD = centred(layer.out.weight, dim=0)
        attended_HDD = torch.unflatten(out_DD, 1, (heads, d_head)).transpose(0, 1) @ value_HdD
        hidden_DD = layer.residual.weight * layer.norm2.weight
        if not has_dropout:
            hidden_DD = hidden_DD + torch.diag(layer.norm2.weight)
        # The keys' bias shifts all logits alike: its gradient must be zero, not None.
        no_effect = 0 * layer.key.bias.sum()
        return cls(
            attended_HDD.flatten(0, 1),
            out_DD @ layer.value.bias + centred(layer.out.bias),
            torch.einsum("hd,hde->he", torch.unflatten(asked_D, 0, (heads, d_head)), key_HdD),
            hidden_DD,
            not has_dropout,
            increment.mean.weight * layer.norm3.weight,
            functional.linear(layer.norm3.bias, increment.mean.weight, increment.mean.bias) + no_effect,
            functional.linear(layer.norm2.bias, layer.residual.weight, layer.residual.bias),
        )


def centred(values: Tensor, dim: int = -1) -> Tensor:
    """Applies P: subtracts the mean along a dimension."""
    return values - values.mean(dim, keepdim=True)


def queries_in_key_space(increment: Increment, query_XD: Tensor) -> Tensor:
    """Computes W_kᵀ W_q (γ1 ⊙ P x)/√d (H, X, D): products with LN1 of a context are attention logits.

    Multiplying the context by W_qᵀ W_k instead, as in the derivation, would take one more product with a D×D
    matrix for each position of each context.
    """
    layer, heads = increment.first, increment.heads
    asked_XD = functional.linear(centred(query_XD) * layer.norm1.weight, layer.query.weight)
    asked_HXd = torch.unflatten(asked_XD, 1, (heads, -1)).transpose(0, 1)
    asked_HXd = asked_HXd / math.sqrt(query_XD.shape[1] // heads)
    turned_HXD: Tensor = asked_HXd @ torch.unflatten(layer.key.weight, 0, (heads, -1))
    return turned_HXD


def build_basis(
    increment: Increment,
    maps: BasisMaps,
    context_OCD: Tensor,
    mask_OC: Tensor,
    own_OD: Tensor,
    *,
    own_sign: int,
    goal_OD: Tensor | None = None,
    keep_OD: Tensor | None = None,
    with_dropped: bool = False,
) -> Basis:
    """Computes the bases of O owners: three products with a D×D matrix for each context position and head.

    Args:
        increment: ψ, with one layer.
        maps: its combined maps.
        context_OCD: frames of videos or words of texts, anything at padding.
        mask_OC: bool, true for real positions.
        own_OD: the owner's embedding in the query.
        own_sign: sign of the owner's embedding in the query; 0 if the query does not contain it.
        goal_OD: v̄, if Δ points from ψ's output towards it.
        keep_OD: dropout of each owner as factors, 0 or 1/(1 − p); None for no dropout.
        with_dropped: whether ``Basis.dropped`` is wanted; not if Δ points towards v̄.

    Source: docs/design/factorized.md, points 1 to 4.
    """
    layer, heads = increment.first, increment.heads
    real_OC1 = mask_OC.unsqueeze(-1)
    even_OC1 = real_OC1 / real_OC1.sum(dim=1, keepdim=True).to(context_OCD.dtype)
    normed_OCD = layer.norm1(torch.where(real_OC1, context_OCD, 0))
    mean_O1D = even_OC1.transpose(1, 2) @ normed_OCD
    about_OCD = torch.where(real_OC1, normed_OCD - mean_O1D, 0)
    # In each of these the vectors of single attention weights come first, by head, and even attention last.
    attended_OKD, mean_O1D = (
        torch.unflatten(functional.linear(values, maps.attended), 2, (heads, -1)).transpose(1, 2)
        for values in (about_OCD, mean_O1D)
    )
    attended_OKD = torch.cat([attended_OKD.flatten(1, 2), mean_O1D.sum(dim=1) + maps.attended_bias], dim=1)
    attended = Length.deviation(attended_OKD)
    hidden_OKD = attended_OKD @ maps.hidden.T
    unmasked_OKD, constant = hidden_OKD, maps.residual_constant
    if keep_OD is not None:
        assert not maps.whole
        hidden_OKD = torch.addcmul(layer.norm2.weight * attended_OKD, hidden_OKD, keep_OD.unsqueeze(1))
        constant = constant * keep_OD
    # U along each attention weight and along LN2's scale, then that of even attention.
    along_OKD, mean_O1D = _but_last(hidden_OKD)
    second_O11 = attended.at_base.rsqrt().reshape(-1, 1, 1)
    base_O1D = second_O11 * mean_O1D + (layer.norm2.bias + constant).unsqueeze(-2)
    hidden_OKD = centred(torch.cat([along_OKD, mean_O1D, base_O1D], dim=1))
    hidden = Length.deviation(hidden_OKD)
    along_OKD, base_O1D = _but_last(hidden_OKD @ maps.to_vectors.T)
    even_O1D = hidden.at_base.rsqrt().reshape(-1, 1, 1) * base_O1D + maps.constant
    dropped = None
    if with_dropped:
        residual_OKD = unmasked_OKD - layer.norm2.weight * attended_OKD if maps.whole else unmasked_OKD
        first_O1D = second_O11 * residual_OKD[:, -1:] + maps.residual_constant
        parts = [residual_OKD, first_O1D, hidden.at_base.rsqrt().reshape(-1, 1, 1) * first_O1D]
        dropped = torch.cat(parts, dim=1)
    vectors, aimed = [along_OKD, base_O1D, even_O1D], None
    if goal_OD is not None:
        distance_O1D = goal_OD.unsqueeze(1) - even_O1D
        towards_OLD = torch.cat([-along_OKD, -base_O1D, distance_O1D], dim=1)
        aimed = Length.of(towards_OLD)
        vectors = [towards_OLD, aimed.at_base.rsqrt().reshape(-1, 1, 1) * distance_O1D]
    vectors_OLD = torch.cat(vectors, dim=1)
    offset_OCH = functional.linear(about_OCD, maps.offset).masked_fill(~real_OC1, -torch.inf)
    own_logits_OHC = torch.einsum("ocd,hod->ohc", about_OCD, queries_in_key_space(increment, own_OD))
    return Basis(
        context=about_OCD,
        own_logits=own_sign * own_logits_OHC.flatten(1),
        offset=offset_OCH.transpose(1, 2).flatten(1),
        even=even_OC1.squeeze(2).repeat(1, heads),
        own_mean=own_OD.mean(dim=1),
        own_square=centred(own_OD).square().sum(dim=1),
        attended=attended,
        hidden=hidden,
        aimed=aimed,
        spanning=vectors_OLD,
        gram=gram(vectors_OLD),
        heads=heads,
        dropped=dropped,
    )


def _but_last(vectors_OKD: Tensor) -> tuple[Tensor, Tensor]:
    """Splits off the last vector, (O, 1, D); a split's gradient needs no zeros."""
    others, last = torch.split(vectors_OKD, [vectors_OKD.shape[1] - 1, 1], dim=1)
    return others, last
