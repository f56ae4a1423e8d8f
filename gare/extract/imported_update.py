"""The update of a feature store from imported features, which no towers of ours made.

M videos, F frames, C captions, D width of the store.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gare.config import Config
from gare.data.imported_features import ImportedFeatures, ImportedVideo
from gare.data.store.contents import IDENTITY, RULES
from gare.data.store.feature_schema import feature_schema, feature_table, imported_settings
from gare.data.store.parts import write_table
from gare.errors import DataError
from gare.extract.comparison import Comparison, WantedClip, compare_clips
from gare.extract.update import StoreUpdate

#: Tokens that each caption is said to have, its markers: there are no words.
NUM_TOKENS = 2


class ImportedStoreUpdate(StoreUpdate):
    """The update of a feature store to imported features.

    Args:
        config: of the run.
        imported: features that the store should hold.
        uri: the store.
        code_version: of this package.

    Raises:
        DataError: for a store of other arrays or settings, with each that differs.
    """

    kind = "features"

    def __init__(self, config: Config, imported: ImportedFeatures, uri: str, code_version: str) -> None:
        settings = imported_settings(config.model, imported.arrays_sha256(), imported.widths)
        try:
            super().__init__(config, imported.manifest, uri, settings, code_version)
        except DataError as error:
            accepted = "the same arrays, noise and sizes of the model, or another name for a second store"
            raise DataError(error.what, where=error.where, accepted=accepted) from error
        self._videos = {video.row.video_id: video for video in imported.videos}

    @property
    def schema(self) -> pa.Schema:
        """Columns of the store's data parts."""
        return feature_schema(self.config.model.max_frames, self.config.model.clip.embed_dim)

    @property
    def decodes(self) -> bool:
        """Always False: there are no videos."""
        return False

    def compare_with_collection(self) -> Comparison:
        """Compares the store with the imported videos and their captions."""
        wanted = [WantedClip.of(row) for row in self.manifest.rows]
        return compare_clips(self.uri, wanted, retry_failed=False, captions=True)

    def write_pending(self, comparison: Comparison) -> None:
        """Writes the videos that the store lacks, in parts of ``features.videos_per_part``.

        Raises:
            DataError: if a part cannot be written.
            GareError: if the store is no longer held; then nothing more is written.
        """
        ids, size = [row["video_id"] for row in comparison.pending], self.config.features.videos_per_part
        for first in range(0, len(ids), size):
            some = ids[first : first + size]
            table = feature_table([self._row(self._videos[video_id]) for video_id in some], self.schema)
            self.held.raise_if_lost()
            write_table(self.uri, "data", table, some, generation=self.held.generation)

    def _row(self, video: ImportedVideo) -> dict[str, Any]:
        model, row = self.config.model, video.row
        return {
            "video_id": row.video_id,
            "uri": row.uri,
            **dict.fromkeys(IDENTITY),
            "num_frames": len(video.frames),
            "frames": _padded(video.frames, model.max_frames, model.clip.embed_dim),
            "captions": list(row.captions),
            "num_tokens": [NUM_TOKENS] * len(row.captions),
            "text": _padded(video.captions, len(video.captions), model.clip.embed_dim),
            "rules": RULES,
        }


def _padded(features: npt.NDArray[np.float16], rows: int, width: int) -> npt.NDArray[np.float16]:
    """Pads features with zeros to (rows, width)."""
    missing = (rows - features.shape[0], width - features.shape[1])
    return np.pad(features, [(0, one) for one in missing])
