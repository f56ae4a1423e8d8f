"""Logs: lines for people, or JSON objects for a log collector.

With ``tracking.log_format`` json every line of a command's stderr is one object, also what Ray forwards from
its workers and what libraries print. Workers write such lines themselves, so that a collector which reads
Ray's log files on the nodes gets them too.
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

#: Carry the format and what each line names from the driver to Ray's workers.
FORMAT_VARIABLE, RUN_VARIABLE, JOB_VARIABLE = "GARE_LOG_FORMAT", "GARE_LOG_RUN", "GARE_LOG_JOB"
#: What Ray puts before a line of a worker, as ``(RayTrainWorker pid=12, ip=10.0.0.2) ``.
_FORWARDED = re.compile(r"^(?:\x1b\[\d+m)?\((?P<source>[^()]*pid=[^()]*)\)(?:\x1b\[0m)? ?(?P<line>.*)$")


class JsonFormatter(logging.Formatter):
    """A record as one JSON object: time, level, logger, run, job, rank, node, message, and an error's trace.

    Args:
        run: the run that the process works for.
        rank: of a training worker; none for others.
    """

    def __init__(self, run: str = "", rank: int | None = None) -> None:
        super().__init__()
        self.about = {"run": run, "rank": rank, "node": socket.gethostname()}

    def format(self, record: logging.LogRecord) -> str:
        """The object, on one line."""
        trace = {"trace": self.formatException(record.exc_info)} if record.exc_info else {}
        return self.line(record.levelname, record.name, record.getMessage(), record.created, **trace)

    def line(self, level: str, logger: str, message: str, at_s: float | None = None, **more: str) -> str:
        """A line of something that is no record."""
        now = datetime.datetime.now(datetime.UTC)
        at = datetime.datetime.fromtimestamp(at_s, datetime.UTC) if at_s is not None else now
        about = {"time": at.isoformat(timespec="milliseconds"), "level": level, "logger": logger}
        return json.dumps(
            about | self.about | {"job": job_id(), "message": message} | more, ensure_ascii=False
        )


class JsonStream:
    """Takes the place of ``sys.stderr``: what is one of our objects passes, all else becomes one.

    Args:
        to: where lines go.
        formatter: makes the objects.
    """

    def __init__(self, to: TextIO, formatter: JsonFormatter) -> None:
        self._to, self._formatter, self._rest = to, formatter, ""
        self.encoding = "utf-8"

    def write(self, text: str) -> int:
        """Writes the lines that are whole; keeps the rest."""
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
        """Hands on what is whole."""
        self._to.flush()

    def error(self, message: str, trace: str = "") -> None:
        """Writes why the command ends, with the trace of what nobody foresaw."""
        more: dict[str, Any] = {"trace": trace} if trace else {}
        self._to.write(self._formatter.line("ERROR", "command", message, **more) + "\n")

    def finish(self) -> None:
        """Writes what has no end of line."""
        self.write("\n")
        self.flush()

    def isatty(self) -> bool:
        """Never: no bars, no colours."""
        return False

    def fileno(self) -> int:
        """File descriptor of where lines go: child processes write there."""
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
    """One line a record on stderr; libraries from warnings up.

    Args:
        replace: take the place of what a library has set up already, as Ray Train does in its workers.
        log_format: text for people, or json.
        run: named in each JSON line.
        rank: of a training worker; named likewise.
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
    # Ray's libraries report every step of theirs; the pipelines have one line of their own.
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextlib.contextmanager
def json_lines(run: str) -> Iterator[None]:
    """Makes all that this process and its Ray workers say meanwhile JSON; comes before Ray is started."""
    os.environ.update({FORMAT_VARIABLE: "json", RUN_VARIABLE: run})
    if "ray" not in sys.modules:
        # Lines of two workers differ in little else than the rank, and Ray would show one of them.
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
    """Called by Ray in each worker process that starts."""
    set_up_logging(replace=True, log_format="json", run=os.environ.get(RUN_VARIABLE, ""))


def job_id() -> str:
    """The id of ``ray job submit``, else Ray's number of this driver once Ray runs, else nothing."""
    if job := os.environ.get(JOB_VARIABLE):
        return job
    with contextlib.suppress(ValueError, KeyError):
        # What Ray's job server gives the process that it starts.
        return str(json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"])
    ray = sys.modules.get("ray")
    if ray is None or not getattr(ray, "is_initialized", bool)():
        return ""
    return str(ray.get_runtime_context().get_job_id())
