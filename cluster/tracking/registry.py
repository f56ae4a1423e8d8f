"""Versions of a model in MLflow's registry, and the alias of the one that is best on val."""

from __future__ import annotations

import logging
from typing import Any

from cluster.tracking.client import client, mlflow_module

logger = logging.getLogger(__name__)

CHAMPION = "champion"
#: Tags of a version: the val score that it was selected by, and the hash of that val split.
SCORE, VAL = "val.score", "val.split_hash"


def register(
    uri: str, name: str, model_uri: str, run_id: str, *, val_score: float | None, val_hash: str
) -> str:
    """Registers a logged model as a new version; makes it the champion if its val score is the best.

    There is no argument for a test score, so that none can be used to select. A model without a val score,
    or scored on another val split than the champion, is registered and never becomes champion.

    Args:
        uri: tracking URI.
        name: name of the registered model.
        model_uri: ``models:/ID`` of the logged model.
        run_id: run that logged it.
        val_score: its val score, higher is better; None if it has none.
        val_hash: hash of the val split.

    Returns:
        The version's number.

    Raises:
        Exception: from MLflow.
    """
    mlflow = mlflow_module()
    stored = client(uri)
    try:
        stored.create_registered_model(name)
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    model_id = model_uri.removeprefix("models:/")
    tags = {VAL: val_hash} | ({} if val_score is None else {SCORE: repr(float(val_score))})
    source = stored.get_logged_model(model_id).artifact_location
    version = stored.create_model_version(name, source, run_id=run_id, tags=tags, model_id=model_id).version
    if val_score is not None and _beats(champion_of(uri, name), val_score, val_hash):
        stored.set_registered_model_alias(name, CHAMPION, version)
    return str(version)


def champion_of(uri: str, name: str) -> Any:
    """Returns the version with the champion alias; None if there is none."""
    mlflow = mlflow_module()
    try:
        return client(uri).get_model_version_by_alias(name, CHAMPION)
    except mlflow.MlflowException:
        return None


def _beats(champion: Any, val_score: float, val_hash: str) -> bool:
    if champion is None:
        return True
    if champion.tags.get(VAL) != val_hash:
        logger.warning("keeping champion %s, which was chosen on another val split", champion.version)
        return False
    return val_score > float(champion.tags[SCORE])


def versions_of_run(uri: str, name: str, run_id: str) -> list[str]:
    """Returns the numbers of the versions that a run has registered."""
    found = client(uri).search_model_versions(f"name = '{name}'")
    return [str(version.version) for version in found if version.run_id == run_id]
