"""The videos in a folder: its video files, the names by which captions find them, and their ids."""

from __future__ import annotations

import difflib
import os
import posixpath
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from gare.storage.uris import is_uri

VIDEO_ENDINGS = frozenset(
    f".{ending}"
    for ending in (
        *("mp4", "m4v", "mov", "mkv", "webm", "avi", "gif", "mpg", "mpeg"),
        *("3gp", "3g2", "wmv", "flv", "ts", "mts", "m2ts", "ogv"),
        *("3gpp", "asf", "divx", "qt", "null"),  # occur in DiDeMo, with original file names
    )
)


class NoSuchVideoError(Exception):
    """A name that matches no file of the folder, several files, or a file outside.

    Attributes:
        kind: which of these cases, in words.
        hint: files with a similar name.
    """

    def __init__(self, kind: str, hint: str = "") -> None:
        super().__init__(kind, hint)
        self.kind = kind
        self.hint = hint


class VideoFolder:
    """The files below a folder, by the names that captions may use for them.

    A file is named by its path relative to the folder or by its file name alone if no other file has it, each
    with or without the ending; an absolute path has to be inside the folder. Links that lie in the folder are
    followed (download caches are made of them); a name never leads out of it. A folder of an object store is
    given by its URI and the list of its files; a URI below it names a file, too.

    Attributes:
        root: the folder, absolute and with links resolved, or its URI.
        files: all files, relative to it with '/' between the parts, sorted.
        videos: the files with the ending of a video.
    """

    def __init__(self, root: str, files: Sequence[str] | None = None) -> None:
        self.is_remote = files is not None
        self.root = root.rstrip("/") if self.is_remote else os.path.realpath(root)
        self._roots = () if self.is_remote else (self.root, posixpath.normpath(root))
        self.files = sorted(_walk(self.root) if files is None else files)
        self.videos = [file for file in self.files if is_video(file)]
        self._exact = set(self.files)
        # One table for each way to name a file, the most exact first.
        self._tables: list[dict[str, list[str]]] = [{}, {}, {}, {}]
        for file in self.files:
            names = [
                *(file, without_ending(file)),
                *(posixpath.basename(file), without_ending(posixpath.basename(file))),
            ]
            for table, name in zip(self._tables, names, strict=True):
                table.setdefault(_composed(name), []).append(file)

    def find(self, name: str) -> str:
        """Finds the file that a captions file means by a name.

        Raises:
            NoSuchVideoError: if it matches no file, several files or a file outside the folder.
        """
        written = dict.fromkeys((name, name.strip(), name.strip().replace("\\", "/")))
        relatives = [self._relative(form) for form in written]
        for relative in relatives:
            if relative in self._exact:
                return self._checked(relative)
        for relative in relatives:
            tables = self._tables if "/" not in relative else self._tables[:2]
            for table in tables:
                found = table.get(_composed(relative), [])
                if len(found) == 1:
                    return self._checked(found[0])
                if found:
                    raise NoSuchVideoError("several files of that name", " or ".join(map(repr, found[:3])))
        raise NoSuchVideoError("caption without video file")

    def find_uri(self, uri: str) -> str | None:
        """Finds the file of a URI below the folder's own URI; None for any other location.

        Raises:
            NoSuchVideoError: if the folder has no such file.
        """
        if not (self.is_remote and is_uri(uri)):
            return None
        folder, name = (urllib.parse.unquote(text) for text in (self.root + "/", uri))
        if not name.startswith(folder):
            return None
        if (file := name.removeprefix(folder)) not in self._exact:
            raise NoSuchVideoError("caption without video file")
        return file

    def nearest(self, name: str) -> str:
        """Returns the most similar file name; empty if none is similar."""
        near = difflib.get_close_matches(posixpath.basename(name), self._tables[2], n=1)
        return self._tables[2][near[0]][0] if near else ""

    def path(self, file: str) -> str:
        """Returns the absolute path or URI of one of the files."""
        if self.is_remote:
            return f"{self.root}/{urllib.parse.quote(file, safe='/')}"
        return f"{self.root.rstrip('/')}/{file}"

    def ids(self, named: Iterable[str]) -> dict[str, str]:
        """Returns the id of each file that captions name.

        An id is the relative path without the ending, or with it if several of them would share the id: a
        file that no caption names renames none. Only the endings of videos are cut: other text after the last
        dot may be a part of the id.
        """
        ids = {file: without_ending(_composed(file)) for file in named}
        while repeated := {name for name, times in Counter(ids.values()).items() if times > 1}:
            whole = {file: _composed(file) for file, name in ids.items() if name in repeated}
            if all(ids[file] == name for file, name in whole.items()):
                break  # names that differ only in Unicode form; the manifest refuses them
            ids.update(whole)
        return ids

    def _relative(self, name: str) -> str:
        name = posixpath.normpath(name)
        if name.startswith("/"):
            for root in self._roots:
                if name.startswith(root.rstrip("/") + "/"):
                    return name.removeprefix(root.rstrip("/") + "/")
            raise NoSuchVideoError("video outside the folder")
        if name == ".." or name.startswith("../"):
            raise NoSuchVideoError("video outside the folder")
        return name

    def is_there(self, file: str) -> bool:
        """Returns False for a link that leads nowhere."""
        return self.is_remote or Path(self.path(file)).exists()

    def _checked(self, file: str) -> str:
        if not self.is_there(file):
            raise NoSuchVideoError("caption without video file", "a link that leads nowhere")
        return file


def _walk(root: str) -> Iterator[str]:
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back to a folder above
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        relative = os.path.relpath(folder, root)
        for name in names:
            yield name if relative == "." else f"{relative}/{name}"


def _composed(name: str) -> str:
    # A Mac stores é as e and an accent; a captions file from elsewhere has one character.
    return unicodedata.normalize("NFC", name)


def is_video(file: str) -> bool:
    """Returns True for a name with the ending of a video."""
    # Hidden files are not meant: a Mac leaves ._clip.mp4 beside clip.mp4 on other disks.
    return posixpath.splitext(file)[1].lower() in VIDEO_ENDINGS and not posixpath.basename(file).startswith(
        "."
    )


def without_ending(file: str) -> str:
    """Returns the name without the ending of a video; other text after the last dot is kept."""
    return posixpath.splitext(file)[0] if is_video(file) else file
