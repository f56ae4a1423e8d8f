"""Retries after transient errors: which errors are transient, how long to wait, when to give up.

A fetch that is given up after its retries raises a passing error, and so does a refusal: the next run tries
the video again. Errors about the video itself or about what is allowed are final: 404 and 410, a scheme, an
address, a size.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

from gare.config import SourcesConfig
from gare.errors import FetchError

_LONGEST_PAUSE_S = 30.0
#: HTTP statuses that call for a retry, besides those of 500 and above.
_TRANSIENT_STATUS = frozenset({408, 425, 429})
#: Statuses of 500 and above for which no retry will help.
_FINAL_STATUS = frozenset({501, 505})
#: Statuses that an immediate retry does not change, but a later run may: expired signatures (S3 answers 400
#: to an expired token) are renewed, rights are granted. The video does not change then, so that nothing
#: else would call for a new try.
_REFUSED_STATUS = frozenset({400, 401, 403, 407, 409, 412})

T = TypeVar("T")


class TransientError(Exception):
    """An error that may be gone at the next try.

    Attributes:
        reason: what happened, in one line and without the URI.
        pause_s: seconds that the server asks to wait; 0 if it asks for none.
        anew: True if what has come so far is worthless.
    """

    def __init__(self, reason: str, *, pause_s: float = 0.0, anew: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.pause_s = pause_s
        self.anew = anew


def is_transient(status: int) -> bool:
    """Returns True if an HTTP status asks for a new try: 408, 425, 429 and 5xx do, 403 and 404 do not."""
    return status in _TRANSIENT_STATUS or (status >= 500 and status not in _FINAL_STATUS)


def is_refused(status: int) -> bool:
    """Returns True if an HTTP status refuses the client or its request, such as 401 and 403."""
    return status in _REFUSED_STATUS


class RetryPolicy:
    """The tries of one fetch, within its time limit.

    Args:
        sources: settings of tries, pauses and time.
        where: the fetched URI in the form that may be shown.
    """

    def __init__(self, sources: SourcesConfig, where: str) -> None:
        self._sources = sources
        self._where = where
        self._until = time.monotonic() + sources.deadline_s
        self._failed = 0
        self._random = random.Random()

    def timeout_s(self) -> float:
        """Returns the seconds that the next answer or byte may take.

        Raises:
            FetchError: if no time is left.
        """
        left_s = self._until - time.monotonic()
        if left_s <= 0:
            raise self._too_late("")
        return min(self._sources.timeout_s, left_s)

    def wait(self, fault: TransientError, *, progressed: bool = False) -> None:
        """Pauses before the next try.

        Args:
            fault: error that ended the last try.
            progressed: True if that try brought data, so that counting starts again.

        Raises:
            FetchError: after too many tries, or if no time is left.
        """
        self._failed = 1 if progressed else self._failed + 1
        if self._failed > self._sources.retries:
            tries = f"{self._failed} tries" if self._failed > 1 else "1 try"
            raise FetchError(
                f"{fault.reason}, after {tries}",
                where=self._where,
                accepted="a server that answers, or larger sources.retries",
            ).as_transient() from fault
        most_s = min(self._sources.backoff_s * 2 ** min(self._failed - 1, 30), _LONGEST_PAUSE_S)
        # Random, so that workers that were disconnected together do not come back together.
        pause_s = max(fault.pause_s, self._random.uniform(0, most_s))
        if time.monotonic() + pause_s >= self._until:
            raise self._too_late(f"; last: {fault.reason}") from fault
        time.sleep(pause_s)

    def call(self, function: Callable[[float], T]) -> T:
        """Calls the function until no transient error ends it; its argument is ``timeout_s``.

        Raises:
            FetchError: from the function, or as in ``wait``.
        """
        while True:
            try:
                return function(self.timeout_s())
            except TransientError as fault:
                self.wait(fault)

    def _too_late(self, last: str) -> FetchError:
        return FetchError(
            f"was not fetched within its deadline of {self._sources.deadline_s:g} s{last}",
            where=self._where,
            accepted="a larger sources.deadline_s",
        ).as_transient()


def disk_error(error: OSError) -> TransientError:
    """Returns a transient error for an error of the disk of temporary files, which is not the video's fault.

    Others may free space or close their files; another node may have a disk that works.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TransientError("there is no room on the disk for temporary files (TMPDIR)")
    reason = error.strerror or type(error).__name__
    return TransientError(f"the disk for temporary files (TMPDIR) fails: {reason}")
