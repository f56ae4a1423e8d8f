"""``make suite``: two benchmarks × two models, one of them with two seeds, from videos to one table.

The embedded benchmark and the real clips go through prepare, extract, train and evaluate, then through
``--suite`` and ``--compare``, by the commands' own argument lists. What a person relies on is checked: one
table with both benchmarks, scores that are linked to what they were measured on, mean ± deviation on the
suite's run, differences and pictures. Small sizes: the numbers mean nothing.

The steps share one process and one Ray, to save their starts; ``--suite`` and ``--compare`` are processes of
their own. The outputs stay, for ``make screenshots`` and ``make ui GARE_ROOT=build/suite``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
ROOT = REPOSITORY / "build" / "suite"
#: In the folder of an earlier run, and proof that it may be deleted.
RECORD = "suite.json"
SUITE = "ci"
#: Two seeds have a deviation, one has none.
RUNS = {"synthetic": ("baseline-0", "gare-0", "baseline-1", "gare-1"), "real": ("baseline-0", "gare-0")}
#: Arguments of a benchmark by its name; small, so that all of it takes minutes on two cores.
EMBEDDED = [
    *("--config", "conf/demo.yaml", "name=synthetic"),
    *("data.num_train=256", "data.num_val=32", "data.num_test=48"),
    # Few steps: at the demo's rates a warm-up this short leads nowhere.
    *("train.epochs=4", "train.clip_lr=5e-4", "train.lr=5e-4", "train.diagnostics_every=10"),
]
REAL = [
    *("--config", "conf/own.yaml", "name=real", "data.val_fraction=0.2", "data.test_fraction=0.4"),
    *("extract.num_frames=4", "model.max_frames=4", "train.epochs=6", "train.batch_size=16"),
    "train.diagnostics_every=5",
]
SCORE = "test/t2v/R1"


def benchmarks() -> dict[str, list[str]]:
    """Arguments by benchmark; without the shared clips the embedded one alone, unless they are required."""
    shared = Path(os.environ.get("GARE_SHARED") or REPOSITORY.parent / "shared").resolve() / "data"
    if (shared / "captions.json").exists():
        clips = [f"data.videos={shared / 'videos'}", f"data.captions={shared / 'captions.json'}"]
        return {"synthetic": EMBEDDED, "real": [*REAL, *clips]}
    say(f"the real clips are not at {shared} (GARE_SHARED): the embedded benchmark alone")
    if os.environ.get("GARE_REQUIRE_SHARED") == "1":
        sys.exit(1)
    return {"synthetic": EMBEDDED}


def say(line: str) -> None:
    sys.stderr.write(f"suite: {line}\n")


class Commands:
    """Commands as a person types them, and the seconds that each step took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def here(self, step: str, *arguments: str) -> dict[str, Any]:
        """A step in this process, which holds Ray."""
        from cluster.command import execute
        from pipelines import evaluate, extract, prepare, train

        module: Any = {"prepare": prepare, "extract": extract, "train": train, "evaluate": evaluate}[step]
        stdout = io.StringIO()
        with self._timed(step, arguments), contextlib.redirect_stdout(stdout):
            status = execute(module.run, "", arguments, getattr(module, "FLAGS", {}))
        assert status == 0, f"{step} ended with {status}"
        result: dict[str, Any] = json.loads(stdout.getvalue())
        return result

    def alone(self, step: str, *arguments: str) -> tuple[dict[str, Any], str]:
        """A step as a process of its own; its result and what it printed for a person."""
        with self._timed(step, arguments):
            line = [sys.executable, f"pipelines/{step}.py", *arguments]
            done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{step} ended with {done.returncode}\n{done.stderr}"
        return json.loads(done.stdout), done.stderr

    @contextlib.contextmanager
    def _timed(self, step: str, arguments: tuple[str, ...]) -> Any:
        say(f"python pipelines/{step}.py {shlex.join(arguments)}")
        started = time.monotonic()
        yield
        taken = time.monotonic() - started
        self.seconds[step] += taken
        say(f"{step} took {taken:.1f} s")


def model_arguments(run: str) -> list[str]:
    """Arguments of a run of ``RUNS``; one worker, since a second takes longer to start than it saves."""
    model, _, seed = run.partition("-")
    increment = f"model.increment={str(model == 'gare').lower()}"
    return [f"train.run={run}", f"train.seed={seed}", increment, "cluster.train_workers=1"]


