"""The way of batches to the device: all of them, in order, whole, and whatever fails on the way is said."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gare.errors import DataError, GareError
from gare.train.input.feed import WAITING, Feed
from gare.train.input.loader import PARTS, Arrays

CPU = torch.device("cpu")
SIZES = [5, 5, 3, 1]


def chunk(first: int, count: int, captions: int = 1) -> Arrays:
    """Rows that say which they are."""
    numbers = np.arange(first, first + count)
    arrays = {
        "frames": np.repeat(numbers, 6).reshape(count, 2, 3).astype(np.uint8),
        "frame_mask": np.ones((count, 2), np.bool_),
        "text": np.ones((count, captions, 2), np.float16),
        "seconds": np.array([[0.1, 0.2, 0.3]]),
    }
    for array in arrays.values():
        array.flags.writeable = False  # as what Ray shares is
    return arrays


def chunks(sizes: list[int], largest: int) -> Iterator[Arrays]:
    first = 0
    for size in sizes:
        for start in range(0, size, largest):
            count = min(largest, size - start)
            yield chunk(first, count, captions=1 + first % 3)
            first += count


@pytest.mark.parametrize("ahead", [False, True], ids=["when asked", "ahead"])
@pytest.mark.parametrize("largest", [1, 2, 5])
def test_batches_are_put_together_in_order(ahead: bool, largest: int) -> None:
    """A batch with rows of another, or in another order, pairs captions with the wrong clips."""
    with Feed(chunks(SIZES, largest), SIZES, CPU, ahead=ahead) as feed:
        found = list(feed)
    assert [len(batch.tensors["frames"]) for batch in found] == SIZES
    rows = torch.cat([batch.tensors["frames"][:, 0, 0] for batch in found])
    assert rows.tolist() == list(range(sum(SIZES)))
    found[0].tensors["frames"] += 1  # memory of its own: a transform may work in place
    for batch in found:
        text = batch.tensors["text"]
        assert (text[:, 0] == 1).all()
        assert set(text.unique().tolist()) <= {0.0, 1.0}, "what shorter rows lack is not zero"


@pytest.mark.parametrize("ahead", [False, True], ids=["when asked", "ahead"])
def test_a_batch_is_finished_on_the_way(ahead: bool) -> None:
    """The GPU augments there; the wrong batch's seeds would change the training with the timing."""

    def finish(place: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {"place": torch.full((len(tensors["frames"]),), place)}

    with Feed(chunks(SIZES, 2), SIZES, CPU, finish=finish, ahead=ahead) as feed:
        assert [batch.tensors["place"].tolist() for batch in feed] == [
            [place] * size for place, size in enumerate(SIZES)
        ]


@pytest.mark.parametrize("ahead", [False, True], ids=["when asked", "ahead"])
def test_faults_reach_the_step(ahead: bool) -> None:
    """A thread that dies with what failed leaves a training that waits for ever."""

    def broken() -> Iterator[Arrays]:
        yield chunk(0, 5)
        raise DataError("has no rows", where="part 7")

    with Feed(broken(), SIZES, CPU, ahead=ahead) as feed:
        assert len(next(feed).tensors["frames"]) == 5
        with pytest.raises(DataError, match="part 7: has no rows"):
            next(feed)
    with (
        Feed(chunks(SIZES[:2], 2), SIZES, CPU, ahead=ahead) as feed,
        pytest.raises(GareError, match="ended before batch 3 of 4"),
    ):
        list(feed)
    with Feed(iter([chunk(0, 6)]), [5], CPU, ahead=ahead) as feed, pytest.raises(GareError, match="6 clips"):
        next(feed)


def test_no_more_than_is_needed_soon_is_brought() -> None:
    """Finished batches are as large as a GPU's memory allows few of."""
    taken: list[int] = []
    several = threading.Event()

    def counted() -> Iterator[Arrays]:
        for number in range(20):
            taken.append(number)
            if len(taken) == 1 + WAITING:
                several.set()
            yield chunk(number, 1)

    with Feed(counted(), [1] * 20, CPU, ahead=True) as feed:
        assert several.wait(30)
        next(feed)
        assert len(taken) <= 1 + WAITING + 2
    # Closing has ended the thread, in the middle of the batches.
    assert len(taken) < 20
    assert not [one for one in threading.enumerate() if one.name == "batches to the device"]
    with pytest.raises(StopIteration):
        next(feed)


def test_closing_closes_what_loads() -> None:
    """Actors that go on loading for nobody take CPUs and memory from the next run."""
    closed = threading.Event()

    def loading() -> Iterator[Arrays]:
        try:
            yield from chunks([1] * 20, 1)
        finally:
            closed.set()

    with Feed(loading(), [1] * 20, CPU, ahead=True) as feed:
        next(feed)
    assert closed.is_set()


def test_closing_does_not_wait_for_a_whole_batch() -> None:
    """A run that is asked to stop has seconds, and a slow storage takes minutes for a batch."""
    taken, asked_for = [], threading.Event()
    go_on = threading.Event()

    def slow() -> Iterator[Arrays]:
        for number in range(100):
            taken.append(number)
            asked_for.set()
            go_on.wait(30)
            yield chunk(number, 1)

    feed = Feed(slow(), [100], CPU, ahead=True)
    assert asked_for.wait(30)
    closer = threading.Thread(target=feed.close)
    closer.start()
    assert feed.closing.wait(30)
    go_on.set()
    closer.join(30)
    assert not closer.is_alive()
    assert len(taken) == 1


def test_memory_that_does_not_suffice_names_the_setting() -> None:
    """Fewer pairs in a pass of the towers do not help where batches wait on the GPU."""

    def finish(place: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    feed = Feed(chunks(SIZES, 2), SIZES, CPU, finish=finish, ahead=True)
    with feed, pytest.raises(GareError, match=r"batches of 5 pairs .* 2\.00 GiB") as raised:
        next(feed)
    assert raised.value.where == "train.batch_size"


def test_what_loaders_share_is_let_go() -> None:
    """A batch more in the memory that all processes share is half a gigabyte at the paper's sizes."""
    held: list[weakref.ref[np.ndarray]] = []

    def watched() -> Iterator[Arrays]:
        for number in range(3):
            arrays = chunk(number, 1)
            held.append(weakref.ref(arrays["frames"]))
            yield arrays
            del arrays

    feed = Feed(watched(), [1] * 3, CPU)
    for number in range(3):
        next(feed)
        gc.collect()
        # The generator of the test itself holds the newest.
        assert sum(reference() is not None for reference in held) <= 1, number


def test_seconds_are_told_by_part() -> None:
    """Whoever sees a slow run must be told which part to make faster, at the pace of all loaders together."""
    with Feed(chunks(SIZES, 2), SIZES, CPU, loaders=2) as feed:
        batch = next(feed)  # of three chunks
        seconds = feed.seconds(batch)
    for part, each in zip(PARTS, (0.1, 0.2, 0.3), strict=True):
        # What is finished on the way counts as augmentation, here next to nothing.
        assert seconds[part] == pytest.approx(3 * each / 2, abs=0.01)
    assert seconds["transfer"] > 0
    assert seconds["device_wait"] == 0
