"""Faults in data, collected by kind and raised together."""

from __future__ import annotations

from collections.abc import Iterable

from gare.errors import DataError

#: Number of faults of a kind that are written out; the rest are counted.
SHOWN = 10


def join_first(items: Iterable[str]) -> str:
    """Joins the first ten items, and the number of further ones, into one line."""
    items = list(items)
    more = f" … and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return "; ".join(items[:SHOWN]) + more


class CollectedErrors:
    """A collection of faults by kind, in the order in which kinds first occur."""

    def __init__(self) -> None:
        self._by_kind: dict[str, list[str]] = {}

    def add(self, kind: str, item: str) -> None:
        """Adds one fault: its kind, and the row, id or file, as a person would look it up."""
        self._by_kind.setdefault(kind, []).append(item)

    def update(self, other: CollectedErrors) -> None:
        """Takes over all faults of another collection."""
        for kind, items in other._by_kind.items():
            self._by_kind.setdefault(kind, []).extend(items)

    def __len__(self) -> int:
        return sum(len(items) for items in self._by_kind.values())

    def raise_if_any(self, where: str, *, accepted: str = "") -> None:
        """Raises all faults as one error.

        Raises:
            DataError: if there is any fault; each kind with its count and its first ten.
        """
        if not self._by_kind:
            return
        lines = [f"{kind} ({len(items)}): {join_first(items)}" for kind, items in self._by_kind.items()]
        what = (
            lines[0] if len(lines) == 1 else "several faults:\n" + "\n".join(f"  - {line}" for line in lines)
        )
        raise DataError(what, where=where, accepted=accepted)
