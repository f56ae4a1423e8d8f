"""The scores of a run's checkpoints on a split: a curve for inspection, not for choosing a checkpoint.

N texts, M videos, F frames, D embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from gare.data.manifest import ManifestRow
from gare.data.store.feature_reader import FeatureReader
from gare.data.store.frame_reader import FrameReader
from gare.errors import CheckpointError, DataError
from gare.model.gare import GARE
from gare.retrieval.ranking.encode import (
    CAPTIONS,
    Encoder,
    encode_stored,
    encoding_tasks,
    join_encoded,
    text_of,
    video_of,
)
from gare.retrieval.ranking.ranks import rank_split
from gare.retrieval.results.queries import owners_of
from gare.train.checkpoint.files import load_checkpoint, read_config
from gare.train.checkpoint.index import Entry
from gare.train.checkpoint.initial_model import read_initial_model

logger = logging.getLogger(__name__)

#: Metric by which the best checkpoint of the curve is found.
CURVE_METRIC = "t2v/R1"


def last_of_each_step(entries: Iterable[Entry]) -> list[Entry]:
    """Keeps the last checkpoint of each step: those of one step have the same weights.

    A step that ends an epoch may have two, before its validation and after it; training chooses among these.

    Args:
        entries: in the order of the training.
    """
    return list({entry.step: entry for entry in entries}.values())


@dataclass(frozen=True)
class CheckpointScore:
    """The scores of one checkpoint.

    Attributes:
        metrics: by name, such as ``t2v/R1``; empty if it could not be scored.
        fault: reason why it has none.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    fault: str = ""


class CheckpointScorer:
    """Scorer of one run's checkpoints on one split; this process alone reads, encodes and ranks each.

    Args:
        store: a store of the kind that the run learned from.
        rows: the split.
        from_features: True if that is a feature store; the run's checkpoints then have no towers.
        cache_mb: MB of features that may be kept in memory.
        device: where to compute.
        sums: by checkpoint, the SHA-256 of its files in the run's index; empty if it has none.
    """

    def __init__(
        self,
        store: str,
        rows: Sequence[ManifestRow],
        *,
        from_features: bool,
        cache_mb: float = 0,
        device: str = "cpu",
        sums: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self.store, self.rows, self.from_features = store, rows, from_features
        self.cache_mb, self.device, self.sums = cache_mb, device, sums or {}
        self._reader: FeatureReader | None = None

    def score(self, uri: str) -> CheckpointScore:
        """Scores a checkpoint; the result has a fault if it cannot be read or a score is not finite.

        Raises:
            DataError: for clips that cannot be read.
        """
        try:
            model = self._load(uri)
        except (CheckpointError, DataError) as error:
            return CheckpointScore(fault=str(error))
        arrays = self._encode(model)
        text, video = text_of(arrays, device=self.device), video_of(arrays, self.device)
        try:
            return CheckpointScore(rank_split(model, text, video, owners_of(self.rows)).metrics())
        except DataError as error:
            return CheckpointScore(fault=str(error))

    def _load(self, uri: str) -> GARE:
        sums = self.sums.get(uri)
        if self.from_features:
            model = read_initial_model(uri, read_config(uri).model, sums=sums)
        else:
            model = load_checkpoint(uri, sums=sums)
        return model.to(self.device).eval()

    def _encode(self, model: GARE) -> dict[str, np.ndarray]:
        ids = [row.video_id for row in self.rows]
        if self.from_features:
            return encode_stored(model, self._features(model), ids, batch=CAPTIONS, device=self.device)
        encoder = Encoder(model, self.store, self.device)
        encoder.reader = self._frames
        captions = [caption for row in self.rows for caption in row.captions]
        tasks = encoding_tasks(ids, captions)
        results = (getattr(encoder, method)(items) for _, method, items in tasks)
        return join_encoded((name for name, *_ in tasks), results)

    @cached_property
    def _frames(self) -> FrameReader:
        return FrameReader(self.store)

    def _features(self, model: GARE) -> FeatureReader:
        """Returns the store, opened for the first checkpoint: those of one run need the same settings."""
        if self._reader is None:
            self._reader = FeatureReader(self.store, words=model.scorer.needs_words, cache_mb=self.cache_mb)
        return self._reader


@dataclass(frozen=True)
class Curve:
    """Scores of a run's checkpoints, in the order of the training.

    Attributes:
        rows: one per checkpoint, in the order of the training, as in ``curve.json``.
        left_out: names of checkpoints without scores, with the reason.
        validated: True if val chose the run's checkpoint; otherwise it is the last one.
    """

    rows: tuple[dict[str, Any], ...]
    left_out: Mapping[str, str]
    validated: bool

    @classmethod
    def of(
        cls, scored: Sequence[tuple[Entry, CheckpointScore]], chosen: Entry | None, *, validated: bool
    ) -> Curve:
        """Joins the scores of checkpoints.

        Args:
            scored: checkpoints and their scores, in the order of the training.
            chosen: the checkpoint that training chose.
            validated: True if val chose it.
        """
        seen = [(entry, score.metrics) for entry, score in scored if not score.fault]
        best = max(seen, key=lambda one: one[1][CURVE_METRIC], default=(None, {}))[0]
        rows = tuple(
            {
                "checkpoint": entry.name,
                "step": entry.step,
                "epoch": entry.epoch,
                "is_chosen": entry == chosen,
                "is_best_of_the_looks": entry is best,
                "metrics": dict(metrics),
            }
            for entry, metrics in seen
        )
        left_out = {entry.name: score.fault for entry, score in scored if score.fault}
        return cls(rows, left_out, validated)

    @property
    def chosen(self) -> dict[str, Any] | None:
        """The row of the checkpoint that training chose; None if it could not be scored."""
        return next((row for row in self.rows if row["is_chosen"]), None)

    @property
    def best(self) -> dict[str, Any]:
        """The row with the highest text → video R@1, the first of equals."""
        return next(row for row in self.rows if row["is_best_of_the_looks"])

    @property
    def note(self) -> str:
        """The sentence that must stand beside the curve."""
        reported = "checkpoint chosen on val" if self.validated else "last one, which test did not choose"
        return f"the best of {len(self.rows)} looks at test is not a result: report the {reported}"

    def points(self, metric: str) -> list[tuple[int, float]]:
        """Returns the (step, value) points of a metric."""
        return [(row["step"], row["metrics"][metric]) for row in self.rows]
