"""Files that come into being once: of several jobs that create the same one, one succeeds.

Locally that is a hard link, which is never put over another file.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from pyarrow import fs as pafs

from gare.data.files import delete_file, exists, join, open_fs, write_atomically


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
        write_atomically(location, data)
        return True
    # A name that nobody lists; what a kill leaves is removed with other temporary files.
    whole = join(folder, f".gare-{uuid.uuid4().hex}.tmp")
    try:
        write_atomically(whole, data)
        os.link(open_fs(whole)[1], path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if Path(path).exists():
            return False
        write_atomically(location, data)
    finally:
        delete_file(whole)
    return True
