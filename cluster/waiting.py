"""Saying that a training waits for nodes, which Ray keeps to itself."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.resources import nodes, num_that_fit
from gare.config import ClusterConfig

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 30.0


@contextmanager
def tells_of_lost_nodes(config: ClusterConfig, every_s: float = LOOK_EVERY_S) -> Iterator[None]:
    """While it lasts, warns where the nodes that are left cannot hold the workers that training needs.

    Args:
        config: settled.
        every_s: seconds between looks.
    """
    ended = threading.Event()
    fewest = config.min_workers or config.train_workers

    def look() -> None:
        while not ended.wait(every_s):
            try:
                there = nodes()
            except Exception:  # of Ray, whose head may be gone, which the training itself says
                continue
            held = num_that_fit(config, there)
            if held < fewest:
                logger.warning(
                    "training waits for nodes: the %d that are left hold %d of the %d workers that it needs",
                    len(there),
                    held,
                    fewest,
                )

    thread = threading.Thread(target=look, name="lost nodes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(5)
