"""Giving free memory back to the system, which the C library otherwise keeps in pieces."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return None
    return found


def give_back_free_memory() -> None:
    """Returns the free parts of the C library's heap to the system, those between used ones too.

    Many large temporary tensors between small ones that stay leave holes that the next ones do not fit into:
    a step of 4,096 pairs, which needs some 2 GB, held 6 GB, and now and then more than 24 GB. Costs less than
    a millisecond for each hundred megabytes that are returned.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
