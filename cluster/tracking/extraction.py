"""The MLflow run of an extraction: counts, rates, the table of failures, the fingerprint and the result."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from cluster.tracking.outbox import Outbox
from cluster.tracking.run import RunHandle, status_after
from cluster.tracking.system import system_metrics
from cluster.tracking.tracker import connect
from gare.config import Config

_COLUMNS = ("video_id", "uri", "stage", "error_type", "message", "attempts", "transient")


class ExtractionRun:
    """MLflow run that is open inside the context, and ends as failed or killed after an error.

    Args:
        config: configuration of the extraction; its sections ``extract`` and ``upkeep`` become parameters.
        step: name of the command, which names the run.
        root: storage root, as for ``connect``.
        pending: storage of entries that MLflow has not accepted yet; see ``Tracker.start_run``.

    Raises:
        GareError: on entering, if MLflow cannot be reached.
    """

    def __init__(self, config: Config, step: str, root: str, pending: str | Outbox) -> None:
        self._config = config
        self._root, self._pending = root, pending
        self._step = step
        self._handle: RunHandle

    def __enter__(self) -> Self:
        config = self._config
        self._handle = connect(config.tracking, self._root).start_run(
            f"{config.name}/{self._step}",
            params=config.model_dump(mode="json", include={"name", "extract", "upkeep"}),
            tags={"step": self._step},
            pending=self._pending,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.finish(status_after(error))

    def system_metrics(self) -> AbstractContextManager[None]:
        """Logs the system metrics of the cluster's nodes inside the context; needs Ray."""
        return system_metrics(self._handle, self._config.tracking)

    def log(
        self, counts: Mapping[str, int], done: Mapping[str, Any], failures: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Logs the counts of the collection, the rates, and a table of the videos that currently fail.

        Args:
            counts: by name, such as ``new``.
            done: from ``cluster.status.progress.Progress.report``; empty if there was nothing to extract.
            failures: rows of the store's failures by id.
        """
        numbers = {name: value for name, value in done.items() if isinstance(value, int | float)}
        numbers |= {f"stage_seconds/{name}": value for name, value in done.get("stage_seconds", {}).items()}
        self._handle.log_metrics({**counts, "failures": len(failures), **numbers}, 0)
        if failures:
            rows = list(failures.values())
            self._handle.log_table("failures.json", {key: [row[key] for row in rows] for key in _COLUMNS})

    def log_result(self, result: Mapping[str, Any]) -> dict[str, str]:
        """Uploads the result and tags its fingerprint. Returns the run's id as an entry for the result."""
        self._handle.set_tags({"fingerprint": result["fingerprint"], "store": result["store"]})
        self._handle.log_json("result.json", result)
        return {"mlflow_run_id": self._handle.run_id}
