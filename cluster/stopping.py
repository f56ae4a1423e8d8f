"""A driver that is told to end: ``ray job stop``, a scheduler's preemption, a pod that is evicted."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from gare.errors import StoppedError

logger = logging.getLogger(__name__)

#: Seconds that workers get to write a checkpoint before the driver ends all the same; Kubernetes waits 30.
GRACE_S = 25.0


@contextmanager
def on_sigterm(ask: Callable[[], None], *, grace_s: float = GRACE_S) -> Iterator[None]:
    """Asks the workers to stop at the first SIGTERM; ends at a second one, or after the grace.

    Outside the main thread, which alone gets signals, nothing changes.

    Args:
        ask: tells the workers; they then end what is inside by themselves.
        grace_s: seconds that they have.

    Raises:
        StoppedError: where they did not.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    late = threading.Timer(grace_s, os.kill, (os.getpid(), signal.SIGTERM))
    late.daemon = True

    def handle(number: int, frame: FrameType | None) -> None:
        if late.ident is not None:
            raise StoppedError(
                "stopped by SIGTERM before the workers had written a checkpoint",
                accepted="the same command continues from the last one",
            )
        late.start()
        logger.warning("SIGTERM: the workers write a checkpoint and end, in at most %.0f s", grace_s)
        try:
            ask()
        except Exception as error:
            logger.warning("the workers cannot be told: %s", error)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        late.cancel()
        signal.signal(signal.SIGTERM, before)
