"""Tests of groups of tensors, with a small group and with all groups of the house."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from gare.data.batch import Batch, FeatureBatch
from gare.model.factorized.basis import Basis
from gare.model.factorized.lean_video import FrameScales, MappedText
from gare.model.factorized.prepared import Embeddings, PreparedText, PreparedVideo
from gare.model.factorized.quadratic_forms import Length
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.scorer import PairScorer
from gare.tensor_group import ROWS_SECOND, SHARED, TensorGroup
from tests.helpers.heads import features, head
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_feature_batch

#: Rows of each group.
ROWS = 7


@dataclass(frozen=True, repr=False)
class Inner(TensorGroup):
    numbers: Tensor
    absent: Tensor | None = None


@dataclass(frozen=True, repr=False)
class Outer(TensorGroup):
    """A group with a field of every kind; its first field has no rows."""

    absent: Tensor | None
    shared: Tensor = field(metadata=SHARED)
    heads: int = field(metadata=SHARED)
    by_head: Tensor = field(metadata=ROWS_SECOND)
    vectors: Tensor
    mask: Tensor
    inner: Inner
    no_inner: Inner | None


def outer(*, rows: int = ROWS, gradient: bool = False) -> Outer:
    by_head, vectors = torch.randn(2, rows, 3), torch.randn(rows, 4)
    if gradient:
        by_head.requires_grad_()
        vectors.requires_grad_()
    return Outer(
        None, torch.randn(5), 2, by_head, vectors, torch.rand(rows) > 0.5, Inner(torch.randn(rows)), None
    )


def groups(rng: np.random.Generator) -> Iterator[TensorGroup]:
    """Builds groups of every kind in the house, of ``ROWS`` rows each."""
    config = tiny_config(f"train.batch_size={ROWS}")
    text, video = features(ROWS, ROWS, 3, 4, 16, torch.float32)
    yield from (text, video, tiny_batch(config, rng), tiny_feature_batch(config, rng))
    with torch.no_grad():
        for settings in ({}, {"context": "words"}, {"query": "text"}, {"increment": False}):
            yield from _prepared(head(16, dtype=torch.float32, **settings).scorer, text, video)


def _prepared(scorer: PairScorer, text: TextFeatures, video: VideoFeatures) -> Iterator[TensorGroup]:
    maps = scorer.basis_maps()
    for lean in (False, True) if scorer.context_of == "video" else (False,):
        yield scorer.prepare_video(video, lean=lean)
        yield scorer.query_embeddings(text.embedding, lean=lean)
    if scorer.context_of == "text" and maps is not None:
        yield scorer.prepare_text(text, maps, None)


@pytest.fixture
def house(seed: int, rng: np.random.Generator) -> list[TensorGroup]:
    torch.manual_seed(seed)
    return list(groups(rng))


@pytest.fixture
def group(seed: int) -> Outer:
    torch.manual_seed(seed)
    return outer()


@pytest.mark.parametrize("rows", [slice(2, 5), torch.tensor([6, 0, 0]), torch.arange(ROWS) % 2 == 0])
def test_rows_are_selected_in_all_fields(group: Outer, rows: slice | Tensor) -> None:
    """Else a text would be scored with another text's mask or statistics."""
    some = group[rows]
    assert torch.equal(some.by_head, group.by_head[:, rows])
    assert torch.equal(some.vectors, group.vectors[rows])
    assert torch.equal(some.mask, group.mask[rows])
    assert torch.equal(some.inner.numbers, group.inner.numbers[rows])
    assert some.shared is group.shared
    assert (some.heads, some.absent, some.no_inner, some.inner.absent) == (2, None, None, None)
    assert len(some) == len(some.vectors)


@pytest.mark.parametrize("size", [1, 3, ROWS, 100])
def test_parts_are_the_rows_in_order(group: Outer, size: int) -> None:
    """Else blocks of scores would land in the wrong rows."""
    parts = list(group.split(size))
    assert [len(part) for part in parts] == [min(size, ROWS - first) for first in range(0, ROWS, size)]
    for number, part in enumerate(parts):
        expected = group[number * size : (number + 1) * size]
        for found, right in zip(part.tensors(), expected.tensors(), strict=True):
            assert torch.equal(found, right)
        assert part.heads == group.heads


