"""Retries for a storage that does not answer, and tests for faults that waiting cannot cure."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from gare.errors import DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds for which a storage that fails is tried again.
PATIENCE_S = 600.0
#: The pause before the second try, in seconds; each further one is twice as long.
FIRST_PAUSE_S = 1.0
#: The longest pause between two tries.
MAX_PAUSE_S = 20.0
#: Errors that do not pass by themselves: a full disk, a quota, a folder that may not be written.
LASTING = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
)
#: Errors that a file's content cannot cause: a machine without space or handles, a lost mount. EIO and ENOMEM
#: are not among them: FFmpeg reports them for damaged files, too.
_OF_THE_MACHINE = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN)
)


def retry_until_answered(action: Callable[[], T], fault: str, patience_s: float = PATIENCE_S) -> T:
    """Repeats an action until the storage answers, a fault is lasting, or ``patience_s`` is over.

    Args:
        action: what to do.
        fault: what could not be done, for the warning.
        patience_s: seconds to try.

    Raises:
        DataError: of the last try.
    """
    deadline, pause, tries = time.monotonic() + patience_s, FIRST_PAUSE_S, 1
    while True:
        try:
            done = action()
        except DataError as error:
            if is_lasting(error) or time.monotonic() + pause > deadline:
                raise
            if tries == 1:
                logger.warning("%s; retrying for %.0f s: %s", fault, patience_s, error)
            threading.Event().wait(pause)
            pause, tries = min(2 * pause, MAX_PAUSE_S), tries + 1
        else:
            if tries > 1:
                logger.warning("the storage answers again, at try %d", tries)
            return done


def is_lasting(error: BaseException) -> bool:
    """Returns True if waiting cannot cure a fault: it is in the content, or lasting such as a full disk."""
    return not has_os_error(error) or _has_errno(error, LASTING)


def is_machine_fault(error: BaseException) -> bool:
    """True if a fault of reading a file comes from the machine or its mounts, whatever the file holds."""
    return _has_errno(error, _OF_THE_MACHINE)


def has_os_error(error: BaseException) -> bool:
    """True if an OSError is among the causes of an error, as when a storage does not answer."""
    return any(isinstance(one, OSError) for one in _causes(error))


def _has_errno(error: BaseException, numbers: frozenset[int]) -> bool:
    return any(isinstance(one, OSError) and one.errno in numbers for one in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
