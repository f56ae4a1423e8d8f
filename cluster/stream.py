"""Streaming batches through Ray Data, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cluster.resources import LOADER_CPUS
from cluster.session import quiet_data

#: Batches that one Ray task loads; each leaves the task as soon as it is there.
BATCHES_PER_BLOCK = 8


def stream(
    load: Callable[[], Callable[[int], dict[str, np.ndarray]]], numbers: range, *, actors: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Yields one batch a number, in order, loaded ahead by Ray Data actors.

    The order is that of the numbers whatever the actors do, so that a seed gives the same training again.

    Args:
        load: called once in each actor; what it returns turns a number into a batch, a mapping of arrays
            of equal length ≥ 1.
        numbers: of the batches.
        actors: loading actors.
    """
    if not numbers:
        return
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    quiet_data()
    DataContext.get_current().execution_options.preserve_order = True

    class Load:
        def __init__(self) -> None:
            self.load = load()

        def __call__(self, row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            number = int(row["item"][0])
            batch = self.load(number)
            return batch | {"batch_number": np.full(len(next(iter(batch.values()))), number)}

    # from_items makes its blocks here; a range would need tasks of a whole CPU each, which training holds.
    dataset = ray.data.from_items(list(numbers), override_num_blocks=-(-len(numbers) // BATCHES_PER_BLOCK))
    dataset = dataset.map_batches(
        Load,
        batch_size=1,
        num_cpus=LOADER_CPUS,
        compute=ActorPoolStrategy(size=actors),
    )
    # Ray may cut or join blocks where it likes; the numbers say where a batch ends.
    held: list[dict[str, np.ndarray]] = []
    for block in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2):
        numbers_here = block["batch_number"]
        edges = np.flatnonzero(np.diff(numbers_here)) + 1
        for start, stop in zip([0, *edges], [*edges, len(numbers_here)], strict=True):
            piece = {name: column[start:stop] for name, column in block.items()}
            if held and held[0]["batch_number"][0] != piece["batch_number"][0]:
                yield _join(held)
                held = []
            held.append(piece)
    if held:
        yield _join(held)


def _join(pieces: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
