"""Connection to the tracking store, checked at the start, and the runs in it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.tracking import client, outbox
from cluster.tracking.location import artifact_root, resolve_tracking_uri
from cluster.tracking.run import RunHandle, Status, note_open, one_line_error, uninterrupted_transactions
from gare.config import TrackingConfig
from gare.config.home import require_home
from gare.errors import GareError, mask_secrets

logger = logging.getLogger(__name__)


def connect(tracking: TrackingConfig, root: str) -> Tracker:
    """Connects to the tracking store and finds or creates the experiment.

    Args:
        tracking: the store's URI and the experiment's name.
        root: the storage root; an SQLite file and, without a server, the files of runs lie below it.

    Raises:
        ConfigError: for a URI that is no MLflow store, or if there is no home folder.
        GareError: if the store does not answer within seconds, or refuses. Credentials are masked.
    """
    require_home()
    uri = resolve_tracking_uri(tracking.uri, root)
    if os.environ.get("MLFLOW_TRACKING_URI", uri) not in ("", uri):
        logger.warning("MLFLOW_TRACKING_URI is not used: runs go to tracking.uri %s", mask_secrets(uri))
    artifacts = None if client.is_server(uri) else artifact_root(root)
    try:
        client.check_answers(uri)
        if artifacts is not None:
            client.prepare_database(uri, artifacts)
        return Tracker(uri, client.find_or_create_experiment(uri, tracking.experiment, artifacts))
    except GareError:
        raise
    except Exception as error:
        # Not chained: a library's message may contain the password that is masked here.
        raise GareError(
            f"MLflow cannot be used there: {one_line_error(error)}",
            where=f"tracking.uri {mask_secrets(uri)}",
            accepted="start the server, or check the address, its credentials and the network; "
            "tracking.uri=sqlite:///mlflow.db needs no server",
        ) from None


@dataclass(frozen=True)
class Tracker:
    """A reachable store and an experiment in it."""

    tracking_uri: str = field(repr=False)  # may hold a password
    experiment_id: str

    def start_run(
        self,
        name: str,
        *,
        run_id: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        pending: str | outbox.Outbox = "",
        when_interrupted: Status = "KILLED",
    ) -> RunHandle:
        """Resumes the run of an earlier start if it still exists, else creates a new one.

        Args:
            name: the run's name.
            run_id: id of the run to continue.
            params: see ``RunHandle.log_params``.
            tags: tags.
            pending: local file, or another outbox, for entries that cannot be delivered later on; without
                one they are dropped.
            when_interrupted: its status if the command is interrupted before the run is finished.

        Raises:
            GareError: if the store refuses.
        """
        try:
            if run_id and pending:
                # First deliver entries of an earlier start: its end, if delivered later, would end this run.
                RunHandle(self.tracking_uri, self.experiment_id, run_id, pending).deliver_pending()
            with uninterrupted_transactions(self.tracking_uri):
                experiment_id, run_id = client.open_run(self.tracking_uri, self.experiment_id, name, run_id)
                run = RunHandle(self.tracking_uri, experiment_id, run_id, pending)
                note_open(run, when_interrupted)
                run.log_params(params or {})
        except Exception as error:
            raise GareError(
                f"the MLflow run {name!r} cannot be started: {one_line_error(error)}",
                where=f"tracking.uri {mask_secrets(self.tracking_uri)}",
            ) from None
        run.set_tags(tags or {})
        return run

    def deliver(self, pending: str | outbox.Outbox) -> dict[str, Any]:
        """Delivers entries that runs could not: numbers of ``metrics`` and ``tags``, and ids of the ``runs``.

        Raises:
            GareError: if the store cannot take them now; all entries stay.
        """
        handle = RunHandle(self.tracking_uri, self.experiment_id, "", pending)
        counts: dict[str, int] = {"metrics": 0, "tags": 0}
        runs: set[str] = set()

        def count(entry: outbox.Entry) -> None:
            runs.add(entry["run_id"])
            for kind in counts:
                counts[kind] += len(entry.get(kind, ()))

        try:
            handle.deliver_pending(count)
        except Exception as error:
            raise GareError(
                f"MLflow did not accept all entries: {one_line_error(error)}",
                where=str(pending),
                accepted="the same command later",
            ) from None
        return {**counts, "runs": sorted(runs)}

    def tags_of(self, run_id: str) -> dict[str, str]:
        """Returns the tags of a run.

        Raises:
            GareError: if there is no such run.
        """
        try:
            return client.tags_of(self.tracking_uri, run_id)
        except Exception as error:
            raise GareError(
                f"there is no MLflow run {run_id}: {one_line_error(error)}",
                where=f"tracking.uri {mask_secrets(self.tracking_uri)}",
            ) from None

    def nest(self, run_id: str, parent: RunHandle) -> None:
        """Makes a run the child of another; a run has one parent, the last."""
        RunHandle(self.tracking_uri, self.experiment_id, run_id, parent.pending).set_tags(
            {client.PARENT_TAG: parent.run_id}
        )
