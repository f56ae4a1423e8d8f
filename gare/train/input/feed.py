"""Transfer of loaded arrays to the device: of the next batch while a step computes.

Without a GPU a batch is put together on request. With a GPU, a separate thread puts it into pinned memory,
copies and finishes it on a separate stream, so that it is on the device when the step needs it.
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
#: Finishes a batch on the device. Arguments: its place among the feed's batches, its tensors.
Finish: TypeAlias = Callable[[int, Tensors], Tensors]

#: Finished batches that wait on the device, besides the one in use and the one being made.
WAITING = 1
#: Seconds between the copying thread's checks that its batches are still wanted.
_LOOK_EVERY_S = 0.2
#: Seconds that closing waits for the thread, which may itself wait for a storage that does not answer.
_CLOSE_S = 30.0


@dataclass
class DeviceBatch:
    """A batch on the device.

    Attributes:
        tensors: by name.
        seconds: loading time by part, of all loaders together; and this process's ``transfer`` and
            ``finish``.
        copied: events around the copy and after the finish, on a GPU.
        waited: events around the wait for it on the stream that computes, on a GPU.
    """

    tensors: Tensors
    seconds: dict[str, float]
    copied: tuple[Any, ...] = ()
    waited: tuple[Any, ...] = field(default=())


class Feed:
    """Iterator over batches on the device, in the order of the loaders' chunks.

    Args:
        chunks: arrays of consecutive rows, in order; no chunk has rows of two batches.
        sizes: number of rows of each coming batch.
        device: to transfer to.
        finish: applied to each batch on the device; does nothing by default.
        loaders: number of processes that load the chunks in parallel.
        ahead: whether to transfer the next batch in a separate thread; by default on a GPU.

    Attributes:
        closing: set once ``close`` has been called: no further batch is wanted.
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
        self.closing = threading.Event()
        self._queue: queue.Queue[DeviceBatch | BaseException | None] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None
        self._ended = False
        if self._is_gpu if ahead is None else ahead:
            self._thread = threading.Thread(target=self._run, name="batches to the device", daemon=True)
            self._thread.start()

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> DeviceBatch:
        """Returns the next batch; the computing stream waits for its copy.

        Raises:
            GareError: if the chunks end before the batches do.
        """
        if self._ended:
            raise StopIteration
        batch = self._take()
        if batch is None:
            self._ended = True
            raise StopIteration
        if self._is_gpu:
            self._wait_on_device(batch)
        return batch

    def seconds(self, batch: DeviceBatch) -> dict[str, float]:
        """Returns the seconds that a batch took; to call after its step, which has waited for the device.

        Returns:
            ``fetch``, ``jpeg`` and ``augment``, divided by the loaders that share the work, and including
            augmentation on a GPU; ``transfer`` to the device; ``device_wait``, the time that the device
            waited for the batch.
        """
        parts = {name: batch.seconds.get(name, 0.0) / self._loaders for name in PARTS}
        transfer, finish = batch.seconds["transfer"], batch.seconds["finish"]
        parts["device_wait"] = 0.0
        if self._is_gpu:
            # Host and device work in parallel: the slower of the two decides.
            before, copied, finished = batch.copied
            transfer = max(transfer, before.elapsed_time(copied) / 1000)
            finish = max(finish, copied.elapsed_time(finished) / 1000)
            parts["device_wait"] = batch.waited[0].elapsed_time(batch.waited[1]) / 1000
        parts["augment"] += finish
        parts["transfer"] = transfer
        return parts

    def close(self) -> None:
        """Ends the thread and the loaders."""
        self.closing.set()
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

    def _take(self) -> DeviceBatch | None:
        if self._thread is None:
            return next(self._made, None)
        taken = self._queue.get()
        if isinstance(taken, BaseException):
            self._ended = True
            raise taken
        return taken

    def _wait_on_device(self, batch: DeviceBatch) -> None:
        computing = torch.cuda.current_stream(self._device)
        batch.waited = _events(2)
        batch.waited[0].record(computing)
        computing.wait_event(batch.copied[-1])
        batch.waited[1].record(computing)
        for tensor in batch.tensors.values():
            if tensor.device.type == "cuda":
                tensor.record_stream(computing)  # or the next copy would get its memory too early

    def _run(self) -> None:
        try:
            if self._is_gpu:
                torch.cuda.set_device(self._device)
            for batch in self._made:
                if not self._put(batch):
                    return
            self._put(None)
        except torch.OutOfMemoryError as error:
            self._put(_no_room(error, self._sizes))
        except BaseException as error:  # raised when the batch is requested
            self._put(error)

    def _put(self, item: DeviceBatch | BaseException | None) -> bool:
        while not self.closing.is_set():
            try:
                self._queue.put(item, timeout=_LOOK_EVERY_S)
            except queue.Full:
                continue
            return True
        return False

    def _make(self) -> Iterator[DeviceBatch]:
        """Yields batches in order, each put together from its chunks and brought to the device."""
        for place, size in enumerate(self._sizes):
            parts = self._rows_of(size, place)
            if parts is None:
                return
            yield self._bring(parts, place)

    def _bring(self, parts: list[Mapping[str, np.ndarray]], place: int) -> DeviceBatch:
        """Puts a batch together, removing its chunks from the list, and brings it to the device."""
        seconds = dict(zip(PARTS, sum(part["seconds"].sum(axis=0) for part in parts), strict=True))
        started = time.perf_counter()
        joined = _joined(parts, pin=self._is_gpu)
        parts.clear()  # they are in shared memory, which the next batch needs
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            marks = _events(3) if self._is_gpu else ()
            tensors = self._on_device(joined, marks)
            copied = time.perf_counter()
            tensors = self._finish(place, tensors)
            if marks:
                marks[2].record()
        seconds |= {"transfer": copied - started, "finish": time.perf_counter() - copied}
        return DeviceBatch(tensors, seconds, marks)

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
        """Returns the chunks of a batch; None if it is no longer wanted."""
        parts: list[Mapping[str, np.ndarray]] = []
        rows = 0
        while rows < size:
            part = next(self._chunks, None)
            if part is None:
                raise GareError(f"ended before batch {place + 1} of {len(self._sizes)}", where="loader")
            if self.closing.is_set():
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
    """Creates CUDA events that record times."""
    return tuple(torch.cuda.Event(enable_timing=True) for _ in range(count))  # type: ignore[no-untyped-call]


def _empty(shape: Sequence[int], dtype: np.dtype[Any], *, pin: bool) -> Tensor:
    if not pin:
        # NumPy allocates in huge pages, which is faster than in small ones.
        return torch.from_numpy(np.empty(shape, dtype))
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.empty(list(shape), dtype=kind, pin_memory=True)


def _joined(parts: Sequence[Mapping[str, np.ndarray]], *, pin: bool) -> Tensors:
    """Concatenates the arrays of all parts into new memory, since the loaders' shared memory is read-only.

    If parts differ in other dimensions than the first, such as captions of a clip, they are padded with
    zeros.
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
            # By numpy, which releases the GIL and accepts read-only arrays.
            target = whole.numpy()[first : first + len(array)]
            np.copyto(target[(slice(None), *map(slice, array.shape[1:]))], array)
            first += len(array)
        joined[name] = whole
    return joined
