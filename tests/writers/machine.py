"""The state machine of the store's writers, whose rules hypothesis draws and replays.

GARE_MODEL_STEPS is the maximum number of steps of a history.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.helpers.stores import describe_store
from tests.writers.history import CHANGES, History
from tests.writers.jobs import IDS, RAW
from tests.writers.scheduling import Actor, Machine, Process
from tests.writers.storage import S3Server, install

STEPS = int(os.environ.get("GARE_MODEL_STEPS", "25"))
MOST_JOBS = 4
#: Limit that only a job waiting for a lock can reach.
MOST_OPERATIONS = 1500
PLACES = ("/_META.json", "/_RETIRED.json", "/data/", "/failures/", "/generations/", "/lock/")
KINDS = st.sampled_from(["good", "bad", "gone"])
JOBS = st.sampled_from(["extract", "extract", "compact"])
PICK = st.integers(0, 15)
_names = itertools.count()


class Writers(RuleBasedStateMachine):
    """State machine with jobs on three machines, their workers on others, and readers."""

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

    @initialize(changes=st.dictionaries(st.sampled_from(IDS), KINDS), is_filled=st.booleans())
    def store_is_filled(self, changes: dict[str, str], is_filled: bool) -> None:
        self.history.at_last = changes
        if is_filled:
            self.history.through("extract", self.machines[0])

    # Threads and processes that a rule may pick.

    def _threads(self) -> list[Actor]:
        return [one for one in self.scheduler.actors if not one.is_over and one.process.runs]

    def _workers(self) -> list[Actor]:
        return [one for one in self._threads() if one.name == "worker"]

    def _living(self) -> list[Process]:
        return [one for one in self.scheduler.processes if not one.is_dead]

    def _sleeping(self) -> list[Process]:
        return [one for one in self.scheduler.processes if not one.is_dead and one.asleep_since_s is not None]

    def _num_jobs(self) -> int:
        return sum(not job.is_over for job in self.runner.jobs)

    @precondition(lambda self: self._num_jobs() < MOST_JOBS)
    @rule(kind=JOBS, machine=st.integers(0, 2), pid=st.integers(1, 2), operations=st.integers(0, 120))
    def job_starts(self, kind: str, machine: int, pid: int, operations: int) -> None:
        job = self.runner.start(kind, self.runner.process(self.machines[machine], pid))
        assert job.actor
        self._go(job.actor, operations)

    @precondition(lambda self: self._num_jobs() < MOST_JOBS)
    @rule(kind=JOBS, machine=st.integers(0, 2), where=st.sampled_from(PLACES), times=st.integers(1, 3))
    def job_starts_and_falls_asleep(self, kind: str, machine: int, where: str, times: int) -> None:
        job = self.runner.start(kind, self.runner.process(self.machines[machine], 1))
        assert job.actor
        self._fall_asleep_before(job.actor, where, times)

    @precondition(lambda self: self._num_jobs() < MOST_JOBS)
    @rule(
        kind=JOBS, machine=st.integers(0, 2), changes=st.dictionaries(st.sampled_from(IDS), KINDS, max_size=2)
    )
    def job_comes_after_changes(self, kind: str, machine: int, changes: dict[str, str]) -> None:
        """Starts a job that takes the lock from sleepers; all awake jobs run as far as they can."""
        for one, change in changes.items():
            self.history.change(one, change)
        job = self.runner.start(kind, self.runner.process(self.machines[machine], 1))
        for _ in range(MOST_OPERATIONS):
            drivers = [one.actor for one in self.runner.jobs if one.actor and not one.is_over]
            if not sum(self.history.move(one) for one in drivers) or job.is_over:
                return

    @rule(machine=st.integers(0, 2), operations=st.integers(0, 8))
    def reader_starts(self, machine: int, operations: int) -> None:
        reading = self.history.read(self.runner.process(self.machines[machine], 1))
        self.scheduler.run(reading.actor, operations)

    @precondition(lambda self: self._threads())
    @rule(pick=PICK, operations=st.integers(1, 30))
    def thread_goes_on(self, pick: int, operations: int) -> None:
        self.scheduler.run(_one(self._threads(), pick), operations)

    @precondition(lambda self: self._threads())
    @rule(pick=PICK, operations=st.integers(1, MOST_OPERATIONS))
    def job_goes_on_with_its_workers(self, pick: int, operations: int) -> None:
        self._go(_one(self._threads(), pick), operations)

    @precondition(lambda self: self._threads())
    @rule(pick=PICK, where=st.sampled_from(PLACES), times=st.integers(1, 3))
    def process_falls_asleep_before_a_change(self, pick: int, where: str, times: int) -> None:
        """Stops a process just before it changes a matching file, after its check that it may."""
        self._fall_asleep_before(_one(self._threads(), pick), where, times)

    @precondition(lambda self: self._workers())
    @rule(pick=PICK, operations=st.integers(0, 3))
    def worker_falls_asleep(self, pick: int, operations: int) -> None:
        actor = _one(self._workers(), pick)
        self.scheduler.run(actor, operations)
        if actor.process.runs:
            self.scheduler.suspend(actor.process)

    @precondition(lambda self: self.scheduler.renewers)
    @rule(pick=PICK, operations=st.integers(1, 6))
    def process_falls_asleep_within_a_renewal(self, pick: int, operations: int) -> None:
        actor = _one(self.scheduler.renewers, pick)
        self.scheduler.run(actor, operations)
        if actor.process.runs:
            self.scheduler.suspend(actor.process)

    @precondition(lambda self: self._sleeping())
    @rule(pick=PICK, was_machine=st.booleans(), operations=st.integers(0, 60))
    def process_wakes_up(self, pick: int, was_machine: bool, operations: int) -> None:
        process = _one(self._sleeping(), pick)
        self.scheduler.wake(process, was_machine=was_machine)
        threads = [one for one in self._threads() if one.process is process]
        if threads:
            self._go(_one(threads, pick), operations)

    @precondition(lambda self: self._threads())
    @rule(pick=PICK, fault=st.sampled_from(["fails", "answer lost"]), operations=st.integers(1, 5))
    def storage_does_not_answer(self, pick: int, fault: str, operations: int) -> None:
        actor = _one(self._threads(), pick)
        actor.fault = fault
        self.scheduler.run(actor, operations)

    @precondition(lambda self: self._living())
    @rule(pick=PICK)
    def process_dies(self, pick: int) -> None:
        self.scheduler.kill(_one(self._living(), pick))

    @precondition(lambda self: self._living())
    @rule(machine=st.integers(0, 2))
    def machine_is_started_anew(self, machine: int) -> None:
        for process in self.scheduler.processes:
            if process.machine is self.machines[machine]:
                self.scheduler.kill(process)
        self.machines[machine].boots += 1

    @precondition(lambda self: self._living())
    @rule(seconds=st.floats(1, 200), machine=st.integers(-1, 2), hours=st.floats(-20, 20))
    def time_passes_and_a_clock_is_set(self, seconds: float, machine: int, hours: float) -> None:
        self.scheduler.advance(self.scheduler.now_s + seconds)
        if machine < 0:
            self.scheduler.storage_offset_s += 3600 * hours
        else:
            self.machines[machine].offset_s += 3600 * hours

    @rule(video_id=st.sampled_from(IDS), kind=KINDS)
    def video_changes(self, video_id: str, kind: str) -> None:
        self.history.change(video_id, kind)

    @rule(video_ids=st.sets(st.sampled_from(IDS), min_size=1), back=st.integers(0, 2))
    def videos_come_back_as_they_were(self, video_ids: set[str], back: int) -> None:
        for one in sorted(video_ids):
            self.history.restore(one, back)

    def _go(self, actor: Actor, operations: int) -> None:
        for _ in range(operations):
            if actor.is_over or not actor.process.runs or not self.history.move(actor):
                return

    def _fall_asleep_before(self, actor: Actor, where: str, times: int) -> None:
        for _ in range(MOST_OPERATIONS):
            if actor.is_over or not actor.process.runs:
                return
            # Its workers are on other machines: they fall asleep with it when they write a matching file.
            workers = self.history.workers_of(actor)
            ready = [one for one in (actor, *workers) if one.stop.what in CHANGES and where in one.stop.where]
            times -= bool(ready)
            if not times:
                for one in (actor, *ready):
                    if one.process.runs:
                        self.scheduler.suspend(one.process)
                return
            if not self.history.move(actor):
                return


def _one(choices: list[Any], pick: int) -> Any:
    return choices[pick % len(choices)]


def run_machine(number: int, examples: int, server: S3Server | None = None) -> None:
    """Runs a number of histories, drawn from a seed.

    Args:
        number: the seed.
        examples: number of histories.
        server: S3 server; None for local files.
    """
    options = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    machine = type("Writers", (Writers,), {"server": server})
    run_state_machine_as_test(seed(number)(machine), settings=options)
