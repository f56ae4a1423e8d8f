"""study: a grid of settings, trained with several seeds, to one table with intervals and one figure."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from cluster.runtime.signals import take_signals

    take_signals()

import logging
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from cluster.command import Flag, main
from cluster.layout import layout
from cluster.runtime.devices import require_usable_gpus
from cluster.runtime.resources import (
    cpus_of_worker,
    nodes,
    num_cpus,
    num_gpus,
    resolve,
    usable_gpus,
)
from cluster.runtime.session import ray_session, unwrap_gare_error
from cluster.runtime.signals import raise_if_asked
from cluster.tracking import RunHandle, Tracker, connect
from gare.config import Config
from gare.errors import ConfigError, GareError
from gare.retrieval.results.evaluation import Evaluation, read_evaluation
from gare.storage.files import exists, join, read_json, write_atomically, write_json
from gare.storage.run_folder import RESULT, RunFolder
from gare.study.plan import PlannedRun, StudyPlan, as_typed, plan_study, read_study
from gare.study.results import StudyResults, at_end, summarise
from gare.train.checkpoint.history import History
from pipelines import evaluate, extract, import_features, prepare, train
from pipelines.sizes import sizes_of_weights
from pipelines.study_records import StudyRecords, training_of
from pipelines.training.precision import with_precision

logger = logging.getLogger(__name__)

FLAGS = {
    "--study": Flag("study.file", "the study: a YAML file, or the name of one in conf/studies"),
    "--seeds": Flag("study.seeds", "seeds of each setting"),
    "--only": Flag("study.only", "settings to run now, by the names that --dry-run prints, A,B"),
    "--dry-run": Flag("study.dry_run", "only say what would be run, and about how long it takes", "true"),
}


def run(config: Config) -> dict[str, Any]:
    """Runs what is missing of a study, and writes its table and figure.

    Each run has the name STUDY-SETTING-seedN below its data set, as if it had been trained by itself. Runs
    that are done are not repeated, also days later; one that was interrupted is continued. A training that
    another study has made already, with the same settings and data, is taken from there.

    Raises:
        ConfigError: for a study with a fault, or whose finished runs have other settings.
        GareError: if a run failed, after the others have been run and the table written.
    """
    if not config.study.file:
        raise ConfigError("is empty", where="study.file", accepted="--study NAME, such as noise")
    name, file = read_study(config.study.file)
    seeds = None if config.study.seeds == "auto" else config.study.seeds
    plan = plan_study(config, name, file, seeds, checkpoint_of=_best_of)
    records = StudyRecords(join(layout(config).root, "studies", config.name), name)
    left = records.left_of(plan.select(config.study.only))
    if config.study.dry_run:
        return _say_plan(plan, records, left, reuse=config.study.reuse)
    started = time.monotonic()
    failed: dict[str, GareError] = {}
    if left:
        with ray_session(config.cluster):
            for one in {run.config.name: run.config for run in left}.values():
                _make_data(one)
            # What others start from comes first; where it failed, they are left.
            starts = [one for one in left if one.cell.is_start]
            failed = _run_all(config, records, starts)
            ready = [one for one in left if not one.cell.is_start]
            ready = [one for one in ready if one.start is None or one.start.name not in failed]
            failed |= _run_all(config, records, ready)
    result = _finish(config, plan, records, time.monotonic() - started)
    if failed:
        first = next(iter(failed.values()))
        raise GareError(
            f"{len(failed)} of {len(left)} runs failed: {', '.join(failed)}; the first: {first}",
            where=f"study {name}",
            accepted="the same command again, which continues with what is missing",
        )
    return result


def _say_plan(
    plan: StudyPlan, records: StudyRecords, left: Sequence[PlannedRun], *, reuse: bool
) -> dict[str, Any]:
    """Prints the settings, and how long what is left takes if runs of the study are done already."""
    done = records.seconds([*plan.starts, *plan.runs])
    each = statistics.median(done) if done else None
    same = [run.name for run, _ in records.find_same(left, lambda _: "")] if reuse else []
    seconds = None if each is None else each * (len(left) - len(same))
    lines = [
        f"{plan.file.title}: {len(plan.cells)} settings × {len(plan.seeds)} seeds = {len(plan.runs)} runs, "
        + (f"after {len(plan.starts)} that they start from, " if plan.starts else "")
        + f"{len(left)} left"
        + (f", {len(same)} of them trained already in other studies" if same else ""),
    ]
    for cell in plan.cells:
        settings = (
            ", ".join(f"{key}={as_typed(value)}" for key, value in cell.settings.items()) or "as configured"
        )
        lines.append(f"  {cell.name}: {settings}")
    lines.append(
        f"about {_minutes(seconds)} one after the other, from the {len(done)} that are done"
        if seconds is not None
        else "how long a run takes is known after the first one"
    )
    sys.stderr.write("\n".join(lines) + "\n")
    return {
        "study": plan.name,
        "runs": len(plan.starts) + len(plan.runs),
        "left": [run.name for run in left],
        "same": same,
        "seconds_each": each,
        "seconds": None if seconds is None else round(seconds, 1),
    }


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _make_data(config: Config) -> None:
    """Prepares a data set and extracts what is missing of it, or imports its features."""
    raise_if_asked()
    logger.info("data set %s", config.name)
    if config.data.is_imported:
        import_features.run(config)
        return
    prepare.run(config)
    extract.run(config)


def _run_all(config: Config, records: StudyRecords, left: Sequence[PlannedRun]) -> dict[str, GareError]:
    """Runs what is left as Ray tasks, several at a time; returns the errors of those that failed, by run."""
    import ray

    if config.study.reuse:
        left = _take_same(records, left)
    if not left:
        return {}

    # No resources of their own: the trainings that they start reserve them.
    task: Any = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy="SPREAD")(_train_and_evaluate)
    parallel = _parallel(config, left[0].config)
    logger.info("%d runs, %d at a time", len(left), parallel)
    waiting = list(left)
    pending: dict[Any, PlannedRun] = {}
    failed: dict[str, GareError] = {}
    started, done = time.monotonic(), 0
    try:
        while waiting or pending:
            while waiting and len(pending) < parallel:
                one = waiting.pop(0)
                pending[task.options(name=one.name).remote(_with_start(one, records))] = one
            ready, _ = ray.wait(list(pending), timeout=1.0)
            raise_if_asked()
            for reference in ready:
                one = pending.pop(reference)
                try:
                    result = ray.get(reference)
                except Exception as error:
                    failed[one.name] = unwrap_gare_error(error) or GareError(
                        f"{type(error).__name__}: {error}"
                    )
                    logger.error("%s failed: %s", one.name, failed[one.name])
                    continue
                records.add(one, result)
                done += 1
                rest = len(waiting) + len(pending)
                about = (time.monotonic() - started) / done * rest
                logger.info(
                    "%s: %s %.2f after %s; %d of %d left, about %s",
                    *(one.name, "t2v R@1", result["metrics"]["t2v/R1"], _minutes(result["seconds"])),
                    *(rest, len(left), _minutes(about)),
                )
    finally:
        for reference in pending:
            # As Ctrl-C does: a training then keeps a checkpoint and says so.
            ray.cancel(reference, force=False, recursive=True)
    return failed


def _take_same(records: StudyRecords, left: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Records the trainings that other studies have made already; returns the runs that are left."""
    precisions: dict[str, str] = {}

    def precision_of(one: Config) -> str:
        key = one.cluster.model_dump_json()
        if key not in precisions:  # GPUs are asked once
            precisions[key] = "unknown"
            # If others hold the GPUs, nothing is the same; a training waits for them.
            with suppress(GareError):
                cluster = resolve(one.cluster, one.train.batch_size, nodes())
                resolved = one.model_copy(update={"cluster": cluster})
                resolved = with_precision(resolved, have_bf16=require_usable_gpus(cluster))
                precisions[key] = resolved.train.precision
        return precisions[key]

    found = records.find_same(left, precision_of)
    for run, record in found:
        other = records.take(run, record)
        logger.info("%s: taken from %s, which has the same settings and data", run.name, other)
    taken = {run.name for run, _ in found}
    return [run for run in left if run.name not in taken]


