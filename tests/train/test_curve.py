"""The test curve: each checkpoint is scored as evaluation would, and a damaged one stops nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gare.config import Config
from gare.data.manifest import ManifestRow
from gare.data.store.feature_reader import FeatureReader
from gare.model.gare import GARE
from gare.retrieval.ranking.encode import Encoder, encode_stored, text_of, video_of
from gare.retrieval.ranking.metrics import retrieval_metrics
from gare.retrieval.ranking.scoring import score_split
from gare.retrieval.results.queries import owners_of
from gare.train.checkpoint.files import MODEL, load_checkpoint, save_checkpoint
from gare.train.checkpoint.index import Entry
from gare.train.curve import CheckpointScore, CheckpointScorer, Curve, last_of_each_step
from gare.train.step import build_learner
from tests.helpers.features import write_feature_store
from tests.helpers.stores import write_store
from tests.helpers.tiny import tiny_config

IDS = [f"v{number}" for number in range(7)]
# The tokenizer's own vocabulary, for captions are words here.
WHOLE = ("model.clip.vocab_size=49408", "model.max_words=16")


def saved(config: Config, uri: Path, seed: int, *, towers: bool = True) -> GARE:
    """A checkpoint as training writes it, without towers where it learned from features."""
    torch.manual_seed(seed)
    model = GARE(config.model, towers=towers)
    save_checkpoint(str(uri), build_learner(model, config, 4, torch.device("cpu")), 1)
    return model.eval()


def test_checkpoints_of_frames_are_scored_as_evaluation_scores_them(
    tmp_path: Path, rng: np.random.Generator, seed: int
) -> None:
    """A curve by another rule than the score that is reported would not pass through that score."""
    config = tiny_config(*WHOLE)
    store = str(tmp_path / "frames")
    write_store(store, config.extract, IDS, rng)
    captions = [tuple(f"{one} number {at}" for at in range(int(rng.integers(1, 4)))) for one in IDS]
    rows = [
        ManifestRow(one, "/x.mp4", None, None, "test", texts)
        for one, texts in zip(IDS, captions, strict=True)
    ]
    scorer = CheckpointScorer(store, rows, from_features=False)
    for number in range(2):
        uri = tmp_path / f"checkpoint-{number}"
        saved(config, uri, seed + number)
        encoder = Encoder(load_checkpoint(uri), store)
        clips, texts = encoder.clips(IDS), encoder.captions([text for one in captions for text in one])
        arrays = {f"video/{name}": array for name, array in clips.items()}
        arrays |= {f"text/{name}": array for name, array in texts.items()}
        scores = score_split(encoder.model, text_of(arrays), video_of(arrays))
        look = scorer.score(str(uri))
        assert look.fault == ""
        assert look.metrics == pytest.approx(retrieval_metrics(scores, owners_of(rows)))


def test_checkpoints_without_towers_are_scored_from_features(
    tmp_path: Path, rng: np.random.Generator, seed: int
) -> None:
    """The checkpoints of a run on features have no towers, and must not be lost to the curve for it."""
    config = tiny_config("train.input=features", "features.words=true", "model.context=words")
    store = str(tmp_path / "features")
    stored = write_feature_store(store, config, IDS, rng)
    rows = [ManifestRow(one, "/x.mp4", None, None, "test", tuple(stored[one]["captions"])) for one in stored]
    uri = tmp_path / "checkpoint"
    model = saved(config, uri, seed, towers=False)
    scorer = CheckpointScorer(store, rows, from_features=True, cache_mb=100)
    arrays = encode_stored(model, FeatureReader(store, words=True, cache_mb=100), IDS, batch=2)
    scores = score_split(model, text_of(arrays), video_of(arrays))
    assert scorer.score(str(uri)).metrics == pytest.approx(retrieval_metrics(scores, owners_of(rows)))


def test_a_damaged_checkpoint_is_a_fault_and_no_end(
    tmp_path: Path, rng: np.random.Generator, seed: int
) -> None:
    """One bad file of fifty must not cost the curve, nor pass for a score."""
    config = tiny_config("train.input=features")
    store = str(tmp_path / "features")
    stored = write_feature_store(store, config, IDS, rng)
    rows = [ManifestRow(one, "/x.mp4", None, None, "test", tuple(stored[one]["captions"])) for one in stored]
    scorer = CheckpointScorer(store, rows, from_features=True, cache_mb=100)
    for name in ("damaged", "diverged", "sound"):
        saved(config, tmp_path / name, seed, towers=False)
    (tmp_path / "damaged" / MODEL).write_bytes(b"damaged")
    diverged = build_learner(GARE(config.model, towers=False), config, 4, torch.device("cpu"))
    with torch.no_grad():
        for parameter in diverged.model.parameters():
            parameter.fill_(torch.nan)
    save_checkpoint(str(tmp_path / "diverged"), diverged, 1)
    assert "is not as it was written" in scorer.score(str(tmp_path / "damaged")).fault
    assert "is not a checkpoint" in scorer.score(str(tmp_path / "missing")).fault
    assert "finite" in scorer.score(str(tmp_path / "diverged")).fault
    assert scorer.score(str(tmp_path / "sound")).fault == ""


def test_the_same_weights_are_one_look() -> None:
    """A look counted twice makes the number of looks, which the note tells, too large."""
    score = {"val/t2v/R1": 1.0}
    entries = [Entry(2, 0), Entry(4, 0), Entry(6, 0), Entry(6, 1, score), Entry(8, 1), Entry(12, 2, score)]
    assert last_of_each_step(entries) == [entries[at] for at in (0, 1, 3, 4, 5)]


def test_the_curve_names_the_chosen_and_the_best() -> None:
    """The highest of many looks is too good by chance, and must not be taken for the one to report."""
    entries = [Entry(step, step // 2) for step in range(1, 6)]
    scores = [10.0, 30.0, None, 30.0, 20.0]
    looks = [
        (entry, CheckpointScore(fault="broken") if score is None else CheckpointScore({"t2v/R1": score}))
        for entry, score in zip(entries, scores, strict=True)
    ]
    curve = Curve.of(looks, entries[4], validated=True)
    assert curve.points("t2v/R1") == [(1, 10.0), (2, 30.0), (4, 30.0), (5, 20.0)]
    assert curve.best["step"] == 2
    assert curve.chosen is not None
    assert curve.chosen["step"] == 5
    assert curve.left_out == {entries[2].name: "broken"}
    assert curve.note == ("the best of 4 looks at test is not a result: report the checkpoint chosen on val")
    assert "the last one, which test did not choose" in Curve.of(looks, entries[4], validated=False).note
    assert Curve.of(looks, entries[2], validated=True).chosen is None
