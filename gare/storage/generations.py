"""Generations of a store's writers: the highest number owns the store, late writes of others are void.

Each job that gets the lock of a store begins a generation: a file ``generations/00000007.json`` that nobody
else has, with a number above all before it. The job with the highest number is the owner, whatever claims
say. Parts carry the number of their generation in their name.

A job that has lost the store may still be writing: it was suspended, or workers of a dead driver live on. Its
successor's file lists the parts that were there when the successor began, the *fence*; parts that come later
never count. See docs/design/store-writers.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace

from gare.errors import DataError, LockLostError
from gare.storage.exclusive import create_file
from gare.storage.files import delete_file, join, list_files, read_json, write_json

FOLDER = "generations"
#: Folders of a store that hold parts.
PART_FOLDERS = ("data", "failures")
_PART = re.compile(r"/(part-(\d{8})-[0-9a-f]+\.parquet)(?:\?|$)")
_FILE = re.compile(r"/(\d{8})\.json(?:\?|$)")


@dataclass(frozen=True)
class Generation:
    """The content of a generation's file.

    Attributes:
        number: from 1; 0 if no job that uses generations has written here.
        job: name of the claim of the job that began it.
        released: True if its job completed, so that no worker of it can still write.
        fences: number of an earlier generation that was not released → its parts that count, as
            ``data/part-….parquet``.
    """

    number: int = 0
    job: str = ""
    released: bool = False
    fences: Mapping[str, Iterable[str]] = field(default_factory=dict)

    def parts_that_count(self, folder: str, locations: Iterable[str]) -> list[str]:
        """Returns the parts that count: not those that a job wrote after another took its place."""
        fences = {int(number): set(names) for number, names in self.fences.items()}
        return [one for one in locations if not fences or _counts(folder, one, fences)]


def _nothing() -> None:
    """Checks no lock."""


@dataclass(frozen=True)
class HeldStore:
    """A store that is held by the lock, or by a caller that guarantees this itself.

    Attributes:
        generation: number of the holder.
        raise_if_lost: raises a GareError if the holder has lost the store.
    """

    generation: int = 0
    raise_if_lost: Callable[[], None] = _nothing


@dataclass(frozen=True)
class OwnedFolder:
    """A folder that a job has locked, as the job's workers on other machines see it.

    Attributes:
        uri: the folder.
        generation: number of the job.
    """

    uri: str
    generation: int

    def is_lost(self) -> bool:
        """Returns True if another job has begun a newer generation.

        Raises:
            DataError: if that cannot be found out.
        """
        return newest_number(self.uri) > self.generation

    def lost_error(self) -> LockLostError:
        """Returns the error that ends the work of a job that has lost the lock."""
        return LockLostError(
            "the lock was lost: another job has taken it over",
            where=self.uri,
            accepted="check that job; once it has ended, the same command continues where this one stopped",
        )


def part_name(generation: int, digest: str) -> str:
    """Returns the name of a part's file; without a generation, as earlier versions wrote it."""
    return f"part-{generation:08d}-{digest}.parquet" if generation else f"part-{digest}.parquet"


def generation_of(location: str) -> int:
    """Returns the generation that wrote a part; 0 for a part of an earlier version."""
    found = _PART.search(location)
    return int(found[2]) if found else 0


def newest_number(uri: str) -> int:
    """Returns the number of the newest generation, by one listing; 0 if the store has none.

    Raises:
        DataError: if the folder cannot be listed.
    """
    return max(map(_number, list_files(join(uri, FOLDER), ".json")), default=0)


def newest_generation(uri: str) -> Generation:
    """Reads the newest generation of a store.

    Raises:
        DataError: if it cannot be read.
    """
    for attempt in range(3):
        number = newest_number(uri)
        if not number:
            break
        try:
            return _read(_location(uri, number))
        except DataError:
            # Replaced by a newer one and deleted since it was listed.
            if attempt == 2 or newest_number(uri) == number:
                raise
    return Generation()


def begin_generation(uri: str, job: str, may: Callable[[], bool] = lambda: True) -> Generation | None:
    """Begins a generation for the job that has the lock, and fences late writes of predecessors.

    Args:
        uri: the store.
        job: name of its claim.
        may: returns True while the job's claim is there; called between reading the newest generation and
            creating the next. A successor deletes the claim before it begins its own generation, so that no
            job begins one above its successor's.

    Returns:
        the generation, or None if the claim is gone.

    Raises:
        DataError: if the store cannot be listed or written.
    """
    while True:
        before, parts = newest_generation(uri), _parts(uri)
        # Above the parts, too: without conditional writes a generation's file may be lost, see
        # docs/design/store-writers.md.
        number = max(before.number, *parts, 0) + 1
        ours = Generation(number, job, fences=_fences(before, parts))
        content = json.dumps(asdict(ours), indent=1).encode()
        if not may():
            return None
        if create_file(join(uri, FOLDER), _name(number), content):
            return ours


def release_generation(uri: str, ours: Generation) -> None:
    """Records that a generation's job completed, so that its successor need not fence it.

    Raises:
        DataError: if that cannot be written.
    """
    write_json(_location(uri, ours.number), asdict(replace(ours, released=True)))


def withdraw_generation(uri: str, ours: Generation) -> None:
    """Takes back a generation that was begun without the lock.

    Raises:
        DataError: if its file cannot be deleted.
    """
    delete_file(_location(uri, ours.number))


def forget_generations_before(uri: str, ours: Generation) -> None:
    """Deletes the files of earlier generations; the newest one holds all that matters of them.

    Raises:
        DataError: if one cannot be deleted.
    """
    for location in list_files(join(uri, FOLDER), ".json"):
        if 0 < _number(location) < ours.number:
            delete_file(location)


def _counts(folder: str, location: str, fences: Mapping[int, set[str]]) -> bool:
    found = _PART.search(location)
    fence = fences.get(int(found[2])) if found else None
    return found is None or fence is None or f"{folder}/{found[1]}" in fence


def _parts(uri: str) -> dict[int, set[str]]:
    """Returns the existing parts, as ``data/part-….parquet``, by the number of their generation."""
    found: dict[int, set[str]] = {}
    for folder in PART_FOLDERS:
        for location in list_files(join(uri, folder), ".parquet"):
            if match := _PART.search(location):
                found.setdefault(int(match[2]), set()).add(f"{folder}/{match[1]}")
    return found


def _fences(before: Generation, parts: Mapping[int, set[str]]) -> dict[str, list[str]]:
    earlier = {int(number): set(names) for number, names in before.fences.items()}
    fences = {number: parts.get(number, set()) & names for number, names in earlier.items()}
    # Generations without a file that records their completion.
    fences |= {number: names for number, names in parts.items() if number > before.number}
    if before.number and not before.released:
        fences[before.number] = parts.get(before.number, set())
    return {str(number): sorted(names) for number, names in sorted(fences.items())}


def _read(location: str) -> Generation:
    try:
        return Generation(**read_json(location))
    except TypeError as error:
        raise DataError(f"is not the file of a generation: {error}", where=location) from error


def _name(number: int) -> str:
    return f"{number:08d}.json"


def _location(uri: str, number: int) -> str:
    return join(uri, FOLDER, _name(number))


def _number(location: str) -> int:
    found = _FILE.search(location)
    return int(found[1]) if found else 0
