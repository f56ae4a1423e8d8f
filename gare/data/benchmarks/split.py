"""A seeded split for data without a split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from gare.errors import ConfigError


def split_by_video(
    ids: Iterable[str], *, seed: int, val_fraction: float, test_fraction: float
) -> dict[str, str]:
    """Assigns each id to train, val or test.

    The order is that of a hash of seed and id, so it depends neither on the order of the ids nor on the
    machine or library version, and a few more videos move only a few others to another split.

    Args:
        ids: one for each video file; clips of a file share it, so that no clip leaks into another split.
        seed: another one gives another split.
        val_fraction: share of val, rounded; at least one video if it is above 0 and there are three videos.
        test_fraction: the same for test.

    Raises:
        ConfigError: for fractions that leave no videos to train.
    """
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise ConfigError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} leave no videos to train",
            where="data",
            accepted="0 or more each, below 1 together",
        )
    order = order_by_hash(ids, seed=seed)
    sizes = []
    for fraction in (val_fraction, test_fraction):
        size = int(len(order) * fraction + 0.5)
        sizes.append(max(size, 1) if fraction > 0 and len(order) >= 3 else size)
    while sum(sizes) >= len(order) > 0:  # train keeps one
        sizes[sizes.index(max(sizes))] -= 1
    num_val, num_test = sizes
    names = ["val"] * num_val + ["test"] * num_test + ["train"] * (len(order) - num_val - num_test)
    return dict(zip(order, names, strict=True))


def order_by_hash(ids: Iterable[str], *, seed: int) -> list[str]:
    """Returns the distinct ids in an order that depends only on the seed and the ids."""
    return sorted(set(ids), key=lambda name: (_hash(seed, name), name))


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogateescape")).digest()
