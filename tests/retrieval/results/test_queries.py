"""Negatives that are known to be false, from the table of an evaluation's queries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from gare.data.manifest import ManifestRow
from gare.retrieval.ranking.grid import Grid
from gare.retrieval.ranking.ranks import rank_blocks
from gare.retrieval.ranking.scoring import MatrixBlocks
from gare.retrieval.results.queries import SCHEMA, false_negative_shares, owners_of, query_table


def table_of(rows: list[tuple[str, str | None, list[str]]]) -> pa.Table:
    """Builds a table of t2v queries: video, caption, best videos."""
    columns: dict[str, list[Any]] = {name: [None] * len(rows) for name in SCHEMA.names}
    columns |= {"direction": ["t2v"] * len(rows), "video_id": [video for video, _, _ in rows]}
    columns |= {"caption": [caption for _, caption, _ in rows], "top_video_ids": [best for *_, best in rows]}
    return pa.table(columns, schema=SCHEMA)


def test_other_videos_with_the_same_caption_are_false_negatives() -> None:
    """Two of the 8 negatives are false ("a dog", each way), and one of these is its text's hardest."""
    found = false_negative_shares(
        table_of(
            [
                ("v0", "A dog.", ["v1", "v0", "v2"]),
                ("v1", "a  dog", ["v1", "v2", "v0"]),
                ("v1", "a dog runs", ["v1", "v0", "v2"]),
                ("v2", "two dogs", ["v2"]),
            ]
        )
    )
    assert found == {"false": 25.0, "false_hardest": 25.0}


def test_the_same_caption_twice_of_one_video_is_none() -> None:
    rows = [("v0", "a dog", ["v0", "v1"]), ("v0", "a dog", ["v1"]), ("v1", "a cat", ["v0"])]
    assert false_negative_shares(table_of(rows)) == {"false": 0.0, "false_hardest": 0.0}


@pytest.mark.parametrize("caption", [None, "", " "])
def test_captions_that_are_not_known_are_not_measured(caption: str | None) -> None:
    assert false_negative_shares(table_of([("v0", caption, ["v1"]), ("v1", caption, ["v0"])])) == {}


def test_one_video_has_no_negatives() -> None:
    assert false_negative_shares(table_of([("v0", "a dog", ["v0"])])) == {}


def test_shares_are_those_of_the_whole_matrix(rng: np.random.Generator) -> None:
    """Against a count over all pairs of real rankings."""
    words = ("a", "b", "c", "d")
    rows = [
        ManifestRow(f"v{index}", f"/v{index}.mp4", None, None, "test", tuple(rng.choice(words, 3)))
        for index in range(9)
    ]
    owners = owners_of(rows)
    scores = rng.standard_normal((len(owners), 9)).astype(np.float32)
    ranks = rank_blocks(MatrixBlocks(torch.from_numpy(scores)), Grid.of(owners, 9))[""]
    queries = query_table(ranks, rows, {}).of_direction("t2v")
    captions = [caption for row in rows for caption in row.captions]
    false = np.array([[caption in row.captions for row in rows] for caption in captions])
    false[np.arange(len(captions)), owners.numpy()] = False
    scores[np.arange(len(captions)), owners.numpy()] = -np.inf
    hardest = scores.argmax(axis=1)
    assert false_negative_shares(queries) == pytest.approx(
        {
            "false": 100 * false.sum() / (len(captions) * 8),
            "false_hardest": 100 * np.mean(false[np.arange(len(captions)), hardest]),
        }
    )
