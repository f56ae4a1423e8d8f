"""The place of MLflow's database: beside a root with an odd name, nobody finds the runs again."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.tracking import connect, resolve_tracking_uri
from cluster.tracking.location import sqlite_file
from gare.config import parse_config


@pytest.mark.parametrize("name", ["ü %41 #b ?c", "50%", "a?mode=ro", "#", "%25", "plain", " lead"])
@pytest.mark.filterwarnings("ignore")
def test_the_database_lies_in_the_root_whatever_its_name(name: str, tmp_path: Path) -> None:
    """SQLAlchemy ends a path at a question mark, and decodes what follows a percent sign."""
    root = tmp_path / "all" / name
    root.mkdir(parents=True)
    uri = resolve_tracking_uri("sqlite:///mlflow.db", str(root))
    assert sqlite_file(uri) == root / "mlflow.db"
    tracker = connect(parse_config({}).tracking, str(root))
    tracker.start_run("one").finish()
    assert (root / "mlflow.db").stat().st_size > 0
    assert [path.name for path in (tmp_path / "all").iterdir()] == [name]
    assert {path.name for path in root.iterdir()} <= {"mlflow.db", "mlflow.db.lock", "mlartifacts"}


def test_a_location_given_as_a_uri_is_encoded_already() -> None:
    """A person's own encoding is not encoded once more."""
    uri = resolve_tracking_uri("sqlite:///my%20runs.db", "/a%b")
    assert uri == "sqlite+pysqlite:////a%25b/my%20runs.db"
    assert sqlite_file(uri) == Path("/a%b/my runs.db")
    assert resolve_tracking_uri("sqlite:////x/50%.db?timeout=9", "/a") == "sqlite:////x/50%.db?timeout=9"


def test_the_variable_of_mlflow_is_said_not_to_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A person who has set it looks for the runs there."""
    tracking = parse_config({}).tracking
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hush@elsewhere:5000")
    connect(tracking, str(tmp_path))
    (line,) = [
        record.getMessage() for record in caplog.records if "MLFLOW_TRACKING_URI" in record.getMessage()
    ]
    assert "is not used" in line
    assert "tracking.uri" in line
    assert "hush" not in line
    caplog.clear()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", resolve_tracking_uri(tracking.uri, str(tmp_path)))
    connect(tracking, str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    connect(tracking, str(tmp_path))
    assert "MLFLOW_TRACKING_URI" not in caplog.text
