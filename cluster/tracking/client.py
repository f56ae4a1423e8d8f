"""The only file that imports mlflow: one function for each operation that the project needs.

MLflow takes seconds to import, so it is imported at first use. Nothing here sets its global tracking URI or
active run.
"""

from __future__ import annotations

import fcntl
import functools
import json
import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

from cluster.tracking import outbox
from cluster.tracking.location import check_port, json_number, scheme_of, sqlite_file
from cluster.tracking.views import experiment_tags
from gare.errors import GareError

logger = logging.getLogger(__name__)

#: Seconds to wait for a server's answer while other work waits: at the start, in a training step.
ANSWER_S = 5

#: MLflow's tag that makes a run the child of another.
PARENT_TAG = "mlflow.parentRunId"


#: Steps at which a run has a metric, by tracking URI, run id and key.
_Steps = dict[tuple[str, str, str], set[int]]
# Fetched once per process, which alone adds steps from then on.
_known: _Steps = {}


class RefusedError(Exception):
    """The store answered that it rejects this for good."""


@functools.cache
def mlflow_module() -> Any:
    """Returns the mlflow package, for the other files of this package."""
    # No telemetry from clusters that are cut off or confidential; a user's own setting wins.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with warnings.catch_warnings():
        # Warnings during its import are about its own modules.
        warnings.simplefilter("ignore")
        import mlflow
        import mlflow.pyfunc

    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


@functools.lru_cache(maxsize=8)
def client(uri: str) -> Any:
    """Returns the MlflowClient of a tracking URI; one per process."""
    return mlflow_module().MlflowClient(tracking_uri=uri, registry_uri=uri)


def is_server(uri: str) -> bool:
    """Returns True if the store is behind an MLflow server, False for a database used directly."""
    return scheme_of(uri) in ("http", "https")


def check_answers(uri: str) -> None:
    """Sends a small request to an MLflow server, once, with a short time limit; does not ask databases.

    Raises:
        Exception: any, if there is no valid answer.
    """
    if is_server(uri):
        _post(uri, "experiments/search", {"max_results": 1})


