"""Jobs as pipelines/extract.py runs them, without Ray, MLflow and videos: extraction, compaction, reading."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gare.config import Config, ExtractConfig
from gare.data.manifest import Manifest, ManifestRow
from gare.data.store.compact import compact
from gare.data.store.contents import FAILURE_SCHEMA, Store, frame_schema
from gare.data.store.parts import encode_part, part_name_of_group, put_part, table_of
from gare.data.videos import FileVersion
from gare.errors import DataError, GoneError
from gare.extract.comparison import Comparison
from gare.extract.update import FrameStoreUpdate
from gare.storage.lock import StoreLock
from tests.helpers.stores import failure_row, stored_row
from tests.writers.scheduling import Actor, Machine, Process, Scheduler

RAW = ExtractConfig(num_frames=1, image_size=8, encoding="raw", max_failed_fraction=1.0)
CONFIG = Config().model_copy(update={"extract": RAW})
IDS = "abcd"
MANIFEST = Manifest(
    tuple(ManifestRow(one, f"/videos/{one}.mp4", None, None, "train", ("one",)) for one in IDS),
    "folder",
    "own",
)
STALE_S = 60.0
PART_BYTES = 10**6
_FRAMES = np.zeros((1, 8, 8, 3), np.uint8)

#: For each clip its file's version and state: decodable (good), not decodable (bad), missing (gone).
Collection = dict[str, tuple[int, str]]


@dataclass
class Job:
    """A command that has been started.

    Attributes:
        process: process of its driver.
        name: name of the run.
        kind: ``extract`` or ``compact``.
        view: the collection when the job last looked at it.
        number: number of its generation; 0 if it has none.
        began: number of the history's operations before it got the store.
        workers: processes that write its parts.
        actor: the driver's thread.
        late_changes: number of changes made after another job had begun a newer generation.
    """

    process: Process
    name: str
    kind: str
    view: Collection = field(default_factory=dict)
    number: int = 0
    began: int = 0
    workers: list[Process] = field(default_factory=list)
    actor: Actor | None = None
    lock: StoreLock | None = None
    late_changes: int = 0

    @property
    def is_over(self) -> bool:
        """True if its driver does nothing any more."""
        return self.process.is_dead or (self.actor is not None and self.actor.is_over)

    @property
    def holds(self) -> bool:
        """True if it has the lock and is not about to release it."""
        ended: Any = self.lock._ended.is_set if self.lock else True
        return not self.is_over and not ended


@dataclass
class Row:
    """A written row of a data part."""

    video_id: str
    version: int
    job: Job


class Runner:
    """Runs jobs on one store and records what they intend to have done.

    Args:
        uri: the store.
        scheduler: scheduler of the history.

    Attributes:
        collection: current state of the videos.
        written: rows by their note.
        completed: the collection as seen by a run that marked the store complete, by the run's name.
    """

    def __init__(self, uri: str, scheduler: Scheduler) -> None:
        self.uri, self.scheduler = uri, scheduler
        self.collection: Collection = dict.fromkeys(IDS, (0, "good"))
        self.jobs: list[Job] = []
        self.written: dict[str, Row] = {}
        self.completed: dict[str, Collection] = {}
        self.operations = 0
        self.on_entry: Callable[[Job], None] = lambda _: None
        self.on_finish: Callable[[Job], None] = lambda _: None

    def process(self, machine: Machine, pid: int) -> Process:
        """Creates a process, with the next free id if this one is taken."""
        taken = {one.pid for one in self.scheduler.processes if one.machine is machine and not one.is_dead}
        while pid in taken:
            pid += 1
        process = Process(machine, machine.boots, pid, start=int(self.scheduler.now_s * 100))
        # Processes started in the same tick of one machine must have different ids.
        process.start += len(self.scheduler.processes)
        self.scheduler.processes.append(process)
        return process

    def start(self, kind: str, process: Process) -> Job:
        """Starts a command."""
        job = Job(process, f"run {len(self.jobs)}", kind)
        action = self._extract if kind == "extract" else self._compact
        job.actor = self.scheduler.start(process, job.name, lambda: self._whole(job, action))
        self.jobs.append(job)
        return job

    def job_of(self, process: Process) -> Job | None:
        """Returns the job of a driver process."""
        return next((job for job in self.jobs if job.process is process), None)

    def _whole(self, job: Job, action: Callable[[Job], None]) -> None:
        try:
            action(job)
        finally:
            # Another process may have its process id by now.
            if not (job.actor and job.actor.is_doomed):
                job.process.is_dead = True

    def _stat(self, job: Job) -> Callable[[Sequence[str]], dict[str, FileVersion | DataError]]:
        def stat(uris: Sequence[str]) -> dict[str, FileVersion | DataError]:
            self.scheduler.stop("stat")
            job.view = dict(self.collection)
            found: dict[str, FileVersion | DataError] = {}
            for uri in uris:
                version, kind = self.collection[uri.removeprefix("/videos/").removesuffix(".mp4")]
                found[uri] = GoneError("gone") if kind == "gone" else FileVersion(1000, f"mtime {version}")
            return found

        return stat

    def _enter(self, job: Job, lock: StoreLock) -> None:
        job.lock, job.number, job.began = lock, lock.held.generation, self.operations
        self.on_entry(job)

    def _extract(self, job: Job) -> None:
        # As pipelines.extract._write.
        work = FrameStoreUpdate(CONFIG, MANIFEST, self.uri, self._stat(job), job.name)
        if work.inventory_if_done(work.compare_with_collection()):
            return
        with StoreLock(self.uri, stale_s=STALE_S) as lock:
            self._enter(job, lock)
            work.hold(lock.held)
            comparison = work.compare_with_collection()
            work.refuse_lost(comparison)
            if work.has_nothing_left(comparison):
                inventory = work.count()
            else:
                work.mark_incomplete(comparison)
                self._decode(job, comparison, lock)
                inventory = work.retire_and_count()
            if inventory.is_complete:
                self.completed[job.name] = job.view
            work.finish(comparison, inventory, {})
            self.on_finish(job)

    def _decode(self, job: Job, comparison: Comparison, lock: StoreLock) -> None:
        """Writes parts of two clips each, by workers on machines of their own, some of which die."""
        groups = [
            list(comparison.pending[first : first + 2]) for first in range(0, len(comparison.pending), 2)
        ]
        actors = [self._work(job, group) for group in groups]
        while actors:
            self.scheduler.stop("wait", ready=lambda: any(map(_has_ended, actors)))
            for place, actor in enumerate(actors):
                if not _has_ended(actor):
                    continue
                if not actor.is_over:  # died, so it is retried elsewhere
                    actors[place] = self._work(job, groups[place])
                    continue
                del actors[place], groups[place]
                if actor.error:
                    raise actor.error
                lock.raise_if_lost()
                break

    def _work(self, job: Job, group: list[dict[str, Any]]) -> Actor:
        process = self.process(Machine(f"node {len(self.scheduler.processes)}"), 1)
        job.workers.append(process)
        return self.scheduler.start(process, "worker", lambda: self._write(job, group))

    def _write(self, job: Job, group: list[dict[str, Any]]) -> None:
        # As gare.extract.frame_writer.PartWriter.
        good, bad = [], []
        for asked in group:
            identity = {key: asked[key] for key in ("start_s", "end_s", "source_bytes", "source_version")}
            video_id = asked["video_id"]
            version, kind = job.view[video_id]
            if kind == "good":
                note = f"{job.name} {video_id}"
                self.written[note] = Row(video_id, version, job)
                good.append(stored_row(RAW, video_id, _FRAMES) | identity | {"note": note})
            else:
                bad.append(failure_row(video_id, asked["attempts"] + 1) | identity)
        name = part_name_of_group([job.name, *(asked["video_id"] for asked in group)], job.number)
        for folder, rows, schema in (("failures", bad, FAILURE_SCHEMA), ("data", good, frame_schema(RAW))):
            if rows:
                put_part(self.uri, folder, name, encode_part(folder, name, table_of(rows, schema)))

    def _compact(self, job: Job) -> None:
        # As pipelines.extract._compact.
        Store(self.uri).read_meta()
        with StoreLock(self.uri, stale_s=STALE_S) as lock:
            self._enter(job, lock)
            compact(self.uri, PART_BYTES, lock.held)


def _has_ended(actor: Actor) -> bool:
    return actor.is_over or actor.process.is_dead


class Reading:
    """A reader, such as a training: it looks once for all rows that count.

    Args:
        uri: the store.
        scheduler: scheduler of the history.
        process: process that it runs in.
        now: notes of the rows that count when it begins, by id.
    """

    def __init__(self, uri: str, scheduler: Scheduler, process: Process, now: dict[str, str]) -> None:
        self.found: dict[str, str] | None = None
        #: Number of deleted parts and of late records, after each of which it has to look again.
        self.disturbances = 0
        #: By id, notes of rows that have counted since it began; an empty note if none did for a while.
        self.seen: dict[str, set[str]] = {one: {now.get(one, "")} for one in IDS}

        def read() -> None:
            rows = Store(uri).rows(["note"])
            self.found = {one: str(row["note"]) for one, (_, _, row) in rows.items()}

        self.actor = scheduler.start(process, "reader", read)

    def note(self, now: dict[str, str]) -> None:
        """Records the rows that count now."""
        for one in IDS:
            self.seen[one].add(now.get(one, ""))

    def check(self) -> None:
        """Checks that the rows it has read were there."""
        if self.actor.error:
            if self.actor.process.faults:
                return
            # A part was merged between listing and reading three times in a row.
            assert isinstance(self.actor.error, DataError), repr(self.actor.error)
            assert self.disturbances >= 3, f"a reader was stopped by {self.actor.error!r}"
            return
        assert self.found is not None
        for one in IDS:
            found = self.found.get(one, "")
            assert found in self.seen[one], f"a reader saw {found!r} of {one}, which never counted meanwhile"
