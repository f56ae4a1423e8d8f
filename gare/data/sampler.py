"""The order in which training sees text-video pairs: a pure function of the seed and the epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gare.errors import DataError


def epoch_batches(
    num_captions: Sequence[int], *, batch_size: int, seed: int, epoch: int, captions_per_video: int = 0
) -> np.ndarray:
    """Global batches of one epoch.

    Pairs are shuffled over the whole data set; those that do not fill a last batch are left out of this
    epoch (others are in the next, whose order is another). Worker r of R takes columns r·b … (r+1)·b of each
    batch, so the batches do not depend on the number of workers.

    Args:
        num_captions: captions of each video, in the order of the manifest.
        batch_size: pairs in a global batch.
        seed: of the run.
        epoch: 0 for the first.
        captions_per_video: so many captions of each video, drawn anew each epoch; 0: all of them.

    Returns:
        (steps, batch_size, 2) int64: video and caption of each pair.

    Raises:
        DataError: where the pairs do not fill one batch.
    """
    rng = np.random.default_rng([seed, epoch])
    pairs = []
    for video, count in enumerate(num_captions):
        chosen = np.arange(count)
        if 0 < captions_per_video < count:
            chosen = rng.choice(count, captions_per_video, replace=False)
        pairs += [(video, caption) for caption in chosen]
    num_steps = len(pairs) // batch_size
    if num_steps == 0:
        raise DataError(
            f"{len(pairs)} text-video pairs do not fill a batch of {batch_size}",
            where="train split",
            accepted=f"train.batch_size of at most {len(pairs)}, or more videos",
        )
    order = rng.permutation(len(pairs))[: num_steps * batch_size]
    return np.array(pairs, dtype=np.int64)[order].reshape(num_steps, batch_size, 2)