def prepare_database(uri: str, artifacts: str) -> None:
    """Connects to a database and creates MLflow's tables if they are missing.

    Raises:
        Exception: any, if it cannot be reached within seconds or is not MLflow's.
    """
    if scheme_of(uri) == "sqlite":
        path = sqlite_file(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two first starts at the same time would both run the migrations.
        with path.with_name(f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _open_database(uri, artifacts)
        return
    check_port(uri, ANSWER_S)
    _open_database(uri, artifacts)


def _open_database(uri: str, artifacts: str) -> None:
    mlflow_module()
    import sqlalchemy
    import sqlalchemy.orm

    with warnings.catch_warnings():
        # MLflow 3.17's tables use features that SQLAlchemy 2.1 deprecates.
        warnings.simplefilter("ignore")
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        sqlalchemy.orm.configure_mappers()
    # MLflow retries for minutes, whatever the fault; ask once before it does.
    engine = sqlalchemy.create_engine(uri)
    try:
        sqlalchemy.inspect(engine).get_table_names()
    finally:
        engine.dispose()
    # The first one to open a database also creates the experiment "Default", with files below this folder.
    SqlAlchemyStore(uri, artifacts)


def find_or_create_experiment(uri: str, name: str, artifacts: str | None) -> str:
    """Returns the id of the experiment of that name, which is created if missing.

    Raises:
        GareError: if it has been deleted.
        Exception: from MLflow.
    """
    mlflow = mlflow_module()
    found = client(uri).get_experiment_by_name(name)
    if found is None:
        try:
            tags = experiment_tags()
            return str(client(uri).create_experiment(name, artifact_location=artifacts, tags=tags))
        except mlflow.MlflowException as error:
            # Another process may have created it in between.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client(uri).get_experiment_by_name(name)
    if found.lifecycle_stage != "active":
        raise GareError(
            f"the MLflow experiment {name!r} has been deleted",
            where="tracking.experiment",
            accepted=f"another name, or `mlflow experiments restore --experiment-id {found.experiment_id}`",
        )
    for key, value in experiment_tags(found.tags).items():
        try:
            client(uri).set_experiment_tag(found.experiment_id, key, value)
        except mlflow.MlflowException as error:
            # Some servers let users only add runs; their pages then show the default view.
            logger.info("MLflow does not accept views of the experiment: %s", error.error_code)
            break
    return str(found.experiment_id)


def open_run(uri: str, experiment_id: str, name: str, run_id: str | None) -> tuple[str, str]:
    """Reopens an earlier run, or creates one; returns its (experiment id, run id)."""
    mlflow = mlflow_module()
    if run_id:
        try:
            info = client(uri).get_run(run_id).info
        except mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            if info.lifecycle_stage == "active":
                client(uri).update_run(run_id, status="RUNNING")
                return str(info.experiment_id), run_id
    run = client(uri).create_run(experiment_id, run_name=name)
    return experiment_id, str(run.info.run_id)


def tags_of(uri: str, run_id: str) -> dict[str, str]:
    """Returns the tags of a run."""
    return dict(client(uri).get_run(run_id).data.tags)


#: What earlier versions logged for ``auto``.
_EARLIER_AUTO = ("0", "-1", "0.0")


def add_params(uri: str, run_id: str, params: Mapping[str, str]) -> dict[str, str]:
    """Logs the parameters that are new; returns those that the run has with another value."""
    mlflow_module()
    from mlflow.entities import Param

    known = client(uri).get_run(run_id).data.params
    new = [Param(key, value) for key, value in params.items() if key not in known]
    for start in range(0, len(new), 100):
        client(uri).log_batch(run_id, params=new[start : start + 100])
    return {
        key: value
        for key, value in params.items()
        if key in known and known[key] != value and not (value == "auto" and known[key] in _EARLIER_AUTO)
    }


def send(uri: str, entry: outbox.Entry) -> None:
    """Sends metrics, tags and status of one entry; a server gets one short chance to answer.

    Raises:
        RefusedError: if the store will never take it.
        Exception: any other, if the store could not be reached.
    """
    mlflow = mlflow_module()
    run_id, metrics, tags = entry["run_id"], entry.get("metrics", []), entry.get("tags", {})
    known = _Steps()
    if entry.get("once"):
        metrics, known = _without_known(uri, run_id, metrics)
    if is_server(uri):
        if metrics or tags:
            rows = [{**row, "value": json_number(row["value"])} for row in metrics]
            pairs = [{"key": key, "value": value} for key, value in tags.items()]
            _post(uri, "runs/log-batch", {"run_id": run_id, "metrics": rows, "tags": pairs})
        if "status" in entry:
            status = {"status": entry["status"], "end_time": entry["end_time"]}
            _post(uri, "runs/update", {"run_id": run_id, **status})
        _known.update(known)
        return
    from mlflow.entities import Metric, RunTag

    try:
        if metrics or tags:
            client(uri).log_batch(
                run_id,
                metrics=[Metric(**row) for row in metrics],
                tags=[RunTag(key, value) for key, value in tags.items()],
            )
        if "status" in entry:
            client(uri).set_terminated(run_id, entry["status"], entry["end_time"])
        _known.update(known)
    except mlflow.MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE"):
            raise RefusedError(str(error)) from error
        raise


def _without_known(uri: str, run_id: str, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], _Steps]:
    """Returns the rows of steps that the run does not have, and its steps once they are added.

    Rows that were logged together arrive together, so the first of them stands for all.
    """
    together: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in rows:
        together.setdefault((row["step"], row["timestamp"]), []).append(row)
    new, known = list[dict[str, Any]](), _Steps()
    for (step, _), group in together.items():
        which = (uri, run_id, group[0]["key"])
        if which not in known:
            known[which] = set(_known[which] if which in _known else _steps_of(*which))
        if step not in known[which]:
            known[which].add(step)
            new += group
    return new, known


def _steps_of(uri: str, run_id: str, key: str) -> set[int]:
    """Returns the steps at which the run has a metric."""
    if not is_server(uri):
        return {int(point.step) for point in client(uri).get_metric_history(run_id, key)}
    steps: set[int] = set()
    asked = {"run_id": run_id, "metric_key": key, "max_results": 20000}
    while True:
        answer = _request(uri, "metrics/get-history", "GET", params=asked)
        steps |= {int(point.get("step", 0)) for point in answer.get("metrics", ())}
        if not answer.get("next_page_token"):
            return steps
        asked["page_token"] = answer["next_page_token"]


def _post(uri: str, endpoint: str, body: Mapping[str, Any]) -> None:
    _request(uri, endpoint, "POST", json=dict(body))


def _request(uri: str, endpoint: str, method: str, **content: Any) -> dict[str, Any]:
    # MlflowClient waits and retries as its environment variables say, for minutes by default, and changing
    # them would affect everything else in this process.
    mlflow_module()
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    answer = http_request(
        get_default_host_creds(uri),
        f"/api/2.0/mlflow/{endpoint}",
        method,
        max_retries=0,
        timeout=ANSWER_S,
        raise_on_status=False,
        **content,
    )
    if answer.status_code == 200:
        return dict(answer.json())  # fails for a page that is not from an MLflow server
    message = f"HTTP {answer.status_code} from {endpoint}: {answer.text[:300]}"
    if answer.status_code in (400, 404, 422) and "error_code" in answer.text:
        raise RefusedError(message)
    raise ConnectionError(message)


def link_dataset(
    uri: str, run_id: str, *, name: str, digest: str, source: str, context: str, profile: Mapping[str, Any]
) -> None:
    """Makes a data set an input of the run."""
    mlflow_module()
    from mlflow.entities import Dataset, DatasetInput, InputTag

    linked = measured_on(name, digest)
    dataset = Dataset(
        name=linked["dataset_name"],
        digest=linked["dataset_digest"],
        source_type="uri",
        source=json.dumps({"uri": source}),
        profile=json.dumps(dict(profile)),
    )
    entry = DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
    client(uri).log_inputs(run_id, datasets=[entry])


def system_monitor(uri: str, run_id: str, node: str) -> Any:
    """Builds the monitor of this machine, which continues the numbering of the run's samples."""
    mlflow_module()
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    level = logging.getLogger(SystemMetricsMonitor.__module__)
    level.setLevel(logging.WARNING)  # it logs each time that there is no GPU to measure
    return SystemMetricsMonitor(run_id, resume_logging=True, node_id=node, tracking_uri=uri)


def measured_on(name: str, digest: str) -> dict[str, str]:
    """Returns a data set's name and digest for a metric, within MLflow's limits."""
    return {"dataset_name": name[:500], "dataset_digest": digest[:36]}
