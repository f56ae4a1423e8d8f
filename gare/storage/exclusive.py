"""Files that come into being once, and files that only the holder of a lock replaces.

Locally the former is a hard link, which is never put over another file; on S3 both are conditional writes.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from pyarrow import fs as pafs

from gare.errors import DataError, shown
from gare.storage.conditional import create_object, etag_of, replace_object
from gare.storage.files import delete_file, exists, join, open_fs, write_atomically

#: Answers of a file system without hard links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
#: A write whose answer was lost looks like another job's, once.
_TRIES = 3


def create_file(folder: str, name: str, data: bytes) -> bool:
    """Writes a file that appears whole, unless there is one of this name.

    Where neither hard links nor conditional requests are to be had, two jobs that create it at the same
    moment may both succeed, and the later one's content stays.

    Args:
        folder: local path or URI.
        name: of the file in it.
        data: its content.

    Returns:
        False where the file was there already; it is then as it was.

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
    # A name that nobody lists; what a kill leaves is removed with other temporary files.
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
    """Replaces a file by whom ``check`` lets through, even where it sleeps between its check and the write.

    Without conditional requests one that sleeps just there still writes.

    Args:
        uri: the file.
        data: its new content.
        check: makes sure that the caller may write; raises otherwise.

    Raises:
        DataError: if it cannot be written, or others write it all the time.
    """
    for _ in range(_TRIES):
        etag = etag_of(uri)
        check()
        done = replace_object(uri, data, etag) if etag else create_object(uri, data)
        if done is None:
            write_atomically(uri, data)
        if done is not False:
            return
    raise DataError("is written by others at the same time", where=shown(uri))


def renew_object(uri: str, data: bytes) -> bool:
    """Writes an object anew that nobody else writes; False where it was deleted, which stays so.

    Where conditional requests are not to be had, one that is deleted at the same moment may come back.

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
