"""Checkpoints of a training worker, as a callback: when to write one, when to stop, and where to resume.

Rank 0 writes after an epoch, every ``train.checkpoint_every_steps``, every ``train.checkpoint_every_s``, and
at once if a node is about to be preempted or the run is asked to stop. All workers end together: if one left
alone, the others would wait in their next collective, and Ray would restart them in vain.
"""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import Any

from gare.config import Config, TrainConfig
from gare.errors import CheckpointError, GareError, StoppedError
from gare.storage.files import delete_file, exists, read_json, write_json
from gare.storage.generations import OwnedFolder
from gare.storage.patience import retry_until_answered
from gare.storage.run_folder import RunFolder
from gare.train.callback import Callback
from gare.train.checkpoint.history import History
from gare.train.checkpoint.index import Checkpoints, CheckpointWriter, Entry

logger = logging.getLogger(__name__)

#: Metric that selects the best checkpoint; always on val.
SELECTION = "val/t2v/R1"
#: Seconds between checks for a request to stop, and between questions to Ray about draining nodes.
LOOK_EVERY_S = 1.0
#: Seconds between checks for another job that has taken the run over.
LOCK_EVERY_S = 5.0
ASK_EVERY_S = 0.5


def checkpoints_of(train: TrainConfig, folder: RunFolder, *, validated: bool) -> Checkpoints:
    """Returns the checkpoints of a run.

    Args:
        train: settings of the run.
        folder: the run.
        validated: True if epochs end with metrics on val, of which one selects the best checkpoint.
    """
    keep = None if train.keep_checkpoints == "all" else int(train.keep_checkpoints)
    return Checkpoints(folder.checkpoints, keep=keep, score=SELECTION if validated else "")


def _seconds_between(config: Config) -> float:
    """Returns the seconds between checkpoints within an epoch; 0 for no checkpoints by time.

    Ray ends workers without warning in order to add more: each of its checks for nodes must find a newer
    checkpoint, or the run would repeat the same steps for ever.
    """
    every, resize = config.train.checkpoint_every_s, config.cluster.resize_every_s
    if not config.cluster.min_workers:
        return every
    return min(every or resize, resize / 2)


class StopRequest:
    """File of the run with which the driver asks its workers, on any machine, to stop."""

    def __init__(self, folder: RunFolder) -> None:
        self.uri = folder.stop

    def make(self, reason: str) -> None:
        """Writes the request with its reason; workers keep the first reason that they see."""
        write_json(self.uri, {"reason": reason})

    def withdraw(self) -> None:
        """Deletes the request."""
        delete_file(self.uri)

    def reason(self) -> str:
        """Reason for the stop request, or an empty string."""
        return str(read_json(self.uri)["reason"]) if exists(self.uri) else ""


