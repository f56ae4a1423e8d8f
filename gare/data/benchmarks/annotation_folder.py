"""The folder of a benchmark's annotation files: finds the files by role, and reads them."""

from __future__ import annotations

import hashlib
import re
import urllib.parse
from collections.abc import Sequence

from pyarrow import fs as pafs

from gare.data.benchmarks.formats.annotations import Annotation, read_annotations
from gare.errors import DataError, without_secrets
from gare.storage.files import list_files, open_fs, read_bytes
from gare.storage.uris import is_uri

#: Files that may hold all splits together.
_ALL_SPLITS = (
    r"splits?[._-]|[._-]splits?\.",
    r"train_?val",
    r"caption|annotation",
    r"^(msvd|didemo|activitynet|anet|youcook_?2|youcookii|yc2)\.",
)
_TEXT_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
_PICKLE_ENDINGS = (".pkl", ".pickle", ".p")


class AnnotationFolder:
    """Folder of annotation files, found by the names that they have in the repositories that publish them.

    Upper and lower case do not matter, ``.gz`` may follow, files may lie in subfolders.

    Attributes:
        location: the folder, or one file that holds everything.
        sha256: SHA-256 of each file that was read, by its name.

    Raises:
        DataError: for a folder that is missing or holds no annotation file.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self.sha256: dict[str, str] = {}
        self._contents: dict[str, list[Annotation]] = {}
        filesystem, path = open_fs(location)
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.NotFound:
            raise DataError(
                "is missing", where=without_secrets(location), accepted="a folder of annotation files"
            )
        found = [location] if kind == pafs.FileType.File else list_files(location, recursive=True)
        self._files = {_relative(file, location): file for file in found}
        self._names = {
            name: base
            for name in sorted(self._files)
            if not _is_hidden(name) and (base := _base(name)).endswith(_TEXT_ENDINGS)
        }
        self.pickles = sorted(name for name in self._files if _base(name).endswith(_PICKLE_ENDINGS))
        if not self._names and not self.pickles:
            raise DataError(
                "holds no annotation file",
                where=without_secrets(location),
                accepted=f"names that end in {', '.join(_TEXT_ENDINGS)}, also with .gz",
            )

    def find(self, patterns: Sequence[str], *, besides: str = "") -> list[str]:
        """Returns the files that match the first pattern that has any match.

        Args:
            patterns: regular expressions, searched for in the lower-case file name without ``.gz``.
            besides: a regular expression that excludes files.
        """
        for pattern in patterns:
            found = [
                name
                for name, base in self._names.items()
                if re.search(pattern, base) and not (besides and re.search(besides, base))
            ]
            if found:
                return found
        return []

    def read_required(
        self,
        patterns: Sequence[str],
        role: str,
        accepted: str,
        *,
        besides: str = "",
        may_be_many: bool = False,
    ) -> list[Annotation]:
        """Finds and reads a file that the benchmark cannot do without; see ``find`` and ``read``.

        Args:
            patterns: as for ``find``.
            role: what the file is for.
            accepted: names of such files, as a person knows them.
            besides: as for ``find``.
            may_be_many: as for ``read``.

        Raises:
            DataError: as ``read``, or if there is no such file; a pickle is named in the message, but not
                opened.
        """
        names = self.find(patterns, besides=besides)
        if names:
            return self.read(names, role, may_be_many=may_be_many)
        have = ", ".join([*self._names, *self.pickles][:12])
        pickles = (
            f"; {', '.join(self.pickles)} is not opened, because a pickle can run any program"
            if self.pickles
            else ""
        )
        raise DataError(
            f"has no {role}{pickles} (it holds {have})",
            where=without_secrets(self.location),
            accepted=accepted,
        )

    def read_split(
        self, split: str, patterns: Sequence[str], role: str, accepted: str, *, besides: str = ""
    ) -> list[Annotation]:
        """Finds a split's file as ``read_required`` does, or one that holds all splits and names them.

        Val may be missing, since neither training nor test depends on it: then it is empty.

        Raises:
            DataError: as ``read_required``.
        """
        if not self.find(patterns, besides=besides):
            for name in self.find(_ALL_SPLITS):
                found = [entry for entry in self.read([name], role) if entry.split == split]
                if found:
                    return found
            if split == "val":
                return []
        return self.read_required(patterns, role, accepted, besides=besides)

    def read(self, names: Sequence[str], role: str, *, may_be_many: bool = False) -> list[Annotation]:
        """Reads the annotations of a file, or of several files together.

        Args:
            names: as ``find`` returns them; several have to agree unless ``may_be_many``.
            role: what the file is for, in messages.
            may_be_many: True if the files complete each other.

        Raises:
            DataError: for a file that cannot be read and for files that contradict each other.
        """
        contents = {name: self._read(name) for name in names}
        if may_be_many:
            return [annotation for content in contents.values() for annotation in content]
        first, *others = contents
        for other in others:
            if _meaning(contents[other]) != _meaning(contents[first]):
                raise DataError(
                    f"several files could be {role} and differ: {first}, {other}",
                    where=without_secrets(self.location),
                    accepted="one of them; move the others elsewhere",
                )
        return contents[first]

    def _read(self, name: str) -> list[Annotation]:
        if name in self._contents:
            return self._contents[name]
        data = read_bytes(self._files[name])
        self.sha256[name] = hashlib.sha256(data).hexdigest()
        try:
            self._contents[name] = read_annotations(name, data)
        except DataError as error:
            raise DataError(
                error.what, where=without_secrets(self._files[name]), accepted=error.accepted
            ) from error
        return self._contents[name]


def _meaning(annotations: Sequence[Annotation]) -> list[tuple[object, ...]]:
    return sorted((entry.video, entry.texts, entry.times, entry.split or "") for entry in annotations)


def _is_hidden(name: str) -> bool:
    # .git, and what a Mac leaves in archives.
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _base(name: str) -> str:
    return name.rsplit("/", 1)[-1].lower().removesuffix(".gz")


def _relative(file: str, location: str) -> str:
    path, root = (
        urllib.parse.unquote(place.partition("?")[0]) if is_uri(place) else place
        for place in (file, location)
    )
    below = root.rstrip("/") + "/"
    return path.removeprefix(below) if path.startswith(below) else path.rsplit("/", 1)[-1]
