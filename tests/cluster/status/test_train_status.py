"""The line that a person watches while a run trains: what it says, when, and when it calls data slow."""

from __future__ import annotations

import pytest

from cluster.status.train_status import EVERY_S, SLOW_SHARE, RunShape, TrainStatus, advice

ADVICE = {"jpeg": "raise cluster.loaders_per_worker", "augment": "less of it", "transfer": "more CPUs"}
LOADING = {"time/data_fetch_s": 0.1, "time/data_jpeg_s": 3.0, "time/data_augment_s": 2.0}
VALUES = {
    "loss/total": 2.3144,
    "loss/nce_t2v": 2.1,
    "loss/nce_v2t": 2.25,
    "loss/bottleneck": 0.4123,
    "loss/radii": -0.5,
    "loss/direction": 0.0,
}


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def status_of(
    clock: Clock,
    *,
    rank: int = 0,
    step: int = 0,
    memory: str = "peak 3.2 GB",
    on_device: tuple[str, ...] = ("transfer",),
) -> TrainStatus:
    whole = RunShape("first", (100, 200, 300), 128, rank, ADVICE.__getitem__, on_device)
    return TrainStatus(whole, step, lambda: memory, clock)


def after(
    status: TrainStatus, clock: Clock, step: int, *, waited: float = 0.0, worked: float = 1.0, **parts: float
) -> str:
    clock.now += waited + worked
    loading = LOADING | {f"time/data_{part}_s": seconds for part, seconds in parts.items()}
    return status.step(step, VALUES | {"time/data_wait_s": waited, "time/step_s": worked} | loading)


def test_a_line_says_all_of_it(clock: Clock) -> None:
    """Whoever looks at a run once must see where it is, whether it learns and when it ends."""
    status = status_of(clock)
    after(status, clock, 1)
    status.validated(1, {"val/t2v/R1": 46.62, "val/v2t/R1": 45.0, "val/t2v/R5": 70.0})
    status.validated(2, {"val/t2v/R1": 44.0, "val/v2t/R1": 45.5})
    lines = [after(status, clock, step, waited=0.04, worked=0.96) for step in range(2, 12)]
    assert lines[:-1] == [""] * 9
    assert lines[-1] == (
        "first: step 11 of 300 (4 %), epoch 1 of 3, "
        "loss 2.314 (t2v 2.1, v2t 2.25, bottleneck 0.412, radii -0.5), "
        "val R@1 44.0 t2v 45.5 v2t after epoch 2 (best 46.6), "
        "128 pairs/s, data wait 4 %, peak 3.2 GB, 4:49 min left"
    )


def test_it_reads_well_in_a_file(clock: Clock) -> None:
    """A log file with carriage returns and colours is one long line."""
    line = after(status_of(clock), clock, 1)
    assert line.startswith("first: step 1 of 300")
    assert line.isprintable()


def test_the_first_and_the_last_step_have_a_line(clock: Clock) -> None:
    """A person who starts a run wants to see soon that it runs, and at the end that it ended."""
    status = status_of(clock)
    said = [step for step in range(1, 301) if after(status, clock, step, worked=0.125)]
    assert said == [1, 81, 161, 241, 300]
    assert EVERY_S == 10


def test_the_epoch_is_that_of_the_step(clock: Clock) -> None:
    """The last step of an epoch must not be counted as the next one's."""
    whole = status_of(clock).whole
    assert [whole.epoch(step) for step in (1, 100, 101, 200, 201, 300)] == [1, 1, 2, 2, 3, 3]
    assert RunShape("short", (3,), 8).epoch(3) == 1


def test_a_run_that_waits_for_data_says_so_and_what_to_do(clock: Clock) -> None:
    """A GPU that waits for clips looks like a slow GPU otherwise."""
    status = status_of(clock)
    after(status, clock, 1)
    line = after(status, clock, 2, waited=7.0, worked=4.0)
    assert "data wait 64 %" in line
    assert line.endswith(f"; SLOW because of data: decoding JPEG takes 3 s a batch: {ADVICE['jpeg']}")
    for step in range(3, 12):
        after(status, clock, step)
    line = after(status, clock, 12)
    assert "data wait 0 %" in line
    assert "SLOW" not in line
    share = SLOW_SHARE - 0.01
    assert "SLOW" not in after(status, clock, 13, waited=20 * share, worked=20 * (1 - share))


def test_the_part_that_holds_the_others_up_is_named(clock: Clock) -> None:
    """More loaders do not help where the way to the GPU is slow, and nothing else does where they are few."""
    status = status_of(clock)
    after(status, clock, 1)
    line = after(status, clock, 2, waited=7.0, worked=4.0, augment=9.0)
    assert "SLOW because of data: augmentation takes 9 s a batch: less of it" in line
    # All loaders' parts together are slower than the transfer to the device, or faster.
    line = after(status, clock, 3, waited=7.0, worked=4.0, transfer=5.0)
    assert "decoding JPEG takes 3 s" in line
    line = after(status, clock, 4, waited=7.0, worked=4.0, transfer=5.2)
    assert "the transfer to the device takes 5.2 s a batch: more CPUs" in line
    # On a GPU the augmentation is done on that way.
    status = status_of(clock, on_device=("augment", "transfer"))
    after(status, clock, 1)
    line = after(status, clock, 2, waited=7.0, worked=4.0, augment=2.5, transfer=1.0)
    assert "augmentation takes 2.5 s" in line


def test_waiting_for_the_first_batch_is_no_slow_data(clock: Clock) -> None:
    """Loading actors start then; a warning at every start would be read by nobody."""
    status = status_of(clock)
    line = after(status, clock, 1, waited=9.0, worked=1.0)
    assert "data wait 90 %" in line
    assert "SLOW" not in line
    assert "data wait 0 %" in after(status, clock, 2, worked=11.0)


def test_other_workers_speak_only_where_they_wait_for_data(clock: Clock) -> None:
    """The first worker waits for the slowest inside its step, and cannot know what that one waits for."""
    status = status_of(clock, rank=3)
    assert not after(status, clock, 1)
    assert not after(status, clock, 2, worked=11.0)
    line = after(status, clock, 3, waited=8.0, worked=4.0)
    assert line.startswith("first, worker 3: step 3 of 300")
    assert "SLOW because of data" in line


def test_a_run_that_goes_on_counts_its_own_steps(clock: Clock) -> None:
    """Steps of an earlier start, in no time at all, would promise an end that does not come."""
    line = after(status_of(clock, step=200), clock, 201, worked=2.0)
    assert "64 pairs/s" in line
    assert line.endswith("3:18 min left")


def test_advice_fits_the_run() -> None:
    """What cannot help must not be proposed."""
    frames = advice("jpeg", from_features=False, can_be_raw=True, loaders=2)
    assert "cluster.loaders_per_worker (now 2)" in frames
    assert "extract.encoding=raw" in frames
    assert "train.input=features" in frames
    assert "encoding" not in advice("fetch", from_features=False, can_be_raw=False, loaders=1)
    assert "storage.root" in advice("fetch", from_features=False, can_be_raw=False, loaders=1)
    augmented = [
        advice("augment", from_features=False, can_be_raw=True, loaders=1, on_gpu=gpu) for gpu in (0, 1)
    ]
    assert ["loaders_per_worker" in one for one in augmented] == [True, False]
    assert all("augment.operations" in one for one in augmented)
    assert "cpus_per_worker" in advice("transfer", from_features=True, can_be_raw=True, loaders=1)
    features = advice("fetch", from_features=True, can_be_raw=True, loaders=1)
    assert "features.cache_mb" in features
    assert "train.input" not in features
