"""A cache of what was read last, bounded by number and by bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """The values that were asked for last; one is kept, however large it is.

    Args:
        make: makes the value of a key.
        size: returns the bytes of a value, which may grow while it is kept.
        most: most values that are kept.
        most_bytes: most bytes of all values together, but for the last one.
    """

    def __init__(
        self, make: Callable[[Key], Value], size: Callable[[Value], int], most: int, most_bytes: float
    ) -> None:
        self._make, self._size, self._most, self._most_bytes = make, size, most, most_bytes
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def __call__(self, key: Key) -> Value:
        """Returns the value of a key; makes it unless it is kept."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._make(key)
        total = self.num_bytes + self._size(value)
        while self._values and (len(self._values) >= self._most or total > self._most_bytes):
            _, oldest = self._values.popitem(last=False)
            total -= self._size(oldest)
        self._values[key] = value
        return value

    @property
    def num_bytes(self) -> int:
        """Bytes of all values that are kept."""
        return sum(self._size(value) for value in self._values.values())

    def __len__(self) -> int:
        return len(self._values)
