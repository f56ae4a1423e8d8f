"""Logs: lines for people, or JSON objects for a log collector.

With ``tracking.log_format`` json, every line of a command's stderr is one object, including lines that Ray
forwards from its workers and output of libraries. Workers write such lines themselves, so that a collector
that reads Ray's log files on the nodes gets them too.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from typing import Any, Literal, TextIO

Format = Literal["text", "json"]

#: Environment variables that pass the format and the names in each line from the driver to Ray's workers.
FORMAT_VARIABLE, RUN_VARIABLE, JOB_VARIABLE = "GARE_LOG_FORMAT", "GARE_LOG_RUN", "GARE_LOG_JOB"
#: Prefix that Ray puts before a worker's line, such as ``(RayTrainWorker pid=12, ip=10.0.0.2) ``.
_FORWARDED = re.compile(r"^(?:\x1b\[\d+m)?\((?P<source>[^()]*pid=[^()]*)\)(?:\x1b\[0m)? ?(?P<line>.*)$")


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object: time, level, logger, run, job, rank, node, message, error trace.

    Args:
        run: name of the run that the process works for.
        rank: rank of a training worker; None for other processes.
    """

    def __init__(self, run: str = "", rank: int | None = None) -> None:
        super().__init__()
        self.about = {"run": run, "rank": rank, "node": socket.gethostname()}

    def format(self, record: logging.LogRecord) -> str:
        """Returns the object on one line."""
        trace = {"trace": self.formatException(record.exc_info)} if record.exc_info else {}
        return self.line(record.levelname, record.name, record.getMessage(), record.created, **trace)

    def line(self, level: str, logger: str, message: str, at_s: float | None = None, **more: str) -> str:
        """Returns a line for text that is not a log record."""
        now = datetime.datetime.now(datetime.UTC)
        at = datetime.datetime.fromtimestamp(at_s, datetime.UTC) if at_s is not None else now
        about = {"time": at.isoformat(timespec="milliseconds"), "level": level, "logger": logger}
        return json.dumps(
            about | self.about | {"job": job_id(), "message": message} | more, ensure_ascii=False
        )


class JsonStream:
    """Replaces ``sys.stderr``: passes our JSON lines through and wraps every other line in one.

    Args:
        to: stream that gets the lines.
        formatter: makes the objects.
    """

    def __init__(self, to: TextIO, formatter: JsonFormatter) -> None:
        self._to, self._formatter, self._rest = to, formatter, ""
        self.encoding = "utf-8"

    def write(self, text: str) -> int:
        """Writes complete lines and keeps the rest."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                self._to.write(self._as_object(line.rstrip("\r")) + "\n")
        return len(text)

    def _as_object(self, line: str) -> str:
        if is_object(line):
            return line
        found = _FORWARDED.match(line)
        if found and is_object(found["line"]):
            return found["line"]
        if found:
            return self._formatter.line("INFO", "worker", found["line"], source=found["source"])
        return self._formatter.line("INFO", "stderr", line)

    def flush(self) -> None:
        """Flushes the complete lines."""
        self._to.flush()

    def error(self, message: str, trace: str = "") -> None:
        """Writes why the command ends, with the trace of an unexpected error."""
        more: dict[str, Any] = {"trace": trace} if trace else {}
        self._to.write(self._formatter.line("ERROR", "command", message, **more) + "\n")

    def finish(self) -> None:
        """Writes the last line if it has no line end."""
        self.write("\n")
        self.flush()

    def isatty(self) -> bool:
        """Returns False, so that there are no progress bars and no colours."""
        return False

    def fileno(self) -> int:
        """Returns the file descriptor of the underlying stream, which child processes write to."""
        return self._to.fileno()


def is_object(line: str) -> bool:
    """Returns True if a line is one of our objects."""
    if not line.startswith("{"):
        return False
    try:
        found = json.loads(line)
    except ValueError:
        return False
    return isinstance(found, dict) and {"time", "level", "message"} <= found.keys()


def set_up_logging(
    *, replace: bool = False, log_format: Format = "text", run: str = "", rank: int | None = None
) -> None:
    """Sets up logging to stderr, one line a record; libraries log from warnings up.

    Args:
        replace: replace handlers that a library has set up, as Ray Train does in its workers.
        log_format: text for people, or json.
        run: name of the run for each JSON line.
        rank: rank of a training worker for each JSON line.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        force=replace,
    )
    if log_format == "json":
        formatter = JsonFormatter(run, rank)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(formatter)
    for name in ("gare", "cluster", "pipelines", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)
    # Ray's libraries log each of their steps; the pipelines log one line of their own.
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextlib.contextmanager
def json_lines(run: str) -> Iterator[None]:
    """Turns all output of this process and its Ray workers into JSON lines; enter it before Ray starts."""
    os.environ.update({FORMAT_VARIABLE: "json", RUN_VARIABLE: run})
    if "ray" not in sys.modules:
        # Lines of two workers often differ only in the rank, and Ray would show only one of them.
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ["RAY_COLOR_PREFIX"] = "0"
    set_up_logging(replace=True, log_format="json", run=run)
    stream = JsonStream(sys.stderr, JsonFormatter(run))
    try:
        with contextlib.redirect_stderr(stream):
            yield
            stream.finish()
    finally:
        for name in (FORMAT_VARIABLE, RUN_VARIABLE):
            os.environ.pop(name, None)


def runtime_env() -> dict[str, Any]:
    """Builds the runtime environment with which every worker process logs as this one does."""
    if os.environ.get(FORMAT_VARIABLE) != "json":
        return {}
    names = {FORMAT_VARIABLE: "json", RUN_VARIABLE: os.environ.get(RUN_VARIABLE, ""), JOB_VARIABLE: job_id()}
    return {"runtime_env": {"worker_process_setup_hook": "cluster.logs.set_up_worker", "env_vars": names}}


def set_up_worker() -> None:
    """Sets up logging in a worker process; called by Ray when the process starts."""
    set_up_logging(replace=True, log_format="json", run=os.environ.get(RUN_VARIABLE, ""))


def job_id() -> str:
    """Returns the id of ``ray job submit``, else Ray's job id of this driver, else an empty string."""
    if job := os.environ.get(JOB_VARIABLE):
        return job
    with contextlib.suppress(ValueError, KeyError):
        # Ray's job server sets this for the process that it starts.
        return str(json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"])
    ray = sys.modules.get("ray")
    if ray is None or not getattr(ray, "is_initialized", bool)():
        return ""
    return str(ray.get_runtime_context().get_job_id())
