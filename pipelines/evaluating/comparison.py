"""Part of evaluate: compares scored runs, or collects them in one table; not a step of its own."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from cluster.layout import layout
from cluster.tracking import Tracker, connect
from gare.config import Config
from gare.errors import DataError
from gare.report.table_picture import table_picture
from gare.retrieval.results.evaluation import (
    ZERO_SHOT,
    Evaluation,
    evaluation_pairs,
    evaluations_named,
    read_evaluation,
    runs_of,
)
from gare.retrieval.results.table import ScoreTable, comparison_table, suite_table
from gare.storage.files import exists, join, read_json, write_atomically, write_json
from gare.storage.run_folder import RESULT, RunFolder
from gare.train.checkpoint.files import read_config

#: Prefix of an MLflow run's tags that name the folder of the evaluation of each split.
FOLDER_TAG = "evaluation.folder."


def compare(config: Config) -> dict[str, Any]:
    """Compares two runs; runs named by RUN alone are compared in all data sets that have both.

    Raises:
        DataError: for runs that were not evaluated.
        GareError: if MLflow cannot be reached.
    """
    places, chosen = layout(config), config.evaluate
    tracker = connect(config.tracking, places.root)
    first, second = (_folder_of(config, tracker, run) for run in chosen.compare)
    pairs = [
        (read_evaluation(one), read_evaluation(other))
        for one, other in evaluation_pairs(places.root, first, second, chosen.split)
    ]
    title = f"{chosen.compare[0]} and {chosen.compare[1]}"
    table = comparison_table(pairs, resamples=chosen.resamples or 1000, seed=chosen.seed, title=title)
    name = "--".join(run.replace("/", ".") for run in chosen.compare)
    return _log_table(table, tracker, config, f"compare {title}", join(places.root, "comparisons", name), [])


def _folder_of(config: Config, tracker: Tracker, run: str) -> str:
    """Returns the run's name unchanged, or for an MLflow run id the folder of its evaluation.

    Raises:
        DataError: for an MLflow run without an evaluation of the split, or whose results were replaced.
        GareError: if MLflow has no such run.
    """
    if not re.fullmatch(r"[0-9a-f]{32}", run):
        return run
    split = config.evaluate.split
    folder = tracker.tags_of(run).get(FOLDER_TAG + split)
    if not folder:
        raise DataError(f"the run has no evaluation of {split}", where=f"MLflow run {run}")
    location = join(folder, RESULT)
    now = read_json(location).get("mlflow_run_id", run) if exists(location) else ""
    # A training's folder may be evaluated again; one of zero-shot results holds those of the latest towers.
    if now == run or not (now or folder.rsplit("/", 2)[1] == ZERO_SHOT):
        return folder
    raise DataError(
        f"its results of {split} were replaced by those of "
        + (f"MLflow run {now}" if now else "other towers, of which this split is not evaluated"),
        where=f"MLflow run {run}",
        accepted="evaluate it again, or another run; its own numbers are in MLflow still",
    )


def collect(config: Config, evaluate: Callable[[Config], Any]) -> dict[str, Any]:
    """Collects ``evaluate.runs`` under one MLflow run; evaluates the others first, as they were trained.

    Args:
        config: configuration of the suite.
        evaluate: function that scores a run.

    Raises:
        DataError: if there is no run.
        GareError: if MLflow cannot be reached.
    """
    places, chosen = layout(config), config.evaluate
    tracker = connect(config.tracking, places.root)
    folders: list[str] = []
    for name in chosen.runs or runs_of(places.root, config.name):
        folder = _folder_of(config, tracker, name)
        found = (
            [folder] if folder != name else list(evaluations_named(places.root, name, chosen.split).values())
        )
        folders += [one for one in found if one not in folders]
    if not folders:
        raise DataError("there is no run", where="evaluate.runs", accepted="runs that were trained")
    for folder in list(folders):
        if exists(join(folder, RESULT)):
            continue
        if folder.rsplit("/", 2)[1] == ZERO_SHOT:
            if chosen.runs:
                raise DataError(
                    f"has no evaluation of {chosen.split}", where=folder, accepted="evaluate.py --zero-shot"
                )
            folders.remove(folder)
        else:
            trained = read_config(RunFolder.of_evaluation(folder).best)
            plain = chosen.model_copy(update={"suite": "", "runs": (), "checkpoint": ""})
            kept = {"storage": config.storage, "tracking": config.tracking, "cluster": config.cluster}
            evaluate(trained.model_copy(update={"evaluate": plain, **kept}))
    runs = [read_evaluation(folder) for folder in folders]
    table = suite_table(runs, title=f"suite {chosen.suite}")
    return _log_table(table, tracker, config, chosen.suite, join(places.root, "suites", chosen.suite), runs)


def _log_table(
    table: ScoreTable,
    tracker: Tracker,
    config: Config,
    name: str,
    folder: str,
    children: Sequence[Evaluation],
) -> dict[str, Any]:
    """Prints the table, writes and logs it as Markdown and picture; a suite resumes its MLflow run."""
    markdown, picture = table.markdown(), table_picture(table)
    write_atomically(join(folder, "table.md"), markdown.encode())
    write_atomically(join(folder, "table.png"), picture)
    record = join(folder, RESULT)
    run_id = read_json(record)["mlflow_run_id"] if exists(record) else None
    tags = {"kind": "suite" if children else "comparison", "split": config.evaluate.split}
    handle = tracker.start_run(name, run_id=run_id, tags=tags)
    handle.log_metrics(table.numbers, 0)
    handle.log_text("table.md", markdown)
    handle.describe(table.note())
    handle.log_figure_bytes("table.png", picture)
    for child in children:
        if child.mlflow_run_id:
            tracker.nest(child.mlflow_run_id, handle)
    handle.finish()
    # stdout is for the result; text for people goes where the logs go.
    sys.stderr.write(markdown)
    result = {
        "table": join(folder, "table.md"),
        "picture": join(folder, "table.png"),
        "numbers": table.numbers,
        "notes": [note for section in table.sections for note in section.notes],
        "mlflow_run_id": handle.run_id,
    }
    write_json(record, result)
    return result