def test_parts_give_the_gradient_of_the_whole(seed: int) -> None:
    """Blocks are recomputed one by one in the backward: their gradients must be those of the batch."""
    torch.manual_seed(seed)
    whole = outer(gradient=True)
    leaves = [whole.by_head, whole.vectors]

    def gradients(some: list[Outer]) -> tuple[Tensor, ...]:
        total = sum((one.by_head.square().sum() + one.vectors.exp().sum() for one in some), torch.zeros(()))
        return torch.autograd.grad(total, leaves)

    for found, right in zip(gradients(list(whole.split(3))), gradients([whole]), strict=True):
        torch.testing.assert_close(found, right)


def test_parts_are_joined_again(group: Outer) -> None:
    """Features of micro-batches would else differ from those of the batch."""
    joined = Outer.cat(list(group.split(2)))
    for found, right in zip(joined.tensors(), group.tensors(), strict=True):
        assert torch.equal(found, right)
    assert joined.heads == group.heads
    assert Outer.cat([group]) is group, "a copy would cost the memory of the features again"


def test_an_empty_group_has_one_empty_part(seed: int) -> None:
    """A worker without clips goes the same way as the others."""
    torch.manual_seed(seed)
    (part,) = outer(rows=0).split(4)
    assert len(part) == 0


def test_all_tensors_change_together(group: Outer) -> None:
    """A tensor that stayed behind would fail the step on a GPU, or keep a graph alive."""
    moved = group.to("meta")
    assert {tensor.device.type for tensor in moved.tensors()} == {"meta"}
    double = group.cast(torch.float64)
    kinds = {torch.bool, torch.float64}
    assert {tensor.dtype for tensor in double.tensors()} == kinds
    assert {tensor.dtype for tensor in double.float().tensors()} == {torch.bool, torch.float32}
    assert (double.dtype, double.device, moved.device) == (
        torch.float64,
        torch.device("cpu"),
        torch.device("meta"),
    )
    assert group.to("cpu").vectors is group.vectors, "what is there already is not copied"
    assert not any(tensor.requires_grad for tensor in outer(gradient=True).detach().tensors())


def test_what_is_printed_are_shapes() -> None:
    """A group in a traceback or notebook would else print its tensors, page after page."""
    group = Outer(
        None,
        torch.zeros(5),
        2,
        torch.zeros(2, 3, 4),
        torch.zeros(3, 8),
        torch.ones(3).bool(),
        Inner(torch.zeros(3)),
        None,
    )
    assert repr(group) == (
        "Outer(absent: None, shared: float32 (5,), heads: 2, by_head: float32 (2, 3, 4), "
        "vectors: float32 (3, 8), mask: bool (3,), inner: Inner(numbers: float32 (3,), absent: None), "
        "no_inner: None) on cpu"
    )


def test_a_group_without_rows_says_so() -> None:
    """Else it would look like one with no rows, and be skipped."""
    with pytest.raises(TypeError, match="Inner holds no tensor with rows"):
        len(Inner(None))  # type: ignore[arg-type]


def test_every_group_of_the_house_is_sliced_and_split(house: list[TensorGroup]) -> None:
    """A field whose rows lie elsewhere than it says gives wrong scores in blocks alone."""
    kinds = {type(inner) for group in house for inner in _with_inner(group)}
    assert kinds == {
        *(Batch, FeatureBatch, TextFeatures, VideoFeatures, Embeddings, PreparedText, PreparedVideo),
        *(Basis, FrameScales, Length, MappedText),
    }
    for group in house:
        assert len(group) == ROWS
        parts = list(group.split(3))
        assert [len(part) for part in parts] == [3, 3, 1]
        for found, right in zip(type(group).cat(parts).tensors(), group.tensors(), strict=True):
            assert torch.equal(found, right)
        for part, rows in zip(parts, (slice(0, 3), slice(3, 6), slice(6, 7)), strict=True):
            for found, right in zip(part.tensors(), group[rows].tensors(), strict=True):
                assert torch.equal(found, right)
            for tensor in part.tensors():
                assert len(part) in tensor.shape[:2], group


def _with_inner(group: TensorGroup) -> Iterator[TensorGroup]:
    yield group
    for value in vars(group).values():
        if isinstance(value, TensorGroup):
            yield from _with_inner(value)


def test_every_group_of_the_house_is_declared_alike() -> None:
    """A class decorated otherwise prints its tensors, or can be changed under whoever shares it."""
    kinds = [kind for kind in TensorGroup.__subclasses__() if kind.__module__.startswith("gare.")]
    assert len(kinds) >= 11
    for kind in kinds:
        assert kind.__repr__ is TensorGroup.__repr__, f"{kind} needs @dataclass(frozen=True, repr=False)"
    with pytest.raises(FrozenInstanceError):
        Inner(torch.zeros(1)).numbers = torch.ones(1)  # type: ignore[misc]
