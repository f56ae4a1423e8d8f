"""MLflow: runs, metrics, pictures, data sets and models. ``client`` is the only file that imports mlflow."""

from cluster.tracking.described import benchmark_name, processing_tag, run_tags, split_tags
from cluster.tracking.location import resolve_tracking_uri
from cluster.tracking.revision import git_revision
from cluster.tracking.run import RunHandle, check_metric_names, finish_open_runs, status_after
from cluster.tracking.served import serve_model, use_served_model
from cluster.tracking.system import system_metrics
from cluster.tracking.tracker import Tracker, connect

__all__ = [
    "RunHandle",
    "Tracker",
    "benchmark_name",
    "check_metric_names",
    "connect",
    "finish_open_runs",
    "git_revision",
    "processing_tag",
    "resolve_tracking_uri",
    "run_tags",
    "serve_model",
    "split_tags",
    "status_after",
    "system_metrics",
    "use_served_model",
]
