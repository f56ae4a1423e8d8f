"""Histories that the model of the store's writers has found, or that it was asked about: who writes late."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from gare.data.store.contents import Store
from gare.errors import LockLostError
from tests.helpers.stores import describe_store
from tests.writers.history import History
from tests.writers.jobs import IDS, RAW
from tests.writers.scheduling import Machine
from tests.writers.storage import install, serve

SLEEPER, SUCCESSOR = Machine("sleeper"), Machine("successor")


@pytest.fixture(params=["local", "kept", "refused"])
def history(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[History]:
    """A store that has been filled, on each kind of storage."""
    kind = str(request.param)
    uri = str(tmp_path) if kind == "local" else "s3://videos/store"
    with contextlib.ExitStack() as stack:
        server = None if kind == "local" else stack.enter_context(serve(kind))
        history = History(uri, kind)
        install(stack.enter_context(pytest.MonkeyPatch.context()), history.scheduler, server)
        stack.callback(history.scheduler.end)
        describe_store(uri, RAW, complete=False)
        assert history.through("extract", SLEEPER).is_over
        try:
            yield history
            history.end()
        finally:
            if server:
                server.empty("videos")


def test_a_record_of_retired_rows_is_not_put_over_the_successors(history: History) -> None:
    """A clip that came back would vanish from a complete store when a sleeper that saw it gone goes on."""
    history.change("b", "good")
    history.through("extract", SLEEPER)
    history.change("a", "gone")
    job = history.runner.start("extract", history.runner.process(SLEEPER, 1))
    history.until(job, "/_META.json")
    history.until(job, "/_RETIRED.json")
    history.scheduler.suspend(job.process)
    history.restore("a", 0)
    # It finds all as it should be, and has nothing to retire.
    history.through("extract", SUCCESSOR)
    history.scheduler.wake(job.process, was_machine=False)
    assert job.actor
    history.finish(job.actor)
    assert isinstance(job.actor.error, LockLostError)
    # Without conditions it did, until the next run, see docs/design/store-writers.md.
    assert ("a" in history.rows) == (history.is_conditional or not history.late)
    assert bool(history.late) != history.is_conditional


def test_a_reader_does_not_see_rows_that_a_sleepers_record_brings_back(history: History) -> None:
    """It listed the parts when a clip had no row, and would see the row that was retired before it began."""
    history.change("b", "good")
    job = history.runner.start("extract", history.runner.process(SLEEPER, 1))
    history.until(job, "/_META.json")
    history.until(job, "/_RETIRED.json")
    history.scheduler.suspend(job.process)  # its record says nothing of a
    retired = history.rows["a"]
    history.change("a", "good")
    successor = history.runner.start("extract", history.runner.process(SUCCESSOR, 1))
    assert job.actor
    assert successor.actor
    while "a" in history.rows:
        assert history.move(successor.actor)
    reading = history.read(history.runner.process(SLEEPER, 2))
    while "/generations" not in reading.actor.stop.where:  # it has listed the parts
        assert history.move(reading.actor)
    history.finish(successor.actor)
    history.scheduler.wake(job.process, was_machine=False)
    history.finish(job.actor)
    assert isinstance(job.actor.error, LockLostError)
    history.finish(reading.actor)
    assert reading.found is not None
    assert history.rows["a"] != retired
    # Where the record was put over the successor's, it has looked again.
    assert reading.found.get("a") == (None if history.is_conditional else history.rows["a"])


def test_a_part_is_not_deleted_whose_rows_count_again(history: History) -> None:
    """A compaction that sleeps before it deletes would take clips that have come back meanwhile."""
    for one in IDS:
        history.change(one, "gone")
    history.through("extract", SLEEPER)
    job = history.runner.start("compact", history.runner.process(SLEEPER, 1))
    assert job.actor
    while job.actor.stop.what != "delete" or "/data/" not in job.actor.stop.where:
        assert history.move(job.actor)
    history.scheduler.suspend(job.process)
    for one in IDS:
        history.restore(one, 0)
    history.through("extract", SUCCESSOR)
    history.scheduler.wake(job.process, was_machine=False)
    history.finish(job.actor)
    assert isinstance(job.actor.error, LockLostError)
    assert history.rows.keys() == set(IDS)
    assert not history.late


def test_a_generation_that_is_lost_is_not_begun_again(history: History) -> None:
    """Parts of two jobs of one number could not be told apart, and what was fenced would come back."""
    for one in IDS:
        history.change(one, "good")
    job = history.runner.start("extract", history.runner.process(SLEEPER, 1))
    history.until(job, "/generations/")
    assert job.actor
    if job.actor.stop.what == "conditional put" and not history.is_conditional:
        history.move(job.actor)  # refused, or not seen
        history.until(job, "/generations/")
    history.scheduler.suspend(job.process)
    other = history.runner.start("extract", history.runner.process(SUCCESSOR, 1))
    assert other.actor
    before = dict(history.rows)
    while not history.rows.items() - before.items():
        assert history.move(other.actor)
    # It writes its file over the other one, or finds it; then it sees that its claim is gone.
    history.scheduler.wake(job.process, was_machine=False)
    history.scheduler.run(job.actor, 60)
    history.finish(other.actor)
    history.finish(job.actor)
    assert job.number != other.number


def test_a_reader_does_not_see_rows_that_a_compaction_forgets(history: History) -> None:
    """Training would be given clips that are gone, or of a video that has been replaced."""
    history.change("a", "gone")
    history.through("extract", SLEEPER)
    reading = history.read(history.runner.process(SLEEPER, 1))
    for place in ("/data", "/_RETIRED.json"):  # it has read the parts
        while place not in reading.actor.stop.where:
            assert history.move(reading.actor)
    history.through("compact", SUCCESSOR)
    history.finish(reading.actor)
    assert reading.found is not None
    assert reading.found.keys() == {"b", "c", "d"}


def test_a_reader_does_not_take_parts_that_were_merged_for_void(history: History) -> None:
    """A store whose files were merged twice while a reader slept would look empty to it."""
    merging = history.runner.start("compact", history.runner.process(SLEEPER, 1))
    history.until(merging, "/_META.json")
    history.scheduler.kill(merging.process)  # it has merged all, and its part is fenced
    reading = history.read(history.runner.process(SLEEPER, 2))
    while "/generations" not in reading.actor.stop.where:  # it has listed that part
        assert history.move(reading.actor)
    history.change("a", "good")
    history.through("extract", SUCCESSOR)
    history.through("compact", SUCCESSOR)
    history.through("compact", SUCCESSOR)
    history.finish(reading.actor)
    reading.check()
    assert reading.found is not None
    assert reading.found.keys() == set(IDS)


def test_what_fails_again_after_a_compaction_counts_again(history: History) -> None:
    """Its row was taken for the one that had been replaced, and the store never came to an end."""
    for _ in range(2):
        history.change("a", "gone")
        history.through("extract", SLEEPER)
        assert Store(history.uri).read_meta().complete
        history.restore("a", 0)
        history.through("extract", SLEEPER)
        history.through("compact", SLEEPER)
    assert history.rows.keys() == set(IDS)
