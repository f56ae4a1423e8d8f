"""What an evaluation leaves behind is of that evaluation alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gare.config import EvaluateConfig, parse_config
from gare.data.manifest import ManifestRow
from gare.data.splits import split_hash_of
from gare.errors import DataError
from gare.retrieval.gallery import FILE as GALLERY
from gare.retrieval.ranking.grid import Grid
from gare.retrieval.ranking.ranks import rank_blocks
from gare.retrieval.ranking.scoring import MatrixBlocks
from gare.retrieval.results.evaluation import read_evaluation
from gare.retrieval.results.files import processing_of, write_results
from gare.retrieval.results.notes import evaluation_note
from gare.retrieval.results.queries import owners_of
from gare.storage.files import write_json

ROWS = [ManifestRow(f"v{index}", f"/v{index}.mp4", None, None, "test", ("a", "b")) for index in range(6)]
ABOUT = {"benchmark": "folder", "protocol": "own_split | 6", "split": "test"}


def evaluate(
    folder: Path, config: EvaluateConfig, rng: np.random.Generator, **result: str
) -> dict[str, object]:
    """The end of an evaluation, with random scores."""
    scores = torch.from_numpy(rng.standard_normal((12, 6)).astype(np.float32))
    grid = Grid.of(owners_of(ROWS), 6)
    ranks = rank_blocks(MatrixBlocks(scores), grid, processing_of(config))
    written = write_results(str(folder), ranks, ROWS, ABOUT, config)
    write_json(str(folder / "result.json"), written | result)
    return written


def test_nothing_of_an_earlier_evaluation_stays(rng: np.random.Generator, tmp_path: Path) -> None:
    """Post-processed ranks of an older checkpoint beside new plain ones would be compared with them."""
    folder = tmp_path / "own" / "runs" / "first" / "evaluation-test"
    folder.mkdir(parents=True)
    evaluate(folder, EvaluateConfig(dsl=True, resamples=20), rng)
    (folder / GALLERY).write_bytes(b"of an older checkpoint")
    (folder / "notes.txt").write_text("mine")
    assert (folder / "ranks-dsl.parquet").exists()
    evaluate(folder, EvaluateConfig(resamples=20), rng)
    assert {path.name for path in folder.iterdir()} == {"ranks.parquet", "result.json", "notes.txt"}
    # Ended in between: neither the old result with new ranks nor half of the new one.
    with pytest.raises(AttributeError):
        write_results(str(folder), {"": None}, ROWS, ABOUT, EvaluateConfig())  # type: ignore[dict-item]
    with pytest.raises(DataError, match="there is no evaluation"):
        read_evaluation(str(folder))


def test_a_checkpoint_from_elsewhere_has_not_the_runs_settings(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """Scored under the run's name, it would be listed as another seed of that run's model."""
    folder = tmp_path / "own" / "runs" / "first" / "evaluation-test"
    folder.mkdir(parents=True)
    settings = {"model": {"increment": True}, "train": {"seed": 3}}
    write_json(str(folder.parent / "run.json"), {"settings": settings})
    evaluate(folder, EvaluateConfig(resamples=0), rng, checkpoint=f"{folder.parent}/best")
    mine = read_evaluation(str(folder))
    assert (mine.model, mine.seed, mine.benchmark) == ("gare", 3, "own")
    evaluate(folder, EvaluateConfig(resamples=0), rng, checkpoint="/elsewhere/best")
    other = read_evaluation(str(folder))
    assert (other.model, other.seed) == ("unknown", None)
    assert other.settings != mine.settings


def test_seeds_of_two_versions_are_seeds_of_one_model(rng: np.random.Generator, tmp_path: Path) -> None:
    """Else three seeds of before an update and two after it are two means, and no deviation is of all."""
    now = parse_config({"name": "own"}).identity()
    earlier, other = (json.loads(json.dumps(now)) for _ in range(2))
    for section, key in (("train", "tf32"), ("model", "pooling"), ("model", "increment_dropout_per")):
        del earlier[section][key]
    del earlier["augment"]
    # Part of a run once, and free since.
    earlier["upkeep"] = {"stale_s": 1}
    earlier["train"] |= {"seed": 1, "micro_batch": 8}
    other["model"]["increment_layers"] = 2
    hashes = []
    for name, settings in (("now", now), ("earlier", earlier), ("other", other)):
        folder = tmp_path / "own" / "runs" / name / "evaluation-test"
        folder.mkdir(parents=True)
        write_json(str(folder.parent / "run.json"), {"settings": settings})
        evaluate(folder, EvaluateConfig(resamples=0), rng, checkpoint=f"{folder.parent}/best")
        hashes.append(read_evaluation(str(folder)).settings)
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_note_says_scores_and_what_they_are_of(rng: np.random.Generator, tmp_path: Path) -> None:
    """It is the first thing on the run's page."""
    written = evaluate(tmp_path, EvaluateConfig(dsl=True, resamples=20), rng)
    about = {**ABOUT, "split_hash": split_hash_of(ROWS), "num_texts": 12, "num_videos": 6}
    note = evaluation_note([{**about, **written}])
    assert "**test** of folder (own\\_split \\| 6), 12 texts × 6 videos" in note
    rows = [line for line in note.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        *("text → video", "video → text"),
        *("text → video, dual softmax", "video → text, dual softmax"),
    ]
    metrics, intervals = written["metrics"], written["intervals"]
    low, high = intervals["t2v/R1"]  # type: ignore[index]
    assert f"| text → video | {metrics['t2v/R1']:.1f} [{low:.1f}, {high:.1f}] |" in note  # type: ignore[index]
    assert len({row.count("|") - row.count("\\|") for row in rows}) == 1
    noted = evaluation_note([{**about, **written, "note": "towers of /a_b as they are"}])
    assert noted == f"{note}\ntowers of /a\\_b as they are\n"