def train_and_evaluate(commands: Commands, chosen: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    """All runs of all benchmarks; results of evaluate by DATA SET/RUN."""
    from cluster.runtime.session import ray_session
    from gare.config import load_config

    results = {}
    with ray_session(load_config(REPOSITORY / "conf" / "demo.yaml").cluster):
        for name, arguments in chosen.items():
            commands.here("prepare", *arguments)
            commands.here("extract", *arguments)
            for run in RUNS[name]:
                trained = commands.here("train", *arguments, *model_arguments(run))
                scored = commands.here("evaluate", *arguments, *model_arguments(run))
                results[f"{name}/{run}"] = scored | {"model": trained["mlflow_model"]}
    return results


def check_runs(store: Any, results: Mapping[str, dict[str, Any]]) -> None:
    """Every run has the one key, with the value of its result, linked to the data set of its benchmark."""
    measured_on = defaultdict(set)
    for name, result in results.items():
        run = store.get_run(result["mlflow_run_id"])
        assert run.info.run_name == name
        assert run.data.metrics[SCORE] == result["metrics"]["t2v/R1"]
        model = store.get_logged_model(result["model"].removeprefix("models:/"))
        [metric] = [one for one in model.metrics if one.key == SCORE]
        linked = {(one.dataset.name, one.dataset.digest) for one in run.inputs.dataset_inputs}
        assert (metric.dataset_name, metric.dataset_digest) in linked, f"{name}: no data set of its score"
        assert run.data.tags["split_hash"].startswith(metric.dataset_digest)
        measured_on[name.partition("/")[0]].add(metric.dataset_digest)
    # One data set a benchmark, and none that two of them share.
    assert all(len(digests) == 1 for digests in measured_on.values()), measured_on
    assert len(set.union(*measured_on.values())) == len(measured_on), measured_on


def check_suite(store: Any, suite: Mapping[str, Any], results: Mapping[str, dict[str, Any]]) -> None:
    """Mean and deviation of every setting are on the parent run, and its children are the runs."""
    parent = store.get_run(suite["mlflow_run_id"])
    by_setting = defaultdict(list)
    for name, result in results.items():
        by_setting[name.rpartition("-")[0]].append(result["metrics"]["t2v/R1"])
        tags = store.get_run(result["mlflow_run_id"]).data.tags
        assert tags["mlflow.parentRunId"] == parent.info.run_id, f"{name} is no child of the suite"
    for setting, scores in by_setting.items():
        found = {key: parent.data.metrics.get(f"{setting}/t2v/R1/{key}") for key in ("mean", "deviation")}
        expected = [statistics.fmean(scores), statistics.stdev(scores) if len(scores) > 1 else None]
        assert found == dict(zip(found, expected, strict=True)), (setting, found, scores)


def check_table(store: Any, result: Mapping[str, Any], printed: str, words: list[str]) -> None:
    """The table is printed, on disk and in MLflow, as text and as a picture, with all that was asked for."""
    text = Path(result["table"]).read_text()
    assert text in printed
    for word in words:
        assert word in text, f"{word!r} is not in\n{text}"
    assert Path(result["picture"]).read_bytes().startswith(b"\x89PNG")
    files = {one.path for one in store.list_artifacts(result["mlflow_run_id"])}
    assert {"table.md", "figures"} <= files, files


def main() -> None:
    """Runs everything in an empty folder and checks it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="where outputs stay")
    root: Path = parser.parse_args().root.resolve()
    if root.exists() and any(root.iterdir()) and not (root / RECORD).exists():
        sys.exit(f"error: {root}: is not empty and not of an earlier suite (accepted: another --root)")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    (root / RECORD).write_text("{}\n")
    os.chdir(REPOSITORY)
    os.environ["GARE_ROOT"] = str(root)
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)
    # A report waits for Ray's controller, which by default looks every two seconds; an epoch is less.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # Towers this small spend threads on waiting for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.monotonic()
    commands, chosen = Commands(), benchmarks()
    results = train_and_evaluate(commands, chosen)
    first = next(iter(chosen.values()))
    names = json.dumps([f"{name}/{run}" for name in chosen for run in RUNS[name]])
    suite, printed = commands.alone("evaluate", *first, "--suite", SUITE, f"evaluate.runs={names}")
    pair = RUNS["synthetic"][:2]
    compared, said = commands.alone("evaluate", *first, "--compare", *pair)

    from cluster.tracking import resolve_tracking_uri
    from cluster.tracking.client import client

    store = client(resolve_tracking_uri("sqlite:///mlflow.db", str(root)))
    check_runs(store, results)
    check_suite(store, suite, results)
    check_table(store, suite, printed, [*results, *(f"## {name}" for name in chosen), "mean of 2 seeds"])
    both = [f"{name}/{run}" for name in chosen for run in pair]
    check_table(store, compared, said, [*both, "second − first, 95 % interval"])
    for name in chosen:
        assert f"{name}/t2v/R1/difference" in compared["numbers"]
    seconds = {step: round(value, 1) for step, value in commands.seconds.items()}
    record = {"runs": {name: one["mlflow_run_id"] for name, one in results.items()}, "seconds": seconds}
    record |= {"suite": suite["mlflow_run_id"], "comparison": compared["mlflow_run_id"]}
    (root / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    say(f"all of it in {time.monotonic() - started:.0f} s: {seconds}; outputs: make ui GARE_ROOT={root}")


if __name__ == "__main__":
    main()
