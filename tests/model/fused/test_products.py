"""Large products at a stated precision."""

from __future__ import annotations

import torch

from gare.model.products import product, round_to_tf32, split_factors


def test_split_factors_have_float32s_errors(seed: int) -> None:
    """Scores of three TF32 products are called exact; a wrong split would leave TF32's errors in them."""
    torch.manual_seed(seed)
    a_XD, b_DY = torch.randn(40, 512), torch.randn(512, 50)
    right = a_XD.double() @ b_DY.double()
    left, across = split_factors(a_XD, b_DY)
    # As tensor cores do it: operands in TF32, sums in float32 or better.
    split = round_to_tf32(left).double() @ round_to_tf32(across).double()
    single = round_to_tf32(a_XD).double() @ round_to_tf32(b_DY).double()
    size = float(right.abs().max())
    assert float((split - right).abs().max()) / size < 5e-7
    assert float((single - right).abs().max()) / size > 5e-5


def test_tf32_holds_what_it_is_given(seed: int) -> None:
    """What is called exact must be so in the tensor core: 10 bits behind the point, the nearest of them."""
    torch.manual_seed(seed)
    values = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1.0, 1 + 2**-10, 1 + 2**-12])])
    rounded = round_to_tf32(values)
    assert torch.equal(round_to_tf32(rounded), rounded)
    assert float(((rounded - values) / values.where(values != 0, torch.ones(()))).abs().max()) <= 2**-11
    assert rounded[-1] == 1


def test_products_on_a_cpu_are_exact(seed: int) -> None:
    """A CPU has no cheaper ones, and training there must not become less exact by a setting for GPUs."""
    torch.manual_seed(seed)
    a_XD, b_YD = torch.randn(5, 8, requires_grad=True), torch.randn(7, 8)
    for precision in ("exact", "tf32", "bf16"):
        found = product(a_XD, b_YD, precision)
        assert torch.equal(found, a_XD @ b_YD.T)
