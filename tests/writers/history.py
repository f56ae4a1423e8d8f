"""A history of jobs on one store, with the invariants checked after each operation.

The invariants are those of docs/design/store-writers.md.
"""

from __future__ import annotations

from gare.data.store.contents import Store
from gare.errors import DataError, LockLostError
from gare.storage.generations import newest_number
from tests.writers.jobs import IDS, Job, Reading, Runner
from tests.writers.scheduling import MOST_OPERATIONS, Actor, Machine, Process, Scheduler, Stop

#: Operations that change something.
CHANGES = ("rename", "link", "put", "conditional put", "delete")
#: Seconds that a job must be silent before another one may take its place.
_SILENT_S = 30.0


class History:
    """Runs jobs and checks the store after each operation that changes it.

    Args:
        uri: the store, with its description written.
        storage: ``local``, or a kind of ``tests.writers.storage.S3Server``.
    """

    def __init__(self, uri: str, storage: str) -> None:
        self.uri = uri
        #: True if a job that was taken over cannot replace a file written by its successor.
        self.is_conditional = storage == "kept"
        #: True if only one of several jobs can create the same file.
        self.creates_once = storage in ("kept", "local")
        self.scheduler = Scheduler(self._after)
        self.runner = Runner(uri, self.scheduler)
        self.runner.on_entry, self.runner.on_finish = self._entered, self._finished
        self.readings: list[Reading] = []
        self.rows: dict[str, str] = {}
        #: Notes of rows that ever counted (``seen``), and of those written after their claim was gone.
        self.seen: set[str] = set()
        self.between: set[str] = set()
        #: Claims that were taken away by other jobs.
        self.taken: set[str] = set()
        self.newest = 0
        #: File that was written late, where no condition can prevent it, and when; see the design page.
        self.late = ""
        self.late_at = 0
        #: Changes of videos before the last run.
        self.at_last: dict[str, str] = {}
        #: For each video, if each of its versions can be decoded.
        self.kinds = {one: ["good"] for one in IDS}

    # Events of a history.

    def change(self, video_id: str, kind: str) -> None:
        """Replaces a video (by a good or a bad one) or removes it."""
        version, _ = self.runner.collection[video_id]
        if kind != "gone":
            version = len(self.kinds[video_id])
            self.kinds[video_id].append(kind)
        self.runner.collection[video_id] = (version, kind)

    def restore(self, video_id: str, back: int) -> None:
        """Restores a video to its state some versions ago."""
        kinds = self.kinds[video_id]
        version = max(0, len(kinds) - 1 - back)
        self.runner.collection[video_id] = (version, kinds[version])

    def read(self, process: Process) -> Reading:
        """Starts a reader."""
        reading = Reading(self.uri, self.scheduler, process, self.rows)
        self.readings.append(reading)
        return reading

    def finish(self, actor: Actor) -> None:
        """Runs a thread to its end, with all threads that it waits for."""
        for _ in range(MOST_OPERATIONS):
            if actor.is_over or not actor.process.runs:
                return
            assert self.move(actor), f"{actor.name} waits for ever: {actor.stop}"
        raise AssertionError(f"{actor.name} does not end: {actor.stop}")

    def through(self, kind: str, machine: Machine) -> Job:
        """Runs a command from start to end."""
        job = self.runner.start(kind, self.runner.process(machine, 1))
        assert job.actor
        self.finish(job.actor)
        return job

    def until(self, job: Job, where: str) -> None:
        """Runs a command until just before it changes a matching file."""
        assert job.actor
        for _ in range(MOST_OPERATIONS):
            assert not job.actor.is_over, f"{job.name} is through: {job.actor.error!r}"
            if job.actor.stop.what in CHANGES and where in job.actor.stop.where:
                return
            self.move(job.actor)
        raise AssertionError(f"{job.name} does not come to {where}")

    def move(self, actor: Actor) -> int:
        """Runs a thread, or those that it waits for, for one operation; returns how many operations ran."""
        workers = self.workers_of(actor)
        return self.scheduler.run(actor, 1) or sum(self.scheduler.run(one, 1) for one in workers)

    def workers_of(self, actor: Actor) -> list[Actor]:
        """Returns the threads that a thread may wait for."""
        job = self.runner.job_of(actor.process)
        processes = [*(job.workers if job else ()), actor.process]
        return [
            one
            for one in self.scheduler.actors
            if one is not actor and not one.is_over and any(one.process is other for other in processes)
        ]

    def end(self) -> None:
        """Checks that one more run completes the store, and that processes that wake later change nothing."""
        for one, kind in self.at_last.items():
            self.change(one, kind)
        sleepers = []
        for process in self.scheduler.processes:
            if process.runs:
                self.scheduler.suspend(process)
            if not process.is_dead:
                sleepers.append(process)
        self._complete("the next run")
        for process in sleepers:
            self.scheduler.wake(process, was_machine=False)
        for _ in range(MOST_OPERATIONS):
            running = [one for one in self.scheduler.actors if not one.is_over and one.process.runs]
            if not sum(self.scheduler.run(one, 1 + place % 3) for place, one in enumerate(running)):
                break
        else:
            raise AssertionError(f"these do not end: {running}")
        self._complete("the run after all have ended")
        again = dict(self.rows)
        self._complete("a run with nothing to do")
        assert self.rows == again

    def _complete(self, what: str) -> None:
        job = self.through("extract", Machine(f"last {len(self.scheduler.processes)}"))
        assert job.actor
        assert job.actor.error is None, f"{what}: {job.actor.error!r}"
        self._look()
        good = {one: version for one, (version, kind) in self.runner.collection.items() if kind == "good"}
        found = {one: self.runner.written[note].version for one, note in self.rows.items()}
        assert found == good, f"{what} left versions {found} of {good}"
        assert Store(self.uri).read_meta().complete, f"{what} left the store incomplete"

    # Invariants.

    def _entered(self, job: Job) -> None:
        """Checks that no two jobs have the same number, and that no job was taken over while awake."""
        for other in self.runner.jobs:
            if other is job or not other.number:
                continue
            if other.number == job.number:
                assert not self.creates_once, f"{other.name} and {job.name} both have {job.number}"
                self._mark_late("two jobs with one number")
            if other.holds and other.number < job.number and not other.process.faults:
                slept_s = other.process.longest_sleep_s
                if other.process.asleep_since_s is not None:
                    slept_s = max(slept_s, self.scheduler.now_s - other.process.asleep_since_s)
                # Otherwise a sleeper may have overwritten this job's generation, and taken that back.
                assert slept_s > _SILENT_S or not self.creates_once, (
                    f"{job.name} took over from {other.name}, which was awake"
                )

    def _finished(self, job: Job) -> None:
        if job.began >= self.late_at:
            self.late = ""

    def _mark_late(self, what: str) -> None:
        self.late, self.late_at = what, self.runner.operations

    def _after(self, actor: Actor, done: Stop) -> None:
        self.runner.operations += 1
        if done.what == "write" and actor.stop.what == "rename":
            actor.stop.where = done.where  # the final location of its file
        if actor.is_over:
            self._ended(actor)
        job = self.runner.job_of(actor.process)
        if (
            done.what == "delete"
            and "/lock/" in done.where
            and not (job and done.where.endswith(_claim(job)))
        ):
            self.taken.add(done.where.rsplit("/", 1)[-1])
        if done.what not in CHANGES or "/lock/" in done.where:
            return
        if job is not None and 0 < job.number < self.newest:
            self._changed_late(job, done.where)
        if done.what == "delete" and "/data/" in done.where:
            for reading in self.readings:
                reading.disturbances += 1
        self._look()

    def _changed_late(self, job: Job, where: str) -> None:
        """Checks that a job that lost the lock makes at most one change: it checks the lock before each."""
        job.late_changes += 1
        assert job.late_changes < 2 or job.process.faults, f"{job.name} has lost the lock and goes on"
        if not self.is_conditional and where.endswith(("/_META.json", "/_RETIRED.json")):
            self._mark_late(f"{where} written late")
            for reading in self.readings if where.endswith("/_RETIRED.json") else ():
                reading.disturbances += 1

    def _ended(self, actor: Actor) -> None:
        if actor.name in ("reader", "worker"):
            actor.process.is_dead = True
        if actor.name == "reader":
            next(one for one in self.readings if one.actor is actor).check()
            return
        if actor.error is None or actor.process.faults:
            return
        job = self.runner.job_of(actor.process)
        if job is None:
            faults = actor.error
            raise AssertionError(f"{actor.name} ended with {faults!r}") from faults
        is_lost = job.number < self.newest or _claim(job) in self.taken or bool(self.late)
        if isinstance(actor.error, LockLostError | DataError) and is_lost:
            return
        if any(worker.faults for worker in job.workers):
            return
        raise AssertionError(f"{job.name} ended with {actor.error!r}") from actor.error

    def _look(self) -> None:
        """Reads the store in one step, as no reader can, and compares it with its state before."""
        self.newest = max(self.newest, newest_number(self.uri))
        try:
            found = Store(self.uri).rows(["note", "source_version"])
        except DataError as error:
            if self.late == "two jobs with one number":
                return
            raise AssertionError(f"readers are stopped: {error}") from error
        before, self.rows = self.rows, {one: str(row["note"]) for one, (_, _, row) in found.items()}
        for one, note in self.rows.items():
            assert self.runner.written[note].video_id == one
        for reading in self.readings:
            reading.note(self.rows)
        seen, self.seen = self.seen, self.seen.union(self.rows.values())
        for note in self.seen - seen:
            writer = self.runner.written[note].job
            if writer.is_over or _claim(writer) in self.taken:
                self.between.add(note)
        if self.late:
            return
        self._nothing_vanishes(before)
        self._nothing_comes_back(before, seen)
        self._complete_is_complete()

    def _nothing_vanishes(self, before: dict[str, str]) -> None:
        """Checks that rows of a video's current version keep counting, unless the owner saw another one."""
        owners = [job for job in self.runner.jobs if job.number == self.newest]
        for one, note in before.items():
            version, kind = self.runner.collection[one]
            was = self.runner.written[note].version
            if kind != "good" or was != version:
                continue
            if any(job.view and job.view[one] != (version, kind) for job in owners):
                continue
            if note in self.between and self.runner.written[note].job.number < self.newest:
                continue
            now = self.rows.get(one)
            assert now is not None, f"{note!r} counts no more"
            assert self.runner.written[now].version == version, f"{now!r} counts in place of {note!r}"

    def _nothing_comes_back(self, before: dict[str, str], seen: set[str]) -> None:
        """Checks that a row that starts to count is the owner's, or matches a video that came back."""
        owners = [job for job in self.runner.jobs if job.number == self.newest]
        for one, note in self.rows.items():
            if before.get(one) == note:
                continue
            row = self.runner.written[note]
            if note not in seen:
                is_owners = row.job.number == self.newest or not self.creates_once
                assert is_owners, f"{note!r} was written late and counts"
                continue
            views = [self.runner.collection, *(job.view for job in owners if job.view)]
            assert (row.version, "good") in [view[one] for view in views], f"{note!r} counts again"

    def _complete_is_complete(self) -> None:
        meta = Store(self.uri).read_meta()
        if not meta.complete:
            return
        view = self.runner.completed[meta.code_version]
        failed = Store(self.uri).read_failures(self.rows)
        for one in IDS:
            version, kind = view[one]
            if one not in self.rows:
                assert one in failed, f"{one} is missing in a store that is complete"
            else:
                # A removed file has no row; a bad one may have had a good version before.
                assert kind == "good", f"{one} counts, which is {kind}"
                assert self.runner.written[self.rows[one]].version == version


def _claim(job: Job) -> str:
    """Returns the name of a job's claim; if it has none, a name that no claim has."""
    return job.lock._location.rsplit("/", 1)[-1] if job.lock else "none"
