"""The end of a run over a collection with many bad videos."""

from __future__ import annotations

import json

from gare.extract.inventory import Inventory


def inventory(num_failed: int) -> Inventory:
    reasons = ("cannot be opened", "no video stream", "took too long")
    failures = {f"clip{i:07d}": {"message": f"{reasons[i % 3]}: file {i}"} for i in range(num_failed)}
    return Inventory("store", 10**6, 10**6 - num_failed, {}, failures, 1.0)


def test_a_result_names_the_first_failures_and_counts_all() -> None:
    """With a message for each of a million failures the last line had 100 MB, and result.json with it."""
    summary = inventory(100_000).summary()
    assert summary["num_failed"] == 100_000
    assert list(summary["failed"]) == [f"clip{i:07d}" for i in range(100)]
    assert summary["failed"]["clip0000001"] == "no video stream: file 1"
    assert summary["failed_reasons"] == {
        "cannot be opened": 33_334,
        "no video stream": 33_333,
        "took too long": 33_333,
    }
    assert len(json.dumps(summary)) < 10_000


def test_few_failures_are_all_named() -> None:
    """The usual case: what failed and why, without opening the store."""
    assert inventory(0).summary() == {"failed": {}, "num_failed": 0, "failed_reasons": {}}
    summary = inventory(2).summary()
    assert len(summary["failed"]) == summary["num_failed"] == 2
