"""The champion in the registry is the best on val."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.tracking import connect, registry
from cluster.tracking.client import client
from cluster.tracking.tracker import Tracker
from gare.config import TrackingConfig


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return connect(TrackingConfig(), str(tmp_path_factory.mktemp("registry")))


def version(tracker: Tracker, name: str, val_score: float | None, val_hash: str = "v") -> str:
    run = tracker.start_run("r")
    # What it reached on test, which would choose it every time.
    run.log_metrics({"test/t2v/R1": 0.0 if val_score is None else 100 - val_score}, 0)
    logged = client(tracker.tracking_uri).create_logged_model(
        tracker.experiment_id, name="model", source_run_id=run.run_id
    )
    client(tracker.tracking_uri).finalize_logged_model(logged.model_id, "READY")
    made = run.register(name, f"models:/{logged.model_id}", val_score=val_score, val_hash=val_hash)
    assert run.versions(name) == [made]
    return made


def test_champion_is_best_on_val_and_never_chosen_on_test(tracker: Tracker, tmp_path: Path) -> None:
    """A served model that was chosen on test makes every reported test score a lie."""
    seen = []
    for score, val in (
        (None, "v"),
        (40.0, "v"),
        (30.0, "v"),
        (60.0, "v"),
        (60.0, "v"),
        (90.0, "w"),
        (None, "v"),
    ):
        version(tracker, "m", score, val)
        champion = registry.champion_of(tracker.tracking_uri, "m")
        seen.append(None if champion is None else str(champion.version))
    assert seen == [None, "2", "2", "4", "4", "4", "4"]
