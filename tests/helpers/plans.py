"""Training plans with batches given by their videos."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gare.train.input.loader import WorkerBatches
from gare.train.input.plan import Plan, PlannedBatch


def listed(
    batches: Sequence[Sequence[str]], captions: Sequence[Sequence[int]] | None = None
) -> WorkerBatches:
    """Returns batches of videos as a worker's plan lists them, with the given captions or the first ones."""
    ids = sorted({video_id for batch in batches for video_id in batch})
    planned = tuple(
        PlannedBatch(
            "train",
            0,
            np.array([ids.index(video_id) for video_id in batch], np.int64),
            np.array(captions[number] if captions else [0] * len(batch), np.int64),
        )
        for number, batch in enumerate(batches)
    )
    return WorkerBatches(Plan(planned, (0,), len(planned)), {"train": ids, "val": []})
