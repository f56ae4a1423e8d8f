"""When a training worker writes a checkpoint, when it stops, and where it continues.

Rank 0 writes: after an epoch, every ``train.checkpoint_every_steps``, every ``train.checkpoint_every_s``, and
at once where a node is about to be taken away or the run is asked to stop. All workers end together: one that
left alone would keep the others waiting in their next collective, and Ray would start them again in vain.
"""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import Any

from cluster.layout import Layout
from gare.config import Config
from gare.errors import CheckpointError, GareError, StoppedError
from gare.storage.files import delete_file, exists, join, read_json, write_json
from gare.storage.generations import Owned
from gare.storage.patience import patiently
from gare.storage.run_folder import RunFolder
from gare.train.checkpoint.history import History
from gare.train.checkpoint.index import Checkpoints, CheckpointWriter, Entry

logger = logging.getLogger(__name__)

#: What the best checkpoint is best at; always on val.
SELECTION = "val/t2v/R1"
#: Seconds between looks for a request to stop, and between questions to Ray whether a node is drained.
LOOK_EVERY_S = 1.0
#: Seconds between looks whether another job has taken the run over.
LOCK_EVERY_S = 5.0
ASK_EVERY_S = 0.5


def checkpoints_of(config: Config, places: Layout, *, validated: bool) -> Checkpoints:
    """The checkpoints of the configured run."""
    folder = join(places.run(config.train.run), "checkpoints")
    keep = config.train.keep_checkpoints
    return Checkpoints(
        folder, keep=None if keep == "all" else int(keep), score=SELECTION if validated else ""
    )


def _seconds_between(config: Config) -> float:
    """Between checkpoints within an epoch; 0: none for the time alone.

    Ray ends workers without a word to make them more: each of its looks for nodes must find a newer
    checkpoint, or the run would do the same steps for ever.
    """
    every, resize = config.train.checkpoint_every_s, config.cluster.resize_every_s
    if not config.cluster.min_workers:
        return every
    return min(every or resize, resize / 2)


class StopRequest:
    """A file of the run by which the driver asks its workers, on whatever machine, to stop."""

    def __init__(self, folder: str) -> None:
        self.uri = RunFolder(folder).stop

    def make(self, reason: str) -> None:
        """Asks; the first reason stays."""
        write_json(self.uri, {"reason": reason})

    def withdraw(self) -> None:
        """Forgets it."""
        delete_file(self.uri)

    def reason(self) -> str:
        """Reason for the stop request, or an empty string."""
        return str(read_json(self.uri)["reason"]) if exists(self.uri) else ""


