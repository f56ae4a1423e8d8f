"""The line that a person watches, and what is kept of it."""

from __future__ import annotations

import logging

import pytest

from cluster.status import progress as module
from cluster.status.progress import SLOWEST, Progress


def done(written: int, failed: int = 0, **more: object) -> dict[str, object]:
    return {"written": written, "failed": failed, "frames": 12 * written, "bytes": written * 10**9, **more}


def test_the_line_says_where_the_job_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it nobody can tell a job that hangs from one that takes long."""
    caplog.set_level(logging.INFO)
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    progress = Progress(7210, "extracted")
    progress.add(done(5, 1))
    assert caplog.text == ""
    now = 110.0
    progress.add(done(3, 1))
    line = caplog.records[-1].getMessage()
    assert line == (
        "extracted 8, failed 2, left 7200; 1.0 videos/s, 10 frames/s, 8.00 GB read, 2:00:00 h left"
    )
    assert progress.rates()["mb_read_per_s"] == pytest.approx(800)


def test_before_anything_is_done_no_time_is_promised(caplog: pytest.LogCaptureFixture) -> None:
    """A division by zero would end the job; a promise of nothing would mislead."""
    caplog.set_level(logging.INFO)
    Progress(5, "extracted").show()
    assert "left 5; 0.0 videos/s" in caplog.text
    assert "? left" in caplog.text
    Progress(0, "extracted").show()
    assert "0 s left" in caplog.text


def test_the_slowest_of_all_parts_are_kept() -> None:
    """Those that a person should look at, whichever worker had them."""
    progress = Progress(100, "extracted")
    for first in range(0, 40, 10):
        took = [(f"v{number}", float(number)) for number in range(first, first + 10)]
        progress.add(done(10, slowest=took, seconds={"decode": 2.0, "write": 0.5}, began=1.0))
    report = progress.report()
    assert list(report["slowest"]) == [f"v{number}" for number in range(39, 39 - SLOWEST, -1)]
    assert report["stage_seconds"] == {"decode": 8.0, "write": 2.0}
    assert report["timing"]["actors_start_s"] >= 0
