"""SHA-256 of the files of a checkpoint: written beside them, compared when they are read.

``SUMS`` lists every file of its folder and itself, so that a copied folder keeps its sums. A folder without
it was written by an earlier version. Names that begin with a dot belong to the file system.
"""

from __future__ import annotations

import hashlib
import json
import logging
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from gare.errors import CheckpointError, DamagedError, DataError, without_secrets
from gare.storage.files import delete_file, exists, join, list_files, read_bytes, write_atomically
from gare.storage.uris import is_uri

logger = logging.getLogger(__name__)

SUMS = "sums.json"
ACCEPTED = f"a copy of the folder as it was written; or, where a file was changed on purpose, no {SUMS}"

#: Folders without sums that this process has logged a note for: only the first one.
noted_folders: set[str] = set()


def sha256_of(content: bytes) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def write_sums(uri: str, sums: Mapping[str, str]) -> None:
    """Writes ``SUMS``.

    Args:
        uri: the folder.
        sums: SHA-256 by file name.

    Raises:
        DataError: where it cannot be written.
    """
    write_atomically(join(uri, SUMS), _serialised(sums))


def _serialised(sums: Mapping[str, str]) -> bytes:
    """Returns ``SUMS`` as bytes. There is only one way to write it, so that any changed bit is noticed."""
    own = sha256_of(json.dumps(sums, sort_keys=True).encode())
    return json.dumps({"sha256": sums, "own": own}, indent=2, sort_keys=True).encode() + b"\n"


class SummedFolder:
    """A folder of files that are compared with their SHA-256 when they are read.

    Args:
        uri: the folder; a missing one counts as one without sums.
        expected: SHA-256 by file name from elsewhere, such as the index of a run's checkpoints.

    Attributes:
        sums: SHA-256 by file name; None if the folder has none, and files are read unchecked.

    Raises:
        DamagedError: if ``SUMS`` was changed, differs from ``expected`` or is missing although expected, if a
            file that it lists is missing, and for a file that it does not list.
        DataError: if the storage does not answer.
    """

    def __init__(self, uri: str, *, expected: Mapping[str, str] | None = None) -> None:
        self.uri = uri
        self.sums: dict[str, str] | None = None
        location = join(uri, SUMS)
        # Read by name: a shared file system may list a folder as it was some seconds ago.
        content = _content_or_none(location)
        if content is None:
            if expected:
                raise DamagedError("is missing", where=location, accepted=ACCEPTED)
            return
        self.sums = _parsed(content, location)
        if expected and self.sums != dict(expected):
            raise DamagedError(
                "lists other SHA-256 than the index of the checkpoints", where=location, accepted=ACCEPTED
            )
        present = set(_names_in(uri))
        for name in sorted(self.sums.keys() - present):
            if not exists(join(uri, name)):
                raise DamagedError(
                    f"{SUMS} lists it, and it is missing", where=join(uri, name), accepted=ACCEPTED
                )
        for name in sorted(present - self.sums.keys() - {SUMS}):
            raise DamagedError(f"is not listed in {SUMS}", where=join(uri, name), accepted=ACCEPTED)

    @property
    def names(self) -> list[str]:
        """Returns the files of the folder except ``SUMS``."""
        return sorted(set(_names_in(self.uri)) - {SUMS} if self.sums is None else self.sums)

    def read(self, name: str) -> bytes:
        """Reads the content of a file and compares it with its SHA-256.

        Raises:
            CheckpointError: for a file that is missing.
            DamagedError: for a file whose content was changed.
            DataError: where the storage does not answer.
        """
        location = join(self.uri, name)
        content = _content(location)
        if self.sums is None:
            return content
        if name not in self.sums:
            raise DamagedError(f"is not listed in {SUMS}", where=location, accepted=ACCEPTED)
        listed, found = self.sums[name], sha256_of(content)
        if found != listed:
            # Read again: the error may lie in the transfer, for which a checkpoint is not given up.
            content = _content(location)
            found = sha256_of(content)
        if found != listed:
            raise DamagedError(
                f"is not as it was written: its SHA-256 is {found[:16]}…, {SUMS} lists {listed[:16]}…",
                where=location,
                accepted=ACCEPTED,
            )
        return content

    def check(self) -> None:
        """Reads every file that has a SHA-256.

        Raises:
            CheckpointError, DamagedError, DataError: as ``read``.
        """
        for name in self.sums or ():
            self.read(name)

    def copy(
        self,
        target: str,
        *,
        last: str,
        change: Callable[[bytes], bytes] | None = None,
        leave_out: Sequence[str] = (),
    ) -> None:
        """Copies the files, checking each when it is read, with new sums.

        Args:
            target: folder; its content is deleted first.
            last: the file that is written last, so that a folder with this file is complete.
            change: changes the content of the last file.
            leave_out: names of files not to copy.

        Raises:
            CheckpointError, DamagedError, DataError: as ``read``, or where a file cannot be written.
        """
        # Its last file is deleted first, and its sums stay until there are new ones: if killed in between, it
        # is a folder that lacks a file, not one of an earlier version.
        for name in sorted(set(_names_in(target)) - {SUMS}, key=lambda name: name != last):
            delete_file(join(target, name))
        sums = {}
        for name in self.names:
            if name not in (*leave_out, last):
                content = self.read(name)
                sums[name] = sha256_of(content) if self.sums is None else self.sums[name]
                write_atomically(join(target, name), content)
        content = self.read(last)
        content = change(content) if change else content
        write_sums(target, sums | {last: sha256_of(content)})
        write_atomically(join(target, last), content)


def add_file(uri: str, name: str, content: bytes) -> None:
    """Writes a file into a folder and adds its sum if the folder has sums; nobody may read there meanwhile.

    Raises:
        DamagedError: for a folder that is damaged.
        DataError: where it cannot be written.
    """
    sums = SummedFolder(uri).sums
    write_atomically(join(uri, name), content)
    if sums is not None:
        write_sums(uri, sums | {name: sha256_of(content)})


def note_without_sums(folder: SummedFolder) -> None:
    """Logs once in this process that folders of an earlier version cannot be checked."""
    if folder.sums is None and not noted_folders:
        noted_folders.add(folder.uri)
        logger.warning(
            "%s has no %s, as an earlier version wrote it: a changed bit in its files would not be seen",
            without_secrets(folder.uri),
            SUMS,
        )


def _parsed(content: bytes, location: str) -> dict[str, str]:
    with suppress(KeyError, TypeError, ValueError):
        sums: dict[str, str] = json.loads(content)["sha256"]
        if content == _serialised(sums):
            return sums
    raise DamagedError("is not as it was written", where=location, accepted=ACCEPTED)


def _names_in(uri: str) -> list[str]:
    files = list_files(uri)
    if is_uri(uri):
        files = [urllib.parse.unquote(file.partition("?")[0]) for file in files]
    names = [file.rsplit("/", 1)[-1] for file in files]
    return [name for name in names if not name.startswith(".")]


def _content(location: str) -> bytes:
    """Reads a file; a missing one is a fault of the checkpoint, not of the storage."""
    try:
        return read_bytes(location)
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise CheckpointError(f"cannot be read: {error}", where=location) from error
        raise


def _content_or_none(location: str) -> bytes | None:
    try:
        return read_bytes(location)
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return None
        raise
