"""Writers of one store in any order: they sleep, die, wake up, take over and compact, while clocks are set.

GARE_MODEL_EXAMPLES sets the number of histories, GARE_TEST_SEED the seed from which they are drawn, and
GARE_MODEL_STEPS the steps of each.
"""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import tempfile
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from tests.stores import describe_store
from tests.writers.history import CHANGES, History
from tests.writers.jobs import IDS, RAW
from tests.writers.scheduling import Actor, Machine, Process
from tests.writers.storage import S3Server, install, serve

STEPS = int(os.environ.get("GARE_MODEL_STEPS", "25"))
MOST_JOBS = 4
#: More is made by nobody but who waits for a lock.
MOST_OPERATIONS = 1500
PLACES = ("/_META.json", "/_RETIRED.json", "/data/", "/failures/", "/generations/", "/lock/")
PICK = st.integers(0, 15)
_names = itertools.count()


class Writers(RuleBasedStateMachine):
    """Jobs on three machines, their workers on others, and readers."""

    server: ClassVar[S3Server | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        if self.server:
            self.folder, uri = "", f"s3://videos/{next(_names)}"
        else:
            self.folder = uri = tempfile.mkdtemp(prefix="gare-model-")
        self.history = History(uri, self.server.conditions if self.server else "local")
        self.scheduler, self.runner = self.history.scheduler, self.history.runner
        self.machines = [Machine(f"machine {number}") for number in range(3)]
        install(self.patch, self.scheduler, self.server)
        describe_store(uri, RAW, complete=False)

    def teardown(self) -> None:
        try:
            self.history.end()
        finally:
            self.scheduler.end()
            self.patch.undo()
            if self.server:
                self.server.empty("videos")
            else:
                shutil.rmtree(self.folder)

    # Whom a rule is about.

    def _threads(self) -> list[Actor]:
        return [one for one in self.scheduler.actors if not one.is_over and one.process.runs]

    def _running(self) -> list[Process]:
        return [one for one in self.scheduler.processes if one.runs]

    def _sleeping(self) -> list[Process]:
        return [one for one in self.scheduler.processes if not one.is_dead and one.asleep_since_s is not None]

    def _num_jobs(self) -> int:
        return sum(not job.is_over for job in self.runner.jobs)

    @precondition(lambda self: self._num_jobs() < MOST_JOBS)
    @rule(
        kind=st.sampled_from(["extract", "extract", "compact"]),
        machine=st.integers(0, 2),
        pid=st.integers(1, 2),
    )
    def job_starts(self, kind: str, machine: int, pid: int) -> None:
        self.runner.start(kind, self.runner.process(self.machines[machine], pid))

    @rule(machine=st.integers(0, 2))
    def reader_starts(self, machine: int) -> None:
        self.history.read(self.runner.process(self.machines[machine], 1))

    @precondition(lambda self: self._threads())
    @rule(pick=PICK, operations=st.integers(1, 60))
    def thread_goes_on(self, pick: int, operations: int) -> None:
        self.scheduler.run(_one(self._threads(), pick), operations)

    @precondition(lambda self: self._threads())
    @rule(pick=PICK, operations=st.integers(1, 600))
    def job_goes_on_with_its_workers(self, pick: int, operations: int) -> None:
        actor = _one(self._threads(), pick)
        for _ in range(operations):
            if actor.is_over or not actor.process.runs or not self.history.move(actor):
                return

    @precondition(lambda self: self._threads())
    @rule(pick=PICK)
    def job_goes_through(self, pick: int) -> None:
        actor = _one(self._threads(), pick)
        for _ in range(MOST_OPERATIONS):
            # As far as it comes: others may have the lock.
            if actor.is_over or not actor.process.runs or not self.history.move(actor):
                return

    @precondition(lambda self: self._threads())
    @rule(pick=PICK, fault=st.sampled_from(["fails", "answer lost"]), operations=st.integers(1, 5))
    def storage_does_not_answer(self, pick: int, fault: str, operations: int) -> None:
        actor = _one(self._threads(), pick)
        actor.fault = fault
        self.scheduler.run(actor, operations)

    @precondition(lambda self: self._threads())
    @rule(pick=PICK, where=st.sampled_from(PLACES), times=st.integers(1, 3))
    def process_falls_asleep_before_a_change(self, pick: int, where: str, times: int) -> None:
        """Of such a file, after it has made sure that it may."""
        actor = _one(self._threads(), pick)
        for _ in range(MOST_OPERATIONS):
            if actor.is_over or not actor.process.runs:
                return
            if actor.stop.what in CHANGES and where in actor.stop.where:
                times -= 1
                if not times:
                    self.scheduler.suspend(actor.process)
                    return
            if not self.history.move(actor):
                return

    @precondition(lambda self: self._running())
    @rule(pick=PICK)
    def process_falls_asleep(self, pick: int) -> None:
        self.scheduler.suspend(_one(self._running(), pick))

    @precondition(lambda self: self.scheduler.renewers)
    @rule(pick=PICK, operations=st.integers(1, 6))
    def process_falls_asleep_within_a_renewal(self, pick: int, operations: int) -> None:
        actor = _one(self.scheduler.renewers, pick)
        self.scheduler.run(actor, operations)
        if actor.process.runs:
            self.scheduler.suspend(actor.process)

    @precondition(lambda self: self._sleeping())
    @rule(pick=PICK, was_machine=st.booleans(), operations=st.integers(0, 20))
    def process_wakes_up(self, pick: int, was_machine: bool, operations: int) -> None:
        process = _one(self._sleeping(), pick)
        self.scheduler.wake(process, was_machine=was_machine)
        threads = [one for one in self._threads() if one.process is process]
        if threads:
            self.scheduler.run(_one(threads, pick), operations)

    @precondition(lambda self: self._running() or self._sleeping())
    @rule(pick=PICK)
    def process_dies(self, pick: int) -> None:
        self.scheduler.kill(_one(self._running() + self._sleeping(), pick))

    @rule(machine=st.integers(0, 2))
    def machine_is_started_anew(self, machine: int) -> None:
        for process in self.scheduler.processes:
            if process.machine is self.machines[machine]:
                self.scheduler.kill(process)
        self.machines[machine].boots += 1

    @rule(seconds=st.floats(1, 200))
    def time_passes(self, seconds: float) -> None:
        self.scheduler.advance(self.scheduler.now_s + seconds)

    @rule(machine=st.integers(-1, 2), hours=st.floats(-20, 20))
    def clock_is_set(self, machine: int, hours: float) -> None:
        if machine < 0:
            self.scheduler.storage_offset_s += 3600 * hours
        else:
            self.machines[machine].offset_s += 3600 * hours

    @rule(video_id=st.sampled_from(IDS), kind=st.sampled_from(["good", "bad", "gone"]))
    def video_changes(self, video_id: str, kind: str) -> None:
        self.history.change(video_id, kind)

    @rule(video_id=st.sampled_from(IDS), back=st.integers(0, 2))
    def video_comes_back_as_it_was(self, video_id: str, back: int) -> None:
        self.history.restore(video_id, back)


def _one(choices: list[Any], pick: int) -> Any:
    return choices[pick % len(choices)]


def _run(machine: type[Writers], default: int) -> None:
    value = int(os.environ.get("GARE_TEST_SEED") or secrets.randbits(31))
    examples = int(os.environ.get("GARE_MODEL_EXAMPLES", default))
    print(f"GARE_TEST_SEED={value} GARE_MODEL_EXAMPLES={examples} GARE_MODEL_STEPS={STEPS}")
    options = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seed(value)(machine), settings=options)


def test_writers_lose_and_double_nothing() -> None:
    """Whatever order machines fail in, nights of extraction must leave each clip once, as it was made."""
    _run(Writers, 30)


@pytest.mark.parametrize("conditions", S3Server.KINDS)
def test_writers_on_s3_lose_and_double_nothing(conditions: str) -> None:
    """The same on object stores, of which some have no conditional writes."""
    with serve(conditions) as server:
        _run(type("WritersOnS3", (Writers,), {"server": server}), 3)
