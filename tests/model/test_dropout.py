"""Dropout inside ψ: of each pair as the paper has it, or of each context."""

from __future__ import annotations

import pytest
import torch

from gare.model.increment import Increment


def test_dropout_of_each_pair_is_drawn_for_each_pair_and_dimension(seed: int) -> None:
    """Against the formula with masks that are read off: another one for every pair and dimension."""
    torch.manual_seed(seed)
    layer = Increment(64, 1, 0.3).first
    layer.train()
    masks: list[torch.Tensor] = []
    layer.dropout.register_forward_hook(lambda _, given, made: masks.append(made / given[0]))
    query_ABD, context_BCD = torch.randn(5, 3, 64), torch.randn(3, 4, 64)
    layer(query_ABD, context_BCD, torch.ones(3, 4, dtype=torch.bool), None)
    (mask_ABD,) = masks
    assert mask_ABD.shape == (5, 3, 64)
    kept = mask_ABD > 0
    torch.testing.assert_close(mask_ABD[kept], torch.full_like(mask_ABD[kept], 1 / 0.7))
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=0.07)
    rows = kept.reshape(15, 64)
    assert len({tuple(row.tolist()) for row in rows}) == 15


def test_what_dropout_does_to_the_bottleneck_at_the_start(seed: int) -> None:
    """Of texts that hardly differ σ_j is dropout's alone: 0.117 by pair, and next to nothing by context.

    These are the numbers by which the paper's settings take it by pair: the KL to N(0, 1) follows from σ_j.
    """
    torch.manual_seed(seed)
    psi = Increment(512, 1, 0.3)
    psi.train()
    with torch.no_grad():
        context_BCD = torch.randn(4, 12, 512)
        query_ABD = context_BCD.mean(dim=1) - torch.randn(512) + 0.01 * torch.randn(128, 4, 512)
        mask_BC = torch.ones(4, 12, dtype=torch.bool)
        keep_BD = (torch.rand(4, 512) >= 0.3).float() / 0.7
        by_pair = psi(query_ABD, context_BCD, mask_BC).std(dim=0).mean()
        by_context = psi(query_ABD, context_BCD, mask_BC, keep_BD).std(dim=0).mean()
    assert float(by_pair) == pytest.approx(0.117, rel=0.1)
    assert float(by_context) < 0.01
