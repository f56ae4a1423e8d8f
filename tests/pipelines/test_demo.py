"""The demo: both models, one table, one JSON line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.command import Flag
from cluster.layout import Layout
from pipelines import demo
from tests.helpers.pipelines import in_process

METRICS = {f"{way}/{name}" for way in ("t2v", "v2t") for name in ("R1", "R5", "R10", "R50", "MdR", "MnR")}


def test_demo_compares_both_models(
    benchmark: dict[str, Any], places: Layout, tiny_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the first thing that anyone runs, and other programs read its JSON."""
    answer = in_process(
        capsys,
        demo.run,
        "--config",
        tiny_yaml,
        "--seeds",
        "1",
        "train.epochs=1",
        "cluster.train_workers=1",
        flags={"--seeds": Flag("demo.seeds", "")},
    )
    assert answer.status == 0, answer.stderr
    [line] = answer.stdout.splitlines()
    result = json.loads(line)
    assert set(result) == {"baseline", "gare", "deviation", "seconds"}
    assert result["baseline"].keys() == result["gare"].keys() == METRICS
    assert result["deviation"] == {name: dict.fromkeys(result[name], 0.0) for name in ("baseline", "gare")}
    assert set(result["seconds"]) == {"prepare", "extract", "train", "evaluate"}
    assert json.loads(Path(places.step("demo"), "result.json").read_text()) == result
    table = answer.stderr
    for words in ("t2v R1", "v2t MnR", "a step of 8 pairs", "GiB a worker", "the baseline here", "make ui"):
        assert words in table
    rows = [text for text in table.splitlines() if text.startswith(("baseline ", "gare "))]
    assert f"{result['gare']['t2v/R1']:.1f}" in rows[1]
