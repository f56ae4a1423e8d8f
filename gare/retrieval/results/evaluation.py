"""Evaluations read back from disk: scores, ranks, and the data that they were measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow.fs as pafs

from gare.config.run_settings import completed_settings
from gare.data.splits import split_hash
from gare.errors import DataError
from gare.retrieval.results.queries import QueryTable, read_queries
from gare.storage.files import exists, join, json_sha256, open_fs, read_json
from gare.storage.run_folder import RESULT, RunFolder

#: Name of the run of an evaluation without training, and of its model.
ZERO_SHOT = "zero-shot"
#: Properties that two evaluations must share for comparable scores, with the words for them.
MEASURED_ON = {
    "benchmark": "benchmark",
    "protocol": "protocol",
    "split": "split",
    "split_sha256": "split hash",
    "num_texts": "N_text",
    "num_videos": "N_video",
}


@dataclass(frozen=True)
class Evaluation:
    """One evaluation read from disk.

    Attributes:
        name: DATA SET/RUN.
        folder: of the evaluation.
        measured_on: the values of ``MEASURED_ON``.
        model: from ``model_label``, or ``ZERO_SHOT``; ``unknown`` for a checkpoint without its run.
        seed: of the training; None if unknown.
        settings: hash of the training's settings without seed, name and place.
        metrics: by name, such as ``t2v/R1``.
        intervals: [low, high] by name.
        queries: the table of plain ranks.
        mlflow_run_id: of the run that has the scores.
        note: remark that a reader of the scores must know; may be empty.
    """

    name: str
    folder: str
    measured_on: dict[str, Any]
    model: str
    seed: int | None
    settings: str
    metrics: dict[str, float]
    intervals: dict[str, list[float]]
    queries: QueryTable = field(repr=False)
    mlflow_run_id: str = ""
    note: str = ""

    @property
    def benchmark(self) -> str:
        """The benchmark's name; the data set's name for users' own folders, whose benchmark is ``folder``."""
        name = str(self.measured_on["benchmark"])
        return self.name.partition("/")[0] if name == "folder" else name


def read_evaluation(folder: str) -> Evaluation:
    """Reads an evaluation.

    Args:
        folder: ``…/DATA SET/runs/RUN/evaluation-SPLIT``.

    Raises:
        DataError: if it is missing or incomplete.
    """
    location = join(folder, RESULT)
    accepted = "run pipelines/evaluate.py for this run"
    if not exists(location):
        raise DataError("there is no evaluation", where=folder, accepted=accepted)
    result, queries = read_json(location), read_queries(join(folder, "ranks.parquet"))
    texts = queries.of_direction("t2v")
    columns = (map(str, texts[name].to_pylist()) for name in ("video_id", "caption"))
    pairs = zip(*columns, strict=True)
    about = queries.about
    missing = [key for key in ("benchmark", "protocol", "split") if key not in about]
    if missing or "metrics" not in result:
        raise DataError(
            f"does not say its {', '.join(missing or ['metrics'])}", where=folder, accepted=accepted
        )
    measured_on = {key: about.get(key) for key in MEASURED_ON} | {"split_sha256": split_hash(pairs)}
    run = RunFolder.of_evaluation(folder)
    # Another checkpoint, without the run's settings, may have been scored under the run's name.
    own = run.is_its_best(str(result.get("checkpoint", "")))
    record = run.read_record() if own else {}
    settings = record["settings"] if record else {}
    return Evaluation(
        run.name,
        folder,
        measured_on,
        str(result.get("model") or (model_label(settings["model"]) if "model" in settings else "unknown")),
        settings.get("train", {}).get("seed"),
        _hash_of(completed_settings(settings) if settings else {"checkpoint": result.get("checkpoint")}),
        result["metrics"],
        result.get("intervals", {}),
        queries,
        result.get("mlflow_run_id", ""),
        result.get("note", ""),
    )


def model_label(model: Mapping[str, Any]) -> str:
    """Names the kind of model, over whose seeds MLflow averages: gare, baseline, meanP or seqTransf.

    Args:
        model: settings of the section ``model``; some may be missing in those of an earlier version.
    """
    if model.get("increment", True):
        return "gare"
    if model.get("pooling") != "mean":
        return "baseline"
    return "meanP" if model.get("temporal") == "none" else "seqTransf"


def _hash_of(settings: Mapping[str, Any]) -> str:
    """Hashes a run's settings; the same for a run of an earlier version that had fewer keys."""
    kept = {key: value for key, value in settings.items() if key not in ("train", "name")}
    kept["train"] = {k: v for k, v in settings.get("train", {}).items() if k not in ("seed", "run")}
    return json_sha256(kept)


def why_not_comparable(first: Evaluation, second: Evaluation) -> list[str]:
    """Returns why scores of two evaluations must not be compared; empty if they may."""
    reasons = []
    for key, name in MEASURED_ON.items():
        mine, other = (
            value[:12] if key == "split_sha256" else value
            for value in (first.measured_on[key], second.measured_on[key])
        )
        if first.measured_on[key] != second.measured_on[key]:
            reasons.append(f"{name}: {mine} and {other}")
    return reasons


def evaluations_named(root: str, run: str, split: str) -> dict[str, str]:
    """Finds the folders of the evaluations of runs of a name, by data set.

    Args:
        root: storage root.
        run: RUN, searched in all data sets below the root, or DATA SET/RUN, which need not exist.
        split: split of the evaluation.
    """
    if "/" in run:
        data_set, _, name = run.partition("/")
        return {data_set: join(root, data_set, "runs", name, f"evaluation-{split}")}
    found = {
        data_set: join(root, data_set, "runs", run, f"evaluation-{split}") for data_set in _folders(root)
    }
    return {data_set: folder for data_set, folder in found.items() if exists(join(folder, RESULT))}


def evaluation_pairs(root: str, first: str, second: str, split: str) -> list[tuple[str, str]]:
    """Finds the folders of the evaluations of two runs, in pairs.

    Args:
        root: storage root.
        first: a run as in ``evaluations_named``, or the folder of an evaluation.
        second: the same.
        split: split of the evaluations.

    Returns:
        One pair for each data set with both runs, if both are named by RUN alone; else one pair.

    Raises:
        DataError: if there is no pair, or a name fits several data sets.
    """
    one, other = (
        {"": run} if run.count("/") > 1 else evaluations_named(root, run, split) for run in (first, second)
    )
    shared = sorted(set(one) & set(other))
    if shared:
        return [(one[data_set], other[data_set]) for data_set in shared]
    for run, found in sorted(((first, one), (second, other)), key=lambda pair: len(pair[1])):
        if len(found) != 1:
            raise DataError(
                f"{len(found)} data sets have an evaluation of {split} of it: {', '.join(found) or 'none'}",
                where=f"run {run}",
                accepted="NAME/RUN, or an MLflow run id; run pipelines/evaluate.py for it first",
            )
    return [(next(iter(one.values())), next(iter(other.values())))]


def runs_of(root: str, data_set: str) -> list[str]:
    """Lists DATA SET/RUN for everything below a data set's runs."""
    return [f"{data_set}/{run}" for run in _folders(join(root, data_set, "runs"))]


def _folders(uri: str) -> list[str]:
    filesystem, path = open_fs(uri)
    selected = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(entry.base_name for entry in selected if entry.type == pafs.FileType.Directory)
