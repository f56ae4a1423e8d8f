"""Peak memory of a command and all its child processes."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType
from typing import Self

SAMPLE_EVERY_S = 2.0


class PeakMemory:
    """Samples the memory of the process tree while open; a local Ray is part of the tree.

    Shared pages count once (proportional set size) if the system reports it.

    Attributes:
        peak_bytes: the largest sum sampled.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, _tree_bytes())
            if self._done.wait(SAMPLE_EVERY_S):
                return


def _tree_bytes() -> int:
    import psutil

    process = psutil.Process()
    total = 0
    for each in [process, *process.children(recursive=True)]:
        # Processes come and go between the listing and the reading.
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            memory = each.memory_full_info()
            total += getattr(memory, "pss", 0) or memory.rss
    return total
