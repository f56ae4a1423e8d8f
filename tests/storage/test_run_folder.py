"""The folder of a run, as commands, people and other programs find its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from gare.storage.run_folder import RunFolder


@pytest.mark.parametrize("root", ["/data/gare", "s3://bucket/gare"])
def test_files_are_where_they_have_always_been(root: str) -> None:
    """Runs of earlier versions must be found, and those who read their files by hand too."""
    run = RunFolder(f"{root}/msrvtt/runs/first")
    names = ("record", "result", "history", "clips", "stop", "best")
    files = ("run.json", "result.json", "history.json", "clips.json", "stop.json", "best")
    assert [getattr(run, name) for name in names] == [f"{run.uri}/{file}" for file in files]
    assert run.name == "msrvtt/first"
    assert RunFolder.of_evaluation(f"{run.uri}/evaluation-test") == run
    assert RunFolder.of_evaluation(f"{run.uri}/evaluation-test/") == run


def test_a_run_begins_and_ends(tmp_path: Path) -> None:
    """A run that has begun is gone on with; one that is finished is not trained again."""
    run = RunFolder(str(tmp_path / "demo" / "runs" / "one"))
    assert (run.has_begun, run.is_finished) == (False, False)
    assert (run.read_record(), run.read_result()) == ({}, {})
    run.write_record({"settings": {"train": {"seed": 3}}})
    assert (run.has_begun, run.is_finished) == (True, False)
    run.write_result({"steps": 7})
    assert run.read_record() == {"settings": {"train": {"seed": 3}}}
    assert (run.is_finished, run.read_result()) == (True, {"steps": 7})


@pytest.mark.parametrize(
    ("checkpoint", "is_best"),
    [
        ("/elsewhere/demo/runs/one/best", True),
        ("s3://bucket/demo/runs/one/best", True),
        ("/elsewhere/demo/runs/one/checkpoints/00000012", False),
        ("/elsewhere/demo/runs/other/best", False),
        ("", False),
    ],
)
def test_its_best_checkpoint_is_known_wherever_it_is_mounted(checkpoint: str, is_best: bool) -> None:
    """Scores of another checkpoint would else be compared under the settings of this run."""
    assert RunFolder("/data/demo/runs/one").is_its_best(checkpoint) is is_best
