"""cluster/runtime/signals.py: a command ends on SIGTERM and Ctrl-C in one way, at any moment."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.runtime.signals import NAMES, STATUS
from cluster.tracking.client import client

SIGNALS = [pytest.param(number, id=name) for number, name in NAMES.items()]

#: A command whose body is given; ``hit`` sends it the signal and has Python handle it.
SCRIPT = """
import os, signal, sys, threading, time
from cluster.runtime.signals import take_signals
take_signals()
NUMBER = signal.Signals({number})
def hit():
    signal.raise_signal(NUMBER)
from cluster.runtime import signals as stopping
from cluster.command import execute
from cluster.runtime.signals import workers_asked_to_end, asked_by, handlers_kept, shielded
from pathlib import Path
def say(text):
    sys.stderr.write(text + "\\n")
def run(config):
{body}
    return {{"done": True}}
{before}
status = execute(run, "", ["--config", {config!r}], {{}})
{after}
sys.exit(status)
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "any.yaml"
    path.write_text("name: any\ncluster: {num_cpus: 1}\n")  # Ray starts a worker for each of its CPUs
    return path


def end_of(
    repository: Path, config: Path, number: signal.Signals, body: str, *, before: str = "", after: str = ""
) -> subprocess.CompletedProcess[str]:
    """What is left of a command with this body."""
    indented = "\n".join(f"    {line}" for line in body.strip("\n").splitlines())
    script = SCRIPT.format(number=int(number), body=indented, before=before, after=after, config=str(config))
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=repository,
        # With buffers, as at most users: what is left in them is written when Python ends.
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def assert_interrupted(done: subprocess.CompletedProcess[str], number: signal.Signals) -> None:
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        f"error: interrupted by {NAMES[number]}; the same command continues where this one stopped"
    ], done.stderr
    assert (done.returncode, done.stdout) == (STATUS, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_one_message_and_status(repository: Path, config: Path, number: signal.Signals) -> None:
    """A scheduler that sends SIGTERM got an abort, and a person who pressed Ctrl-C got something else."""
    done = end_of(repository, config, number, "try:\n    hit()\nfinally:\n    say('closed')")
    assert_interrupted(done, number)
    assert "closed" in done.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_before_anything_has_begun(repository: Path, config: Path, number: signal.Signals) -> None:
    """Imports take seconds, and a trace from within them says nothing to whom they do not belong."""
    assert_interrupted(end_of(repository, config, number, "pass", before="hit()"), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_after_the_result(repository: Path, config: Path, number: signal.Signals) -> None:
    """What is done is done: a scheduler must not be told that it failed."""
    done = end_of(repository, config, number, "pass", after="hit()\nhit()")
    assert (done.returncode, done.stdout) == (0, '{"done": true}\n')
    assert done.stderr == ""


@pytest.mark.parametrize("number", SIGNALS)
def test_what_is_shielded_ends_first(repository: Path, config: Path, number: signal.Signals) -> None:
    """Half of a started Ray, or a run that MLflow has and nobody knows of, could not be closed."""
    body = """
with shielded():
    with shielded():
        hit()
    say("went on")
say("too far")
"""
    done = end_of(repository, config, number, body)
    assert_interrupted(done, number)
    assert "went on" in done.stderr
    assert "too far" not in done.stderr


def test_one_that_a_library_swallows_comes_again(repository: Path, config: Path) -> None:
    """Python drops what is raised within a destructor: the command would go on for hours."""
    body = """
stopping.UNSEEN_S = 0.1
class Swallows:
    def __del__(self):
        hit()
sys.unraisablehook = lambda unraisable: say("swallowed")
Swallows()
threading.Event().wait(60)
"""
    done = end_of(repository, config, signal.SIGTERM, body)
    assert_interrupted(done, signal.SIGTERM)
    assert "swallowed" in done.stderr


def test_one_within_a_callback_is_not_told_as_a_fault(repository: Path, config: Path) -> None:
    """Python prints a traceback of what it drops in a weak reference's callback; CI met one in weakref.py."""
    body = """
import weakref
class Key:
    pass
key = Key()
callback = weakref.ref(key, lambda reference: hit())
del key
say("went on")
threading.Event().wait(60)
"""
    done = end_of(repository, config, signal.SIGTERM, body)
    assert_interrupted(done, signal.SIGTERM)
    assert "went on" in done.stderr
    assert "Exception ignored" not in done.stderr


def test_other_exceptions_of_callbacks_are_told(repository: Path, config: Path) -> None:
    body = """
class Faulty:
    def __del__(self):
        raise ValueError("of a destructor")
Faulty()
"""
    done = end_of(repository, config, signal.SIGTERM, body)
    assert done.returncode == 0
    assert "ValueError: of a destructor" in done.stderr


@pytest.mark.parametrize("count", [1, 2])
def test_an_import_ends_first(repository: Path, config: Path, tmp_path: Path, count: int) -> None:
    """CI met an abort: Triton's extension sets its enumerations up by Python code, and may not throw."""
    (tmp_path / "imported_slowly.py").write_text(
        "import os, signal, sys\n"
        f"for _ in range({count}):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    sum(range(3 * 10**6))\n"
        "sys.stderr.write('imported\\n')\n"
    )
    body = f"""
sys.path.insert(0, {str(tmp_path)!r})
try:
    import imported_slowly
    threading.Event().wait(60)
finally:
    say("closed")
    assert "imported_slowly" in sys.modules
"""
    done = end_of(repository, config, signal.SIGTERM, body)
    assert_interrupted(done, signal.SIGTERM)
    assert "imported\nclosed\n" in done.stderr


def test_one_that_is_swallowed_before_a_shield(repository: Path, config: Path) -> None:
    """Imports have bare excepts; what is shielded after one is no sign that the command is ending."""
    body = """
try:
    hit()
except BaseException:
    say("swallowed")
with shielded():
    say("went on")
say("too far")
"""
    done = end_of(repository, config, signal.SIGTERM, body)
    assert_interrupted(done, signal.SIGTERM)
    assert "went on" in done.stderr
    assert "too far" not in done.stderr


def test_one_that_is_seen_does_not_come_again(repository: Path, config: Path) -> None:
    """Closing a store or Ray takes longer than a while, and must not be interrupted in its turn."""
    body = """
stopping.UNSEEN_S = 3
try:
    hit()
finally:
    with shielded():
        threading.Event().wait(4)
    hit()
    say("closed")
"""
    done = end_of(repository, config, signal.SIGTERM, body)
    assert_interrupted(done, signal.SIGTERM)
    assert "closed" in done.stderr
    assert "a further signal ends the process at once" in done.stderr


def test_a_third_signal_ends_at_once(repository: Path, config: Path) -> None:
    """What closes may hang, on a file system that is gone; a person must have a way out."""
    body = """
try:
    hit()
finally:
    hit()
    hit()
    say("too far")
"""
    done = end_of(repository, config, signal.SIGINT, body)
    assert done.returncode == STATUS
    # Another thread may still log what the second one was told.
    assert "error: ended by a third signal (Ctrl-C), without closing what is open\n" in done.stderr
    assert "too far" not in done.stderr


def test_a_fault_of_what_was_ended_is_no_fault(repository: Path, config: Path) -> None:
    """Libraries turn an interrupt into faults of their own, which would be taken for bad data."""
    body = """
from gare.errors import DataError
try:
    hit()
except KeyboardInterrupt:
    raise DataError("cannot be written")
"""
    assert_interrupted(end_of(repository, config, signal.SIGTERM, body), signal.SIGTERM)


def test_libraries_put_no_handlers_in_place_of_ours(repository: Path, config: Path) -> None:
    """Ray's own kill Ray within the handler, after which the process aborts."""
    body = """
with handlers_kept():
    signal.signal(signal.SIGTERM, lambda *_: say("theirs"))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
hit()
"""
    assert_interrupted(end_of(repository, config, signal.SIGTERM, body), signal.SIGTERM)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("when", ["while Ray ends", "after Ray has ended"])
def test_ray_leaves_our_handlers_when_it_ends(
    repository: Path, config: Path, number: signal.Signals, when: str
) -> None:
    """Ray's end leaves the system's handlers, by which a signal ended an evaluation without a word."""
    body = f"""
import ray
from cluster.runtime.session import ray_session
end = ray.shutdown
def end_and_hit():
    threading.Timer(0.5, os.kill, (os.getpid(), NUMBER)).start()
    end()
    say("ended")
if {when == "while Ray ends"}:
    ray.shutdown = end_and_hit
with ray_session(config.cluster):
    say("began")
ray.shutdown = end
hit()
threading.Event().wait(60)
"""
    done = end_of(repository, config, number, body)
    assert_interrupted(done, number)
    assert ("ended" in done.stderr) == (when == "while Ray ends")


@pytest.mark.parametrize("number", SIGNALS)
def test_workers_are_asked_first(repository: Path, config: Path, number: signal.Signals) -> None:
    """They have the steps since the last checkpoint, which would be lost with them."""
    body = """
from gare.errors import StoppedError
asked = []
with workers_asked_to_end(asked.append):
    hit()
    say(f"asked by {asked[0]}")
raise StoppedError("training was stopped after step 7")
"""
    done = end_of(repository, config, number, body)
    assert f"asked by {NAMES[number]}" in done.stderr
    assert "error: training was stopped after step 7" in done.stderr
    assert (done.returncode, done.stdout) == (STATUS, "")


@pytest.mark.parametrize("how", ["hit()", "threading.Event().wait(60)"], ids=["second", "grace"])
def test_workers_are_not_waited_for_for_ever(repository: Path, config: Path, how: str) -> None:
    """The scheduler kills everything half a minute later, and then nothing is said or closed."""
    body = f"""
stopping.GRACE_S = 0.2
with workers_asked_to_end(lambda name: None):
    hit()
    {how}
"""
    done = end_of(repository, config, signal.SIGTERM, body)
    assert done.returncode == STATUS
    assert "error: stopped by SIGTERM before the workers had written a checkpoint" in done.stderr


def test_workers_that_are_done_meanwhile(repository: Path, config: Path) -> None:
    """A training that ends by itself in the grace still has its result, with all that belongs to it."""
    body = """
with workers_asked_to_end(lambda name: None):
    hit()
with shielded():
    pass
"""
    done = end_of(repository, config, signal.SIGTERM, body)
    assert (done.returncode, done.stdout) == (0, '{"done": true}\n'), done.stderr


def test_a_step_after_a_training_does_not_begin(repository: Path, config: Path) -> None:
    """The demo would go on for minutes after it had said that it ends."""
    body = """
with workers_asked_to_end(lambda name: None):
    hit()
say("closed")
stopping.raise_if_asked()
say("too far")
"""
    done = end_of(repository, config, signal.SIGTERM, body)
    assert_interrupted(done, signal.SIGTERM)
    assert "closed" in done.stderr
    assert "too far" not in done.stderr


def test_workers_that_die_of_the_same_signal(repository: Path, config: Path) -> None:
    """Slurm and evictions signal all processes; the fault that follows is not the run's."""
    body = """
from cluster.tracking.run import status_after
from gare.errors import GareError
with workers_asked_to_end(lambda name: None):
    hit()
    try:
        raise GareError("a worker died")
    except GareError as error:
        fault = error
assert status_after(fault) == "KILLED"
raise fault
"""
    assert_interrupted(end_of(repository, config, signal.SIGTERM, body), signal.SIGTERM)


def test_a_signal_as_the_result_is_written(repository: Path, config: Path) -> None:
    """Status 4 beside a result would have a scheduler do again what is done."""
    body = """
class Stream:
    def write(self, text):
        sys.__stdout__.write(text)
        hit()
    def flush(self):
        sys.__stdout__.flush()
sys.stdout = Stream()
"""
    done = end_of(repository, config, signal.SIGTERM, "pass", before=body)
    assert (done.returncode, done.stdout) == (0, '{"done": true}\n'), done.stderr


@pytest.mark.parametrize(
    "how",
    [
        "sys.stderr = None",
        "os.close(2)",
        "os.dup2(os.pipe()[1], 2)",
        "read, write = os.pipe(); os.dup2(write, 2); os.close(read)",
    ],
    ids=["none", "closed", "pipe", "broken pipe"],
)
def test_nobody_reads_the_message(repository: Path, config: Path, how: str) -> None:
    """A scheduler that has closed the log's pipe still needs the status."""
    done = end_of(repository, config, signal.SIGTERM, f"{how}\nhit()")
    assert (done.returncode, done.stdout) == (STATUS, "")
    done = end_of(
        repository, config, signal.SIGTERM, f"{how}\nif sys.stderr: stopping.logger.warning('read')"
    )
    assert (done.returncode, done.stdout) == (0, '{"done": true}\n')
    assert end_of(repository, config, signal.SIGTERM, "pass", before=f"{how}\nhit()").returncode == STATUS


@pytest.mark.filterwarnings("ignore:The ``noload``")  # of MLflow
def test_runs_that_a_fault_leaves_open(repository: Path, config: Path, tmp_path: Path) -> None:
    """A run that was finished, and that an evaluation had opened, must not be running for ever."""
    body = f"""
from cluster.tracking import connect
from gare.errors import DataError
uri = "sqlite:///{tmp_path}/mlflow.db"
tracker = connect(config.tracking.model_copy(update={{"uri": uri}}), {str(tmp_path)!r})
runs = [tracker.start_run("one"), tracker.start_run("two", when_interrupted="FINISHED")]
say("runs " + " ".join(run.run_id for run in runs))
raise DataError("bad")
"""
    done = end_of(repository, config, signal.SIGTERM, body)
    assert done.returncode == 3, done.stderr
    stored = client(f"sqlite:///{tmp_path}/mlflow.db")
    ids = re.findall(r"^runs (\w+) (\w+)$", done.stderr, re.MULTILINE)[0]
    assert [stored.get_run(one).info.status for one in ids] == ["FAILED", "FINISHED"]


@pytest.mark.filterwarnings("ignore:The ``noload``")  # of MLflow
def test_runs_that_are_open_in_mlflow_are_killed(repository: Path, config: Path, tmp_path: Path) -> None:
    """A run that is shown as running for ever is looked at by somebody every week."""
    body = f"""
from cluster.tracking import connect
uri = "sqlite:///{tmp_path}/mlflow.db"
tracker = connect(config.tracking.model_copy(update={{"uri": uri}}), {str(tmp_path)!r})
runs = [
    tracker.start_run("one"),
    tracker.start_run("two", when_interrupted="FINISHED"),
    tracker.start_run("three"),
]
runs[2].finish()
say("runs " + " ".join(run.run_id for run in runs))
hit()
"""
    done = end_of(repository, config, signal.SIGTERM, body)
    assert_interrupted(done, signal.SIGTERM)
    stored = client(f"sqlite:///{tmp_path}/mlflow.db")
    ids = re.findall(r"^runs (\w+) (\w+) (\w+)$", done.stderr, re.MULTILINE)[0]
    assert [stored.get_run(one).info.status for one in ids] == ["KILLED", "FINISHED", "FINISHED"]
