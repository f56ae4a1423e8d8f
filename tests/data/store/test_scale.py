"""The benchmark of scale runs at small sizes, and what it counts is what it is said to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks import scale


def test_the_benchmark_of_scale_at_small_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bars are what a change must not break; a benchmark that has rotted says nothing."""
    monkeypatch.setattr(scale, "ROWS_A_PART", 100)
    scale.main(["--sizes", "100,2300", "--picture", str(tmp_path / "scale.png")])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["clips"] for row in found["rows"]] == [100, 2300]
    for row in found["rows"]:
        assert row["requests_a_part"] <= scale.BARS["requests_a_part"]
        assert row["requests_a_clip"] <= scale.BARS["requests_a_clip"]
        assert row["other_requests"] < 20
    assert set(found["judged"]) == set(scale.BARS)
    assert (tmp_path / "scale.png").read_bytes()[:4] == b"\x89PNG"