class Checkpointing(Callback):
    """Checkpoints of one worker. All workers must call ``restore`` first, and then follow the loop.

    Args:
        learner: learner to save; its configuration says when.
        folder: the run.
        rank: rank of this worker; only rank 0 writes.
        device: device of the learner.
        validated: True if epochs end with metrics on val.
        watch: True to ask Ray for nodes that are about to be preempted.
        owned: lock of the run; None if no other job can exist.

    Attributes:
        history: record of the run, saved with each checkpoint; ``restore`` reads it.
        epochs: epochs done.
    """

    def __init__(
        self,
        learner: Any,
        folder: RunFolder,
        rank: int,
        device: Any,
        *,
        validated: bool,
        watch: bool,
        owned: OwnedFolder | None = None,
    ) -> None:
        self.train: TrainConfig = learner.config.train
        self.learner, self.rank, self.device = learner, rank, device
        self.every_s = _seconds_between(learner.config)
        self.checkpoints = checkpoints_of(self.train, folder, validated=validated)
        self.history, self.epochs = History(folder.history), 0
        self.writer = CheckpointWriter(self.checkpoints)
        self.request = StopRequest(folder)
        self.watch, self.noticed = watch, False
        self.owned, self.lost = owned, False
        self.due, self.reason, self.over = False, "", threading.Event()
        self.saved = self.asked = time.monotonic()
        if not rank:
            threading.Thread(target=self._watch_for_stop, name="stop request", daemon=True).start()

    def restore(self) -> int:
        """Restores the last readable checkpoint, the same on all workers, and the record up to there.

        Returns:
            The number of epochs done.

        Raises:
            CheckpointError: if there are checkpoints and none can be used.
            DataError: if the record cannot be read.
            LockLostError: if another job has taken the run over; nothing is changed.
        """
        self.epochs, step = self._restore_learner(), self.learner.step
        self.history = History.read(self.history.uri, step=step, epoch=self.epochs)
        if step:
            self.history.resumed = sorted({*self.history.resumed, step})
        return self.epochs

    def _restore_learner(self) -> int:
        """Restores the learner; returns the number of epochs done."""
        import torch

        from gare.train.checkpoint.files import restore_learner
        from gare.train.loss.gather import max_over_workers

        lost = not self.rank and self._is_lost()
        chosen = self._newest_usable() if not (self.rank or lost) else None
        if not (self.rank or lost):
            self.checkpoints.remove_after(chosen)
        # From rank 0 and not from the index, which another machine's cache may still show in an old state.
        mine = [chosen.step, chosen.epoch] if chosen else [-1, -1]
        step, epoch = map(int, max_over_workers(torch.tensor(mine, device=self.device)))
        if self._agree(lost)[0] and self.owned:
            raise self.owned.lost_error()
        if step < 0:
            return 0
        if self.rank:
            location = self.checkpoints.location(Entry(step, epoch))
            # Quiet: rank 0 has already warned if an earlier version's checkpoints have no checksums.
            restore = partial(restore_learner, location, self.learner, quiet=True)
            retry_until_answered(restore, f"{location} cannot be read")
        else:
            logger.info("%s: continues after step %d of %d", self.train.run, step, self.learner.num_steps)
        return epoch

    def _newest_usable(self) -> Entry | None:
        """Restores the learner from the last readable checkpoint; returns None if there is none."""
        from gare.train.checkpoint.files import restore_learner

        faults: list[CheckpointError] = []
        entries = retry_until_answered(self.checkpoints.entries, f"{self.checkpoints.uri} cannot be read")
        for entry in reversed(entries):
            location = self.checkpoints.location(entry)
            restore = partial(restore_learner, location, self.learner, sums=entry.sha256)
            try:
                # A storage that does not answer says nothing about the checkpoint.
                retry_until_answered(restore, f"the checkpoint of step {entry.step} cannot be read")
            except CheckpointError as fault:
                logger.warning("skipping a damaged checkpoint: %s", fault)
                faults.append(fault)
            else:
                return entry
        if faults:
            raise faults[0]
        return None

    def on_step(self, step: int, values: dict[str, float]) -> None:
        """Writes a checkpoint or stops the run, if due.

        Raises:
            GareError: if a checkpoint could not be written, or the run is to stop; on all workers.
        """
        now = time.monotonic()
        every_steps = self.train.checkpoint_every_steps
        asked_for = bool(every_steps) and step % every_steps == 0
        self.due |= asked_for
        self.due |= bool(self.every_s) and now - self.saved >= self.every_s
        ask = self.watch and not self.noticed and now - self.asked >= ASK_EVERY_S
        failed, stop, ask = self._agree(self.writer.fault is not None, bool(self.reason), ask)
        if failed:
            raise self._fault()
        if stop:
            raise self._stop()
        if ask:
            self._ask_ray(now)
        # A user who keeps all wants each of these steps, so wait for the storage rather than miss one.
        waits = asked_for and self.train.keep_checkpoints == "all"
        if not self.rank and self.due and (waits or not self.writer.busy):
            self._write(Entry(step, self.epochs))

    def on_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        """Writes a checkpoint with the metrics on val."""
        self.epochs = epoch
        if not self.rank:
            on_val = {name: value for name, value in metrics.items() if name.startswith("val/")}
            self._write(Entry(self.learner.step, epoch, on_val))

    def on_finish(self) -> None:
        """Waits for the last checkpoint to be written.

        Raises:
            GareError: if it could not be written; on all workers.
        """
        self.writer.wait()
        self.over.set()
        if self._agree(self.writer.fault is not None or self.lost)[0]:
            raise self._fault()

    def _write(self, entry: Entry) -> None:
        from gare.train.checkpoint.files import capture

        if self._is_lost():
            return  # the files now belong to another job
        # Before making the copy, since each one is as large as the model and its optimiser.
        self.writer.wait()
        self.writer.write(capture(self.learner, entry.epoch), entry, self.history.copy())
        self.due, self.saved = False, time.monotonic()

    def _agree(self, *flags: bool) -> list[bool]:
        from gare.train.loss.gather import any_worker

        return any_worker(flags, self.device)

    def _fault(self) -> GareError:
        self.over.set()
        if self.lost and self.owned:
            return self.owned.lost_error()
        return self.writer.fault or StoppedError("another worker could not write the checkpoint")

    def _is_lost(self) -> bool:
        """Returns True if another job is known to have taken the run over."""
        if self.owned and not self.lost:
            try:
                self.lost = self.owned.is_lost()
            except GareError as error:
                logger.warning("cannot check the lock: %s", error)
        if self.lost:
            self.reason = "another job"
        return self.lost

    def _stop(self) -> GareError:
        """Writes a last checkpoint; returns the error that ends the run."""
        self.over.set()
        if self.rank:
            return StoppedError("the run was asked to stop")
        self._write(Entry(self.learner.step, self.epochs))
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
                    "node %s is about to be preempted: writing a checkpoint after step %d",
                    nodes,
                    self.learner.step,
                )

    def _watch_for_stop(self) -> None:
        """Watches, in a thread of rank 0, for a request to stop and for another job that took over."""
        looked = time.monotonic()
        while not self.over.wait(LOOK_EVERY_S):
            if time.monotonic() - looked >= LOCK_EVERY_S:
                looked = time.monotonic()
                if self._is_lost():
                    return
            try:
                self.reason = self.request.reason()
            except GareError:
                continue  # the storage fails at the moment
            if self.reason:
                return
