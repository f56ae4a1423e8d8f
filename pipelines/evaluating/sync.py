"""Part of evaluate: sends MLflow what it missed while it was lost; not a step of its own."""

from __future__ import annotations

import logging
from typing import Any

from cluster.layout import layout
from cluster.tracking import RunHandle, connect
from gare.config import Config
from gare.storage.run_folder import RunFolder
from pipelines.stored_outbox import pending_of
from pipelines.training.outputs import log_outputs

logger = logging.getLogger(__name__)


def sync(config: Config) -> dict[str, Any]:
    """Delivers the entries of all the data set's runs, and pictures and model of ``train.run``, to MLflow.

    Raises:
        GareError: if MLflow cannot be reached; the entries stay.
    """
    places = layout(config)
    tracker = connect(config.tracking, places.root)
    pending = pending_of(places)
    delivered = tracker.deliver(pending)
    result = {"pending": str(pending), **delivered, "mlflow_model": ""}
    folder = RunFolder(places.run(config.train.run))
    trained = folder.read_result()
    if trained and not trained["mlflow_model"]:
        handle = RunHandle(tracker.tracking_uri, tracker.experiment_id, trained["mlflow_run_id"], pending)
        trained["mlflow_model"] = log_outputs(folder, handle, config.model.clip.embed_dim)
        folder.write_result(trained)
        result["mlflow_model"] = trained["mlflow_model"]
    logger.info(
        "%d metrics and %d tags delivered, of %d runs",
        result["metrics"],
        result["tags"],
        len(result["runs"]),
    )
    return result
