"""JSON lines: one object a line whatever writes it, so that a collector never meets anything else."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.logs import JsonFormatter, JsonStream, job_id, runtime_env

FIELDS = {"time", "level", "logger", "run", "job", "rank", "node", "message"}


@pytest.fixture
def formatter() -> JsonFormatter:
    return JsonFormatter("tiny/first", rank=1)


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_record_has_what_a_collector_filters_by(formatter: JsonFormatter) -> None:
    """Without run and rank the lines of two runs and their workers cannot be told apart."""
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.getLogger("gare.x").makeRecord(
            "gare.x", logging.WARNING, __file__, 1, "step %d:\nué", (7,), sys.exc_info()
        )
    line = formatter.format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert found.keys() == FIELDS | {"trace"}
    assert found["message"] == "step 7:\nué"
    assert (found["level"], found["logger"], found["run"], found["rank"]) == (
        "WARNING",
        "gare.x",
        "tiny/first",
        1,
    )
    assert found["time"].endswith("+00:00")
    assert "ValueError: two" in found["trace"]


def test_what_is_no_object_becomes_one(formatter: JsonFormatter) -> None:
    """Ray puts a worker's name before its lines, and libraries print what they like."""
    held = io.StringIO()
    stream = JsonStream(held, formatter)
    ours = formatter.line("INFO", "gare", "step 1")
    for text in (
        ours + "\n",
        f"(RayTrainWorker pid=12, ip=10.0.0.2) {ours}\n",
        f"\x1b[36m(RayTrainWorker pid=12)\x1b[0m {ours}\n",
        "(raylet pid=3) it spills\n",
        "plain",
        " text\n\n",
        '{"not": "ours"}\n{broken\n',
        "the rest",
    ):
        stream.write(text)
    stream.finish()
    lines = held.getvalue().splitlines()
    assert lines[:3] == [ours] * 3
    others = objects("\n".join(lines[3:]))
    assert [one["message"] for one in others] == [
        "it spills",
        "plain text",
        '{"not": "ours"}',
        "{broken",
        "the rest",
    ]
    assert others[0]["source"] == "raylet pid=3"
    assert all(one.keys() >= FIELDS for one in others)


def test_the_id_of_a_submitted_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The person knows the job by what ``ray job submit`` printed, not by Ray's own number."""
    monkeypatch.delenv("GARE_LOG_JOB", raising=False)
    config = {"metadata": {"job_submission_id": "extract-1"}, "runtime_env": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))
    assert job_id() == "extract-1"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert job_id() != "extract-1"


def test_text_asks_nothing_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook in every worker process is only for those who want it."""
    monkeypatch.delenv("GARE_LOG_FORMAT", raising=False)
    assert runtime_env() == {}


STEP = """
import logging, sys, threading
from cluster.command import execute
from gare.errors import DataError

def run(config):
    logging.getLogger("pipelines.x").info("it runs")
    print("a library prints")
    if config.train.run == "bad":
        raise DataError("is missing", where="a.mp4", accepted="a\\nvideo")
    if config.train.run == "worse":
        raise RuntimeError("unforeseen")
    if config.train.run == "ray":
        import ray
        from cluster.runtime.session import ray_session

        # Ray forwards when it likes; a driver that ends before that shows nothing of it.
        there, write = threading.Event(), sys.stderr.write

        def listen(text):
            if "printed by a worker" in text:
                there.set()
            return write(text)

        sys.stderr.write = listen
        with ray_session(config.cluster):
            @ray.remote
            def work():
                logging.getLogger("gare.worker").warning("from a worker")
                print("printed by a worker", flush=True)
                return ray.get_runtime_context().get_job_id()

            job = ray.get(work.remote())
            assert there.wait(120)
            return {"done": True, "job": job}
    return {"done": True}

sys.exit(execute(run, "", sys.argv[1:], {}))
"""


def command(tmp_path: Path, repository: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "own.yaml"
    file.write_text("tracking:\n  log_format: json\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GARE_LOG")}
    return subprocess.run(
        [sys.executable, "-c", STEP, "--config", str(file), *overrides],
        cwd=repository,
        env=environment | {"PYTHONPATH": str(repository), "RAY_AUTH_TOKEN": "0" * 64},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(("run", "status"), [("first", 0), ("bad", 3), ("worse", 4)])
def test_every_line_of_a_command_is_an_object(
    run: str, status: int, tmp_path: Path, repository: Path
) -> None:
    """One line that is none stops a collector, or is lost in it: the error most of all."""
    done = command(tmp_path, repository, f"train.run={run}")
    assert done.returncode == status
    lines = objects(done.stderr)
    assert [line["message"] for line in lines[:2]] == ["it runs", "a library prints"]
    if run == "first":
        assert json.loads(done.stdout) == {"done": True}
        return
    assert done.stdout == ""
    assert lines[-1]["level"] == "ERROR"
    assert ("is missing" in lines[-1]["message"]) == (run == "bad")
    assert ("Traceback" in lines[-1].get("trace", "")) == (run == "worse")


def test_workers_of_ray_write_objects_too(tmp_path: Path, repository: Path) -> None:
    """What goes wrong goes wrong in the workers; their lines need the run and the job as the driver's do."""
    done = command(tmp_path, repository, "train.run=ray", "cluster.num_cpus=1", "name=tiny")
    assert done.returncode == 0, done.stderr
    lines = objects(done.stderr)
    worker = next(line for line in lines if line["message"] == "from a worker")
    assert worker.keys() == FIELDS
    assert (worker["level"], worker["logger"]) == ("WARNING", "gare.worker")
    assert worker["run"].startswith("tiny/")
    assert worker["job"] == json.loads(done.stdout.splitlines()[-1])["job"]
    assert "printed by a worker" in {line["message"] for line in lines}
