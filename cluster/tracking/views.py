"""Saved views of an experiment on MLflow's pages: three views that show runs with their scores.

MLflow's default table of runs shows times and sources, and no score. Views are tags of the experiment, in the
format of MLflow 3.17's pages for views saved by users; other versions show their default.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from typing import Any

#: Tag of an experiment that has been given its views, so that a view deleted by a user stays deleted.
MARK = "gare.views"
VERSION = "1"
#: Prefix of the tags that hold views.
VIEW = "mlflow.sharedViewState."
#: Keys of the views, as in a link to one: ``…/#/experiments/ID/runs?viewStateShareKey=scores``.
SCORES, MEANS, CHARTS = "scores", "means", "charts"
#: Columns with their widths in pixels, in order.
_WHAT = {"tags.`benchmark`": 110, "tags.`model`": 90, "tags.`seed`": 60}
_SCORES = {
    "metrics.`test/t2v/R1`": 105,
    "metrics.`test/t2v/R5`": 105,
    "metrics.`test/t2v/R10`": 110,
    "metrics.`test/t2v/MdR`": 110,
    "metrics.`test/v2t/R1`": 105,
}
_MEASURED_ON = {"tags.`N_text`": 80, "tags.`N_video`": 85, "tags.`protocol`": 330}


def experiment_tags(known: Container[str] = ()) -> dict[str, str]:
    """Returns the tags that an experiment gets once.

    Args:
        known: keys of the tags that it already has.
    """
    if MARK in known:
        return {}
    tags = {
        MARK: VERSION,
        # Otherwise the pages open in the mode for language models, which hides the model's metrics.
        "mlflow.experimentKind": "custom_model_development",
        VIEW + SCORES: _view("Scores on test, run by run", _scores()),
        VIEW + MEANS: _view("Mean over seeds", _means()),
        VIEW + CHARTS: _view("Scores on test, as charts", _charts()),
    }
    return {key: value for key, value in tags.items() if key not in known}


def _view(name: str, state: dict[str, Any]) -> str:
    return json.dumps({"name": name, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})


def _scores() -> dict[str, Any]:
    return _state(_WHAT | _SCORES | _MEASURED_ON)


def _means() -> dict[str, Any]:
    keys = [{"mode": "tag", "groupByData": name} for name in ("benchmark", "split_hash", "model")]
    return _state(_SCORES) | {"groupBy": {"aggregateFunction": "average", "groupByKeys": keys}}


def _charts() -> dict[str, Any]:
    return _state(_WHAT | _SCORES) | {"chartsSearchFilter": "^test/(t2v|v2t)/(R1|R5|R10|MdR)$"}


def _state(columns: Mapping[str, int]) -> dict[str, Any]:
    return {
        "searchFilter": "metrics.`test/t2v/R1` >= 0",
        "orderByKey": "tags.`benchmark`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(columns),
        "columnOrder": list(columns),
        "columnWidths": dict(columns),
        "compareRunsMode": "TABLE",
        "viewMaximized": False,
        "groupBy": None,
    }
