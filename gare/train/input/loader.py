"""Turning planned batches into arrays, in whatever process has the time.

M clips, F frames, H×W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gare.data.features import FeatureReader
from gare.data.frames import FrameReader


class ClipLoader:
    """Reads the clips of numbered batches from a frame store.

    Args:
        store: the frame store.
        batches: video ids of each batch.
    """

    def __init__(self, store: str, batches: Sequence[Sequence[str]]) -> None:
        self.reader = FrameReader(store)
        self.batches = batches

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        """``frames`` (M, F, H, W, 3) uint8 and ``frame_mask`` (M, F) bool of a batch."""
        frames, mask = self.reader.read(self.batches[number])
        return {"frames": frames, "frame_mask": mask}


class FeatureLoader:
    """Reads the clips and captions of numbered batches from a feature store.

    Args:
        reader: of the store.
        batches: video ids of each batch.
        captions: caption of each clip of each batch; none at all for a batch that wants all captions.
    """

    def __init__(
        self,
        reader: FeatureReader,
        batches: Sequence[Sequence[str]],
        captions: Sequence[Sequence[int]],
    ) -> None:
        self.reader = reader
        self.batches = batches
        self.captions = captions

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        """The arrays of ``FeatureReader.read`` for a batch."""
        captions = self.captions[number]
        return self.reader.read(self.batches[number], captions if len(captions) else None)