class Saver:
    """Checkpoints of one worker's run. All workers must call ``restore``, ``step``, ``epoch`` and ``close``.

    Args:
        config: of the run.
        places: where its outputs are.
        learner: what is saved.
        rank: of this worker; only 0 writes.
        device: of the learner.
        validated: whether epochs end with metrics on val.
        watch: whether Ray is asked for nodes that are about to be taken away.
        owned: the lock of the run; None: nobody else is there.
    """

    def __init__(
        self,
        config: Config,
        places: Layout,
        learner: Any,
        rank: int,
        device: Any,
        *,
        validated: bool,
        watch: bool,
        owned: Owned | None = None,
    ) -> None:
        self.train, self.learner, self.rank, self.device = config.train, learner, rank, device
        self.every_s = _seconds_between(config)
        self.checkpoints = checkpoints_of(config, places, validated=validated)
        self.writer = CheckpointWriter(self.checkpoints)
        self.request = StopRequest(places.run(config.train.run))
        self.watch, self.noticed = watch, False
        self.owned, self.lost = owned, False
        self.due, self.reason, self.over = False, "", threading.Event()
        self.saved = self.asked = time.monotonic()
        if not rank:
            threading.Thread(target=self._look, name="stop request", daemon=True).start()

    def restore(self) -> int:
        """Brings the learner to the last checkpoint that can be read, the same on all; returns epochs done.

        Raises:
            CheckpointError: where there are checkpoints and none can be used.
            LockLostError: where another job has taken the run over; nothing is changed.
        """
        import torch

        from gare.train.checkpoint.files import restore_learner
        from gare.train.loss.gather import max_over_workers

        lost = not self.rank and self._is_lost()
        chosen = self._newest_usable() if not (self.rank or lost) else None
        if not (self.rank or lost):
            self.checkpoints.rewind(chosen)
        # Rank 0's word and not the index, which a cache of another machine may still show as it was.
        mine = [chosen.step, chosen.epoch] if chosen else [-1, -1]
        step, epoch = map(int, max_over_workers(torch.tensor(mine, device=self.device)))
        if self._agree(lost)[0] and self.owned:
            raise self.owned.fault()
        if step < 0:
            return 0
        if self.rank:
            location = self.checkpoints.location(Entry(step, epoch))
            # Rank 0 has said it where an earlier version's have no checksums.
            restore = partial(restore_learner, location, self.learner, quiet=True)
            patiently(restore, f"{location} cannot be read")
        else:
            logger.info("%s: continues after step %d of %d", self.train.run, step, self.learner.num_steps)
        return epoch

    def _newest_usable(self) -> Entry | None:
        """Restores the learner from the last checkpoint that can be read; None: there is none."""
        from gare.train.checkpoint.files import restore_learner

        faults: list[CheckpointError] = []
        entries = patiently(self.checkpoints.entries, f"{self.checkpoints.uri} cannot be read")
        for entry in reversed(entries):
            location = self.checkpoints.location(entry)
            restore = partial(restore_learner, location, self.learner, sums=entry.sha256)
            try:
                # A storage that does not answer says nothing of the checkpoint.
                patiently(restore, f"the checkpoint of step {entry.step} cannot be read")
            except CheckpointError as fault:
                logger.warning("a checkpoint is left out: %s", fault)
                faults.append(fault)
            else:
                return entry
        if faults:
            raise faults[0]
        return None

    def step(self, epoch: int, history: History) -> None:
        """After an optimiser step.

        Raises:
            GareError: where a checkpoint could not be written, or the run is to stop; on all workers.
        """
        now = time.monotonic()
        train, step = self.train, self.learner.step
        asked_for = bool(train.checkpoint_every_steps) and step % train.checkpoint_every_steps == 0
        self.due |= asked_for
        self.due |= bool(self.every_s) and now - self.saved >= self.every_s
        ask = self.watch and not self.noticed and now - self.asked >= ASK_EVERY_S
        failed, stop, ask = self._agree(self.writer.fault is not None, bool(self.reason), ask)
        if failed:
            raise self._fault()
        if stop:
            raise self._stop(epoch, history)
        if ask:
            self._ask_ray(now)
        # Who keeps all wants each of these steps, and waits for the storage rather than miss one.
        waits = asked_for and train.keep_checkpoints == "all"
        if not self.rank and self.due and (waits or not self.writer.busy):
            self._write(Entry(step, epoch), history)

    def epoch(self, epoch: int, metrics: dict[str, float], history: History) -> None:
        """After an epoch and its validation."""
        if not self.rank:
            self._write(Entry(self.learner.step, epoch, metrics), history)

    def close(self) -> None:
        """After the last epoch: waits for what is being written.

        Raises:
            GareError: where it could not be written; on all workers.
        """
        self.writer.wait()
        self.over.set()
        if self._agree(self.writer.fault is not None or self.lost)[0]:
            raise self._fault()

    def _write(self, entry: Entry, history: History) -> None:
        from gare.train.checkpoint.files import capture

        if self._is_lost():
            return  # what is there is another job's now
        # Before the copy: each is as large as the model and its optimiser.
        self.writer.wait()
        self.writer.write(capture(self.learner, entry.epoch), entry, history.copy())
        self.due, self.saved = False, time.monotonic()

    def _agree(self, *flags: bool) -> list[bool]:
        from gare.train.loss.gather import any_worker

        return any_worker(flags, self.device)

    def _fault(self) -> GareError:
        self.over.set()
        if self.lost and self.owned:
            return self.owned.fault()
        return self.writer.fault or StoppedError("another worker could not write the checkpoint")

    def _is_lost(self) -> bool:
        """Returns True if another job has taken the run over, as far as can be found out."""
        if self.owned and not self.lost:
            try:
                self.lost = self.owned.is_lost()
            except GareError as error:
                logger.warning("the lock cannot be looked at: %s", error)
        if self.lost:
            self.reason = "another job"
        return self.lost

    def _stop(self, epoch: int, history: History) -> GareError:
        """Writes what there is; the fault that ends the run."""
        self.over.set()
        if self.rank:
            return StoppedError("the run was asked to stop")
        self._write(Entry(self.learner.step, epoch), history)
        self.writer.wait()
        if self.lost:
            return self._fault()
        return self.writer.fault or StoppedError(
            f"training was stopped by {self.reason} after step {self.learner.step} of "
            f"{self.learner.num_steps}, and a checkpoint written",
            where=self.train.run,
            accepted="the same command continues there",
        )

    def _ask_ray(self, now: float) -> None:
        import ray.train

        self.asked = now
        notice = ray.train.get_preemption_info()
        if notice is not None:
            self.noticed = self.due = True
            if not self.rank:
                nodes = ", ".join(sorted(node[:8] for node in notice.preempted_node_to_ranks))
                logger.warning(
                    "node %s is about to be taken away: a checkpoint is written after step %d",
                    nodes,
                    self.learner.step,
                )

    def _look(self) -> None:
        looked = time.monotonic()
        while not self.over.wait(LOOK_EVERY_S):
            if time.monotonic() - looked >= LOCK_EVERY_S:
                looked = time.monotonic()
                if self._is_lost():
                    return
            try:
                self.reason = self.request.reason()
            except GareError:
                continue  # a storage that fails just now
            if self.reason:
                return
