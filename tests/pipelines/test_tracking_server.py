"""A real MLflow server on PostgreSQL and S3, as compose.yaml starts it, lost in the middle of a run."""

from __future__ import annotations

import json
import secrets
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.layout import Layout
from cluster.tracking import client as client_module
from pipelines import evaluate, train
from pipelines.training import callbacks as training
from tests.helpers.pipelines import in_process, tiny
from tests.helpers.services import MlflowServer, postgres, s3
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.faults

EPOCHS = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    password = secrets.token_hex(16)
    with s3() as store, postgres(password) as port:
        running = MlflowServer(tmp_path_factory.mktemp("mlflow"), port, password, store)
        running.start()
        try:
            yield running
        finally:
            if running.process:
                running.kill()


class Outage(threading.Thread):
    """Kills the server once it has metrics of a run; brings it back once the run has gone on without it.

    The training workers are held while it comes back, so that some of the run is left for it on any machine.
    """

    def __init__(self, server: MlflowServer, pending: Path, run: str) -> None:
        super().__init__()
        self.server, self.pending, self.name_of_run = server, pending, f"tiny/{run}"
        self.events: list[str] = []
        self.over = threading.Event()

    def run(self) -> None:
        if self._until(self._has_metrics):
            self.server.kill()
            self.events.append("killed")
        if self._until(lambda: self.pending.exists() and self.pending.stat().st_size > 0):
            # Of this process's own Ray; others may be at work on this machine.
            family = psutil.Process().children(recursive=True)
            workers = [process for process in family if "RayTrainWorker" in words_of(process)]
            for worker in workers:
                worker.suspend()
            self.events.append(f"held {len(workers)} workers")
            self.server.start()
            for worker in workers:
                worker.resume()
            self.events.append("back")

    def _until(self, condition: Any) -> bool:
        wait_until(lambda: condition() or self.over.is_set(), within_s=600)
        return not self.over.is_set()

    def _has_metrics(self) -> bool:
        wanted = f"attributes.run_name = '{self.name_of_run}'"
        body = {"experiment_ids": ["1", "2"], "filter": wanted, "max_results": 1}
        request = urllib.request.Request(
            f"{self.server.uri}/api/2.0/mlflow/runs/search",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                runs = json.load(answer).get("runs", [])
        except OSError:
            return False  # a busy machine's server is slow
        return bool(runs and runs[0]["data"].get("metrics"))


def words_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_server_lost_in_the_middle_of_a_run_loses_and_doubles_nothing(
    benchmark: dict[str, Any], places: Layout, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a night's run dies with the tracking server, or its curves have holes or points twice."""
    # In this process, which delivers what is left at the end: a busy machine's server is slow, not lost.
    monkeypatch.setattr(client_module, "ANSWER_S", 120)
    config = tiny("train.run=outage", f"tracking.uri={server.uri}", f"train.epochs={EPOCHS}")
    pending = Path(places.data) / "mlflow-pending.jsonl"
    outage = Outage(server, pending, "outage")
    outage.start()
    try:
        result = train.run(config)
    finally:
        outage.over.set()
        outage.join()
    assert outage.events == ["killed", "held 2 workers", "back"]
    evaluation = evaluate.run(config)

    assert pending.read_text() == ""
    mlflow = client_module.client(server.uri)
    run = mlflow.get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert [found.info.run_id for found in mlflow.search_runs([run.info.experiment_id])] == [run.info.run_id]
    assert_all_arrived(mlflow, run.info.run_id, places, "outage", result["steps"])
    for name, value in evaluation["metrics"].items():
        assert run.data.metrics[f"test/{name}"] == value

    # Its files went through the server into the S3 store, and come back through it.
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    names = {Path(file.path).name for file in mlflow.list_artifacts(run.info.run_id, "figures")}
    assert "retrieval-test.png" in names
    with urllib.request.urlopen(
        f"{server.environment['AWS_ENDPOINT_URL']}/gare?list-type=2", timeout=120
    ) as bucket:
        assert f"{run.info.run_id}/artifacts/figures/retrieval-test.png" in bucket.read().decode()
    log = server.log.read_text()
    assert server.environment["PGPASSWORD"] not in log
    assert server.environment["AWS_SECRET_ACCESS_KEY"] not in log


class Loss(Outage):
    """Kills the server once it has metrics of a run, and leaves it dead."""

    def run(self) -> None:
        if self._until(self._has_metrics):
            self.server.kill()
            self.events.append("killed")


def test_server_lost_for_good_gets_all_by_sync(
    benchmark: dict[str, Any],
    places: Layout,
    server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
    tiny_yaml: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The server is down till Monday: the weekend's training is not, and its curves come when it is back."""
    monkeypatch.setattr(client_module, "ANSWER_S", 120)
    overrides = ["train.run=loss", f"tracking.uri={server.uri}", "tracking.experiment=loss"]
    config = tiny(*overrides, f"train.epochs={EPOCHS}")
    pending = Path(places.data) / "mlflow-pending.jsonl"
    loss = Loss(server, pending, "loss")
    loss.start()
    try:
        result = train.run(config)
    finally:
        loss.over.set()
        loss.join()
    assert loss.events == ["killed"]
    assert result["mlflow_model"] == ""
    waiting = len(pending.read_text().splitlines())
    assert waiting
    command = ["--config", tiny_yaml, *overrides, "--sync"]
    in_process(capsys, evaluate.run, *command, flags=evaluate.FLAGS).refused(4, "MLflow cannot be used there")
    assert len(pending.read_text().splitlines()) == waiting

    server.start()
    answer = in_process(capsys, evaluate.run, *command, flags=evaluate.FLAGS)
    assert answer.status == 0, answer.stderr
    synced = json.loads(answer.stdout)
    assert synced["metrics"] > 0
    assert synced["runs"] == [result["mlflow_run_id"]]
    assert synced["mlflow_model"].startswith("models:/")
    again = json.loads(in_process(capsys, evaluate.run, *command, flags=evaluate.FLAGS).stdout)
    assert (again["metrics"], again["tags"], again["runs"]) == (0, 0, [])

    mlflow = client_module.client(server.uri)
    run = mlflow.get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert_all_arrived(mlflow, run.info.run_id, places, "loss", result["steps"])
    names = {Path(file.path).name for file in mlflow.list_artifacts(run.info.run_id, "figures")}
    assert "curves.png" in names


def assert_all_arrived(mlflow: Any, run_id: str, places: Layout, run: str, steps: int) -> None:
    """Every metric of every step that is logged, once and with its value."""
    record = json.loads(Path(places.run(run), "history.json").read_text())
    logged = {*range(training.LOG_EVERY, steps, training.LOG_EVERY), steps}
    for name, points in record["steps"].items():
        expected = {step: value for step, value in points if step in logged}
        received = mlflow.get_metric_history(run_id, name)
        assert Counter(point.step for point in received) == Counter(expected.keys()), name
        assert {point.step: point.value for point in received} == expected
    recalls = mlflow.get_metric_history(run_id, "val/t2v/R1")
    assert Counter(point.step for point in recalls) == Counter(3 * epoch for epoch in range(1, EPOCHS + 1))


def test_server_refuses_a_page_of_another_site(server: MlflowServer) -> None:
    """Else any page that a person opens may read and change their runs through their browser."""
    for host, status in (("evil.example", 403), ("mlflow:5000", 200)):
        request = urllib.request.Request(
            f"{server.uri}/api/2.0/mlflow/experiments/search",
            b'{"max_results": 1}',
            {"Content-Type": "application/json", "Host": host},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                seen = answer.status
        except urllib.error.HTTPError as error:
            seen = error.code
            error.close()
        assert seen == status
