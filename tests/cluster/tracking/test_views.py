"""What MLflow's pages show of runs: the views of an experiment, and the description of a run."""

from __future__ import annotations

import json

import pytest

from cluster.tracking import connect
from cluster.tracking.client import client
from cluster.tracking.tracker import Tracker
from cluster.tracking.views import CHARTS, MARK, MEANS, SCORES, VIEW
from gare.config import TrackingConfig


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("views"))


@pytest.fixture(scope="module")
def tracker(root: str) -> Tracker:
    return connect(TrackingConfig(), root)


def tags(tracker: Tracker) -> dict[str, str]:
    return dict(client(tracker.tracking_uri).get_experiment(tracker.experiment_id).tags)


def test_a_new_experiment_has_views_of_scores(root: str, tracker: Tracker) -> None:
    """Else the first page that anyone opens shows no score."""
    for key in (SCORES, MEANS, CHARTS):
        view = json.loads(tags(tracker)[VIEW + key])
        state = json.loads(view["state"])
        assert view["name"]
        assert "metrics.`test/t2v/R1`" in state["selectedColumns"]
        # The filter is one that MLflow takes.
        assert client(tracker.tracking_uri).search_runs([tracker.experiment_id], state["searchFilter"]) == []
    stored = client(tracker.tracking_uri)
    stored.set_experiment_tag(tracker.experiment_id, VIEW + SCORES, "mine")
    stored.delete_experiment_tag(tracker.experiment_id, VIEW + MEANS)
    connect(TrackingConfig(), root)
    assert tags(tracker)[VIEW + SCORES] == "mine"
    assert VIEW + MEANS not in tags(tracker), "a view that was deleted came back"


def test_an_experiment_of_before_gets_them_once(root: str, tracker: Tracker) -> None:
    """People who have runs already are those with most to look at."""
    stored = client(tracker.tracking_uri)
    stored.create_experiment("old")
    connected = connect(TrackingConfig(experiment="old"), root)
    assert {MARK, VIEW + SCORES, VIEW + MEANS, VIEW + CHARTS} <= set(tags(connected))


def test_a_description_that_a_person_wrote_stays(tracker: Tracker) -> None:
    """Notes on a run are work; an evaluation that runs again must not take them away."""
    run = tracker.start_run("described")

    def note() -> str:
        return tracker.tags_of(run.run_id)["mlflow.note.content"]

    run.describe("first")
    run.describe("second")
    assert note() == "second"
    client(tracker.tracking_uri).set_tag(run.run_id, "mlflow.note.content", "second, and what I think of it")
    run.describe("third")
    assert note() == "second, and what I think of it"
    other = tracker.start_run("long")
    other.describe("x" * 20_000)
    other.describe("short")
    assert tracker.tags_of(other.run_id)["mlflow.note.content"] == "short"
