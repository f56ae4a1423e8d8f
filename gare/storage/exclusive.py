"""Files that are created once, and files that only the holder of a lock replaces.

Locally, creation is a hard link, which never replaces a file; on S3 both are conditional writes.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from pyarrow import fs as pafs

from gare.errors import DataError, without_secrets
from gare.storage.conditional import create_object, etag_of, replace_object
from gare.storage.files import delete_file, exists, join, open_fs, write_atomically

#: Error numbers of a file system without hard links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
#: Tries of a write: if its answer was lost, it looks once like another job's.
_TRIES = 3


def create_file(folder: str, name: str, data: bytes) -> bool:
    """Creates a file that appears whole, unless one of this name exists.

    Without hard links and conditional requests, two jobs that create it at the same moment may both succeed,
    and the later one's content stays.

    Args:
        folder: local path or URI.
        name: of the file in it.
        data: its content.

    Returns:
        False if the file existed already; it is then unchanged.

    Raises:
        DataError: if it cannot be written.
    """
    location = join(folder, name)
    if exists(location):
        return False
    filesystem, path = open_fs(location)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        created = create_object(location, data)
        if created is None:
            write_atomically(location, data)
        return created is not False
    # A name that no listing shows; if the job is killed, it is removed with other temporary files.
    whole = join(folder, f".gare-{uuid.uuid4().hex}.tmp")
    try:
        write_atomically(whole, data)
        os.link(open_fs(whole)[1], path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise DataError(f"cannot be written: {error.strerror}", where=location) from error
        if Path(path).exists():
            return False
        write_atomically(location, data)
    finally:
        delete_file(whole)
    return True


def replace_file(uri: str, data: bytes, check: Callable[[], None]) -> None:
    """Replaces a file if ``check`` passes, safely even if the job is suspended between check and write.

    Without conditional requests, a job that is suspended just there still writes.

    Args:
        uri: the file.
        data: its new content.
        check: raises if the caller may not write.

    Raises:
        DataError: if it cannot be written, or others keep writing it.
    """
    for _ in range(_TRIES):
        etag = etag_of(uri)
        check()
        done = replace_object(uri, data, etag) if etag else create_object(uri, data)
        if done is None:
            write_atomically(uri, data)
        if done is not False:
            return
    raise DataError("is written by others at the same time", where=without_secrets(uri))


def renew_object(uri: str, data: bytes) -> bool:
    """Rewrites an object that only the caller writes; returns False, and leaves it so, if it was deleted.

    Without conditional requests, an object that is deleted at the same moment may come back.

    Raises:
        DataError: if it cannot be written.
    """
    for _ in range(_TRIES):
        if not exists(uri):
            return False
        etag = etag_of(uri)
        done = replace_object(uri, data, etag) if etag else None
        if done is None and exists(uri):
            write_atomically(uri, data)
        if done is not False:
            return True
    return False
