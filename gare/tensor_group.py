"""Groups of tensors that are sliced, split, moved and joined together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import repeat
from typing import Any, Self

import torch
from torch import Tensor

_ROWS_DIM = "rows_dim"
#: Metadata of a field whose rows lie along its second dimension.
ROWS_SECOND: Mapping[str, Any] = {_ROWS_DIM: 1}
#: Metadata of a field that all rows share, which may be of any type: it is neither sliced nor split.
SHARED: Mapping[str, Any] = {_ROWS_DIM: None}


@dataclass(frozen=True, repr=False)
class TensorGroup:
    """Base of dataclasses that hold tensors with the same rows, such as one for each text.

    Subclasses are decorated like this class. A field is a tensor, another group, or None where a group goes
    without it. Rows lie along a tensor's first dimension, unless its field says otherwise::

        @dataclass(frozen=True, repr=False)
        class Queries(TensorGroup):
            vectors: Tensor                                 # (X, D)
            by_head: Tensor = field(metadata=ROWS_SECOND)   # (H, X, D)
            heads: int = field(metadata=SHARED)
    """

    def __len__(self) -> int:
        """Returns the number of rows.

        Raises:
            TypeError: for a group without any row, because all its fields are None or shared.
        """
        for name, dim in _rows_dims(type(self)):
            value = getattr(self, name)
            if value is not None and dim is not None:
                return len(value) if isinstance(value, TensorGroup) else int(value.shape[dim])
        raise TypeError(f"{type(self).__name__} holds no tensor with rows")

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """Selects rows of all fields, by a slice, or by indices or a mask (one-dimensional)."""
        values = []
        for name, dim in _rows_dims(type(self)):
            value = getattr(self, name)
            if value is not None and dim is not None:
                value = value[:, rows] if dim else value[rows]
            values.append(value)
        return type(self)(*values)

    def split(self, size: int) -> Iterator[Self]:
        """Splits into consecutive parts of ``size`` rows; gradients are concatenated once, not added up."""
        num_parts = max(-(-len(self) // size), 1)
        columns: list[Any] = []
        for name, dim in _rows_dims(type(self)):
            value = getattr(self, name)
            if value is None or dim is None:
                columns.append(repeat(value, num_parts))
            elif isinstance(value, TensorGroup):
                columns.append(value.split(size))
            else:
                columns.append(torch.split(value, size, dim=dim))
        kind = type(self)  # the parts must not keep the whole group alive
        return (kind(*part) for part in zip(*columns, strict=True))

    @classmethod
    def cat(cls, groups: Sequence[Self]) -> Self:
        """Concatenates the rows of one or more groups that have the same fields; a single one is returned."""
        if len(groups) == 1:
            return groups[0]
        joined: list[Any] = []
        for name, dim in _rows_dims(cls):
            values = [getattr(group, name) for group in groups]
            if dim is None or all(value is None for value in values):
                joined.append(values[0])
            elif isinstance(values[0], TensorGroup):
                joined.append(type(values[0]).cat(values))
            else:
                joined.append(torch.cat(values, dim=dim))
        return cls(*joined)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Applies a function to every tensor, also to those of nested groups and to shared ones."""
        values = []
        for name, _ in _rows_dims(type(self)):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                value = change(value)
            elif isinstance(value, TensorGroup):
                value = value.map(change)
            values.append(value)
        return type(self)(*values)

    def to(self, device: torch.device | str) -> Self:
        """Copies all tensors to a device; those that are there already stay."""
        return self.map(lambda tensor: tensor.to(device))

    def cast(self, dtype: torch.dtype) -> Self:
        """Casts all floating tensors; masks and indices stay."""
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def float(self) -> Self:
        """Casts all floating tensors to float32."""
        return self.cast(torch.float32)

    def detach(self) -> Self:
        """Cuts all tensors off from the graph that computed them."""
        return self.map(Tensor.detach)

    def tensors(self) -> Iterator[Tensor]:
        """Yields all tensors, field by field."""
        for name, _ in _rows_dims(type(self)):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, TensorGroup):
                yield from value.tensors()

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return next(self.tensors()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the floating tensors."""
        return next(tensor.dtype for tensor in self.tensors() if tensor.is_floating_point())

    def __repr__(self) -> str:
        """Lists dtypes, shapes and devices, never values."""
        devices = sorted({str(tensor.device) for tensor in self.tensors()})
        return f"{self._listed()} on {', '.join(devices)}"

    def _listed(self) -> str:
        listed = []
        for name, _ in _rows_dims(type(self)):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                text = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
            else:
                text = value._listed() if isinstance(value, TensorGroup) else repr(value)
            listed.append(f"{name}: {text}")
        return f"{type(self).__name__}({', '.join(listed)})"


#: Kept by class, since groups are sliced for every block of pairs.
_rows_dims_of: dict[type[TensorGroup], tuple[tuple[str, int | None], ...]] = {}


def _rows_dims(kind: type[TensorGroup]) -> tuple[tuple[str, int | None], ...]:
    """Lists a class's fields in order, each with the dimension of its rows; None for shared ones."""
    found = _rows_dims_of.get(kind)
    if found is None:
        found = tuple((field.name, field.metadata.get(_ROWS_DIM, 0)) for field in fields(kind))
        _rows_dims_of[kind] = found
    return found
