"""Bringing loaded arrays to the device, the next batch while a step computes.

Without a GPU a batch is put together when it is asked for. With one a thread of its own puts it into pinned
memory, copies it on a stream of its own and finishes it there, so that the step finds it on the device.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from gare.errors import GareError
from gare.train.input.loader import ON_HOST, PARTS

logger = logging.getLogger(__name__)

Tensors: TypeAlias = dict[str, Tensor]
#: Finishes a batch on the device: its place among those that the feed brings, its tensors.
Finish: TypeAlias = Callable[[int, Tensors], Tensors]

#: Finished batches that wait on the device beside the one that is used and the one that is made.
WAITING = 1
#: Seconds between looks of the copying thread at whether anybody still wants its batches.
_LOOK_EVERY_S = 0.2
#: Seconds that closing waits for the thread, which may be waiting for a storage that does not answer.
_CLOSE_S = 30.0


@dataclass
class Arrived:
    """A batch on the device.

    Attributes:
        tensors: by name.
        seconds: what loading took by part, of all loaders together; and of this process ``transfer`` and
            ``finish``.
        copied: events around the copy and after the finish, on a GPU.
        waited: events around the wait for it on the stream that computes, on a GPU.
    """

    tensors: Tensors
    seconds: dict[str, float]
    copied: tuple[Any, ...] = ()
    waited: tuple[Any, ...] = field(default=())


class Feed:
    """Iterates over batches on the device, in the order of the chunks that loaders made of them.

    Args:
        chunks: arrays of consecutive rows, in order, none with rows of two batches.
        sizes: rows of each batch that is to come.
        device: where to.
        finish: what is done to each batch on the device, by default nothing.
        loaders: how many processes load the chunks side by side.
        ahead: bring the next batch in a thread of its own; by default on a GPU.
    """

    def __init__(
        self,
        chunks: Iterator[Mapping[str, np.ndarray]],
        sizes: Sequence[int],
        device: torch.device,
        *,
        finish: Finish = lambda place, tensors: tensors,
        loaders: int = 1,
        ahead: bool | None = None,
    ) -> None:
        if str(device) == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        self._chunks, self._sizes, self._device = chunks, sizes, device
        self._finish, self._loaders = finish, max(loaders, 1)
        self._is_gpu = device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None
        if self._is_gpu:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._made = self._make()
        self._over = threading.Event()
        self._queue: queue.Queue[Arrived | BaseException | None] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None
        self._ended = False
        if self._is_gpu if ahead is None else ahead:
            self._thread = threading.Thread(target=self._run, name="batches to the device", daemon=True)
            self._thread.start()

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Arrived:
        """The next batch; the stream that computes waits for its copy.

        Raises:
            GareError: where the chunks end before the batches do.
        """
        if self._ended:
            raise StopIteration
        arrived = self._take()
        if arrived is None:
            self._ended = True
            raise StopIteration
        if self._is_gpu:
            self._wait_on_device(arrived)
        return arrived

    def seconds(self, arrived: Arrived) -> dict[str, float]:
        """Seconds that a batch took, to be asked for after its step, which has waited for the device.

        Returns:
            ``fetch``, ``jpeg`` and ``augment``, divided by the loaders that share the work, and with what a
            GPU augments; ``transfer``, of the way to the device; ``device_wait``, that the device stood still
            for it.
        """
        parts = {name: arrived.seconds.get(name, 0.0) / self._loaders for name in PARTS}
        transfer, finish = arrived.seconds["transfer"], arrived.seconds["finish"]
        parts["device_wait"] = 0.0
        if self._is_gpu:
            # Host and device work side by side: the slower of the two is what it takes.
            before, copied, finished = arrived.copied
            transfer = max(transfer, before.elapsed_time(copied) / 1000)
            finish = max(finish, copied.elapsed_time(finished) / 1000)
            parts["device_wait"] = arrived.waited[0].elapsed_time(arrived.waited[1]) / 1000
        parts["augment"] += finish
        parts["transfer"] = transfer
        return parts

    def close(self) -> None:
        """Ends the thread and what loads."""
        self._over.set()
        self._ended = True
        if self._thread is not None:
            self._thread.join(_CLOSE_S)
            if self._thread.is_alive():
                logger.warning("a batch that is no longer wanted still loads, after %g s", _CLOSE_S)
                return
        self._close_chunks()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _take(self) -> Arrived | None:
        if self._thread is None:
            return next(self._made, None)
        taken = self._queue.get()
        if isinstance(taken, BaseException):
            self._ended = True
            raise taken
        return taken

    def _wait_on_device(self, arrived: Arrived) -> None:
        computing = torch.cuda.current_stream(self._device)
        arrived.waited = _events(2)
        arrived.waited[0].record(computing)
        computing.wait_event(arrived.copied[-1])
        arrived.waited[1].record(computing)
        for tensor in arrived.tensors.values():
            if tensor.device.type == "cuda":
                tensor.record_stream(computing)  # or its memory would be given to the next copy too early

    def _run(self) -> None:
        try:
            if self._is_gpu:
                torch.cuda.set_device(self._device)
            for arrived in self._made:
                if not self._put(arrived):
                    return
            self._put(None)
        except torch.OutOfMemoryError as error:
            self._put(_no_room(error, self._sizes))
        except BaseException as error:  # to be raised where the batch is asked for
            self._put(error)

    def _put(self, item: Arrived | BaseException | None) -> bool:
        while not self._over.is_set():
            try:
                self._queue.put(item, timeout=_LOOK_EVERY_S)
            except queue.Full:
                continue
            return True
        return False

    def _make(self) -> Iterator[Arrived]:
        """Batches in order, each put together from its chunks and brought to the device."""
        for place, size in enumerate(self._sizes):
            parts = self._rows_of(size, place)
            if parts is None:
                return
            yield self._bring(parts, place)

    def _bring(self, parts: list[Mapping[str, np.ndarray]], place: int) -> Arrived:
        """Puts a batch together, whose chunks it takes out of the list, and brings it to the device."""
        seconds = dict(zip(PARTS, sum(part["seconds"].sum(axis=0) for part in parts), strict=True))
        started = time.perf_counter()
        joined = _joined(parts, pin=self._is_gpu)
        parts.clear()  # all processes share their memory, which the next batch needs
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            marks = _events(3) if self._is_gpu else ()
            tensors = self._on_device(joined, marks)
            copied = time.perf_counter()
            tensors = self._finish(place, tensors)
            if marks:
                marks[2].record()
        seconds |= {"transfer": copied - started, "finish": time.perf_counter() - copied}
        return Arrived(tensors, seconds, marks)

    def _on_device(self, joined: Tensors, marks: tuple[Any, ...]) -> Tensors:
        if not marks:
            return joined
        marks[0].record()
        tensors = {
            name: tensor if name in ON_HOST else tensor.to(self._device, non_blocking=True)
            for name, tensor in joined.items()
        }
        marks[1].record()
        return tensors

    def _rows_of(self, size: int, place: int) -> list[Mapping[str, np.ndarray]] | None:
        """Chunks of a batch; None where nobody wants it any more."""
        parts: list[Mapping[str, np.ndarray]] = []
        rows = 0
        while rows < size:
            part = next(self._chunks, None)
            if part is None:
                raise GareError(f"ended before batch {place + 1} of {len(self._sizes)}", where="loader")
            if self._over.is_set():
                return None
            parts.append(part)
            rows += len(part["frame_mask"])
        if rows > size:
            raise GareError(f"{rows} clips arrived for {size}", where="loader")
        return parts

    def _close_chunks(self) -> None:
        close = getattr(self._chunks, "close", None)
        if close is not None:
            close()


def _no_room(error: Exception, sizes: Sequence[int]) -> GareError:
    return GareError(
        f"the GPU's memory does not suffice for the batches of {max(sizes)} pairs that wait on it: "
        f"{str(error).splitlines()[0]}",
        where="train.batch_size",
        accepted="fewer pairs, or more training workers to share them (cluster.train_workers)",
    )


def _events(count: int) -> tuple[Any, ...]:
    """Marks on a stream whose distance in time can be asked for."""
    return tuple(torch.cuda.Event(enable_timing=True) for _ in range(count))  # type: ignore[no-untyped-call]


def _empty(shape: Sequence[int], dtype: np.dtype[Any], *, pin: bool) -> Tensor:
    if not pin:
        # NumPy's memory comes in huge pages, which are there sooner than small ones.
        return torch.from_numpy(np.empty(shape, dtype))
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.empty(list(shape), dtype=kind, pin_memory=True)


def _joined(parts: Sequence[Mapping[str, np.ndarray]], *, pin: bool) -> Tensors:
    """Arrays of all parts one after another, in memory of their own: what loaders share cannot be written to.

    Where parts differ in other dimensions than the first, such as captions of a clip, zeros fill them up.
    """
    joined: Tensors = {}
    for name in parts[0]:
        if name == "seconds":
            continue
        arrays = [part[name] for part in parts]
        inner = [max(sizes) for sizes in zip(*(array.shape[1:] for array in arrays), strict=True)]
        is_uneven = any(list(array.shape[1:]) != inner for array in arrays)
        whole = _empty([sum(map(len, arrays)), *inner], arrays[0].dtype, pin=pin)
        if is_uneven:
            whole.zero_()
        first = 0
        for array in arrays:
            # By numpy, which lets go of Python's lock and takes what is read-only.
            target = whole.numpy()[first : first + len(array)]
            np.copyto(target[(slice(None), *map(slice, array.shape[1:]))], array)
            first += len(array)
        joined[name] = whole
    return joined
