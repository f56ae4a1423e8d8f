"""The progress line of a job that works through videos."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

EVERY_S = 5.0
#: Number of videos of a run that are reported as the slowest, with their seconds.
SLOWEST = 10


class Progress:
    """Sums the results of parts and logs them every few seconds: done, failed, left, rates, time left.

    Args:
        total: number of videos to process.
        verb: past participle of the work, such as ``extracted``.
    """

    def __init__(self, total: int, verb: str) -> None:
        self.total = total
        self.verb = verb
        self.counts: Counter[str] = Counter()
        self.stages: Counter[str] = Counter()
        self.slowest: list[tuple[str, float]] = []
        self.started = self.shown = time.monotonic()
        self._started_at = time.time()
        self._began_at = math.inf

    @property
    def seconds(self) -> float:
        """Seconds since the first part began."""
        return max(time.monotonic() - self.started, 1e-3)

    def add(self, done: Mapping[str, Any]) -> None:
        """Adds a part's result, as ``gare.extract.frame_writer.Extractor.write`` describes it."""
        self.counts.update({name: done.get(name, 0) for name in ("written", "failed", "frames", "bytes")})
        self._began_at = min(self._began_at, done.get("began", math.inf))
        self.stages.update(done.get("seconds", {}))
        took = [(str(name), float(seconds)) for name, seconds in done.get("slowest", ())]
        self.slowest = sorted([*self.slowest, *took], key=lambda one: -one[1])[:SLOWEST]
        if time.monotonic() - self.shown > EVERY_S:
            self.show()

    def rates(self) -> dict[str, float]:
        """Returns videos, frames and MB read per second."""
        finished = self.counts["written"] + self.counts["failed"]
        return {
            "videos_per_s": finished / self.seconds,
            "frames_per_s": self.counts["frames"] / self.seconds,
            "mb_read_per_s": self.counts["bytes"] / 1e6 / self.seconds,
        }

    def report(self) -> dict[str, Any]:
        """Returns rates, GB read, seconds of the workers by stage and in total, and the slowest videos."""
        return {
            **{name: round(rate, 3) for name, rate in self.rates().items()},
            "gb_read": round(self.counts["bytes"] / 1e9, 6),
            "frames": self.counts["frames"],
            "stage_seconds": {name: round(seconds, 3) for name, seconds in self.stages.items()},
            "timing": {
                "pool_s": round(self.seconds, 3),
                # From another machine's clock, so not fully reliable.
                "actors_start_s": round(max(0.0, min(self._began_at - self._started_at, self.seconds)), 3),
            },
            "slowest": {name: round(seconds, 3) for name, seconds in self.slowest},
        }

    def show(self) -> None:
        """Logs the line."""
        self.shown = time.monotonic()
        rates = self.rates()
        left = self.total - self.counts["written"] - self.counts["failed"]
        logger.info(
            "%s %d, failed %d, left %d; %.1f videos/s, %.0f frames/s, %.2f GB read, %s left",
            self.verb,
            self.counts["written"],
            self.counts["failed"],
            left,
            rates["videos_per_s"],
            rates["frames_per_s"],
            self.counts["bytes"] / 1e9,
            duration(left / max(rates["videos_per_s"], 1e-9)) if rates["videos_per_s"] or not left else "?",
        )


def duration(seconds: float) -> str:
    """Formats seconds for a reader: 12 s, 3:05 min, 2:03:05 h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}:{minutes:02}:{rest:02} h"
        if hours
        else f"{minutes}:{rest:02} min"
        if minutes
        else f"{rest} s"
    )
