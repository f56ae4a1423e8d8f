"""Training through faults: whatever is killed, and whenever, the run is that of an undisturbed one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cluster.layout import Layout
from gare.train.checkpoint.index import Checkpoints
from pipelines import train
from tests.helpers.recovery import (
    STEPS,
    Recovery,
    assert_as_undisturbed,
    last_entry,
    recovering,
    resumed,
    send,
    workers,
)
from tests.pipelines.test_faults import wait_for

pytestmark = pytest.mark.faults


class Killer(threading.Thread):
    """Kills all training workers at once, as a node that is lost does, after given steps and within an epoch.

    They are held while it looks where they are, so that it strikes where it means to.
    """

    def __init__(self, folder: str, after: list[int]) -> None:
        super().__init__()
        self.folder, self.after = folder, after
        self.killed: list[int] = []
        self.over = threading.Event()

    def run(self) -> None:
        for step in self.after:
            if not wait_for(lambda step=step: self._strike(step), lambda: not self.over.is_set()):
                return

    def _strike(self, step: int) -> bool:
        beyond = max([step, *(last + 1 for last in self.killed)])

        def there() -> bool:
            entry = last_entry(self.folder)
            return entry is not None and entry.step >= beyond and entry.step % 3 != 0

        if not there():
            return False
        found = workers()
        send(found, "suspend")
        entry = last_entry(self.folder)
        if there() and len(found) == 2 and entry:
            self.killed.append(entry.step)
            send(found, "kill")
            Recovery("all training workers are killed", self.folder, entry.step)
            psutil.wait_procs(found, timeout=30)
            return True
        send(found, "resume")
        return False


@pytest.fixture
def killer(places: Layout, rng: np.random.Generator) -> Iterator[Killer]:
    after = sorted(int(step) for step in rng.choice(np.arange(1, 40), 3, replace=False))
    thread = Killer(places.run("thrice"), after)
    yield thread
    thread.over.set()
    if thread.is_alive():
        thread.join()


def test_killed_three_times_within_epochs(
    calm: dict[str, Any], places: Layout, root: Path, killer: Killer
) -> None:
    """Preempted three times in a night, a run must neither lose its steps nor come out otherwise."""
    killer.start()
    result = train.run(recovering("thrice"))
    killer.over.set()
    killer.join()
    folder = places.run("thrice")
    assert len(killer.killed) == 3, f"it was done before it could be killed after steps {killer.after}"
    assert resumed(folder) == killer.killed
    assert_as_undisturbed(result, calm, places, root, folder)
    kept = Checkpoints(f"{folder}/checkpoints").entries()
    assert [entry.step for entry in kept][-1] == STEPS
    assert len(kept) <= 3