def _with_start(run: PlannedRun, records: StudyRecords) -> Config:
    """Returns a run's settings, with the place of the weights that it starts from, or has started from."""
    if run.start is None:
        return run.config
    own = RunFolder(layout(run.config).run(run.name))
    checkpoint = training_of(records.read(run.start)).best
    if own.has_begun:
        checkpoint = own.read_record()["settings"]["train"]["start_from"]
    train = run.config.train.model_copy(update={"start_from": checkpoint})
    return run.config.model_copy(update={"train": train})


def _best_of(config: Config) -> str:
    """Returns the folder of the best checkpoint that a run has or will have."""
    return RunFolder(layout(config).run(config.train.run)).best


def _parallel(config: Config, one: Config) -> int:
    """Returns how many trainings run at a time: as many as CPUs or GPUs are there for their workers."""
    if config.study.parallel != "auto":
        return config.study.parallel
    resolved = resolve(one.cluster, one.train.batch_size, nodes())
    workers = resolved.train_workers
    if resolved.use_gpu and usable_gpus(config.cluster):
        return max(1, num_gpus() // workers)
    return max(1, int(num_cpus() // (workers * cpus_of_worker(resolved))))


def _train_and_evaluate(config: Config) -> dict[str, Any]:
    """Trains and scores one run, in a process of its own."""
    started = time.monotonic()
    trained = train.run(config)
    scored = evaluate.run(config)
    return {
        "evaluation": layout(config).evaluation(config.train.run, config.evaluate.split),
        "metrics": scored["metrics"],
        "mlflow_run_id": trained["mlflow_run_id"],
        "seconds": round(time.monotonic() - started, 2),
    }


def _finish(config: Config, plan: StudyPlan, records: StudyRecords, seconds: float) -> dict[str, Any]:
    """Writes and logs the table and the figure of all that is done."""
    from gare.study.report import diagnostics_figure, study_figure, study_table

    evaluations: dict[tuple[str, int], Evaluation] = {}
    diagnostics: dict[tuple[str, int], dict[str, float]] = {}
    children: list[str] = []
    taken: dict[str, str] = {}
    for one in (*plan.starts, *plan.runs):
        if not records.is_done(one):
            continue
        record = records.read(one)
        other = record.get("taken_from")
        if not other:  # a run has one parent in MLflow, so another study's stays where it is
            children.append(record["mlflow_run_id"])
        if not one.cell.is_start:
            taken |= {one.name: other} if other else {}
            evaluations[one.cell.name, one.seed] = read_evaluation(record["evaluation"])
            history = training_of(record).history
            if exists(history):
                diagnostics[one.cell.name, one.seed] = at_end(History.read(history).steps)
    results = summarise(plan, evaluations, diagnostics, taken)
    markdown = study_table(results)
    pictures = {"study.png": study_figure(results), "diagnostics.png": diagnostics_figure(results)}
    drawn = {name: picture for name, picture in pictures.items() if picture}
    write_atomically(join(records.uri, "table.md"), markdown.encode())
    for name, picture in drawn.items():
        write_atomically(join(records.uri, name), picture)
    sys.stderr.write(markdown)
    places = layout(config)
    run_id = _log(connect(config.tracking, places.root), plan, records, results, (markdown, drawn), children)
    result = {
        "study": plan.name,
        "table": join(records.uri, "table.md"),
        "figure": join(records.uri, "study.png"),
        "done": len(evaluations),
        "missing": list(results.missing),
        "taken": taken,
        "comparisons": [_comparison(one, plan.file.measure) for one in results.comparisons],
        "mlflow_run_id": run_id,
        "seconds": round(seconds, 2),
    }
    write_json(join(records.uri, RESULT), result)
    return result


def _comparison(one: Any, measure: str) -> dict[str, Any]:
    effect = one.effects.get(measure)
    return {
        "setting": one.cell.name,
        "against": one.reference.name,
        "measure": measure,
        "difference": effect and effect.difference,
        "interval": effect and [effect.low, effect.high],
        "p_value": effect and effect.p_value,
        "p_corrected": effect and one.corrected,
        "detectable": effect and effect.detectable,
        "found": one.verdict(measure),
        "expected": one.expected,
    }


def _log(
    tracker: Tracker,
    plan: StudyPlan,
    records: StudyRecords,
    results: StudyResults,
    pages: tuple[str, Mapping[str, bytes]],
    children: Sequence[str],
) -> str:
    """Writes one MLflow run for the study, above those of its trainings; returns its id."""
    markdown, pictures = pages
    record = join(records.uri, RESULT)
    run_id = read_json(record)["mlflow_run_id"] if exists(record) else None
    tags = {"kind": "study", "split": plan.file.split, "study": plan.name}
    handle: RunHandle = tracker.start_run(f"study {plan.name}", run_id=run_id, tags=tags)
    handle.log_metrics(results.numbers(), 0)
    handle.log_text("table.md", markdown)
    handle.describe(markdown)
    for name, picture in pictures.items():
        handle.log_figure_bytes(name, picture)
    for child in children:
        tracker.nest(child, handle)
    handle.finish()
    return handle.run_id


if __name__ == "__main__":
    main(run, __doc__, FLAGS, sizes_of_weights)
