"""The videos that captions may name: files of a folder, if there is one, and URIs; and the ids they get.

The id of a URI is its host or bucket and its path, without the ending of a video: ``bucket/folder/clip``. So
it stays what it is while a collection grows. Where two URIs would share an id they keep the ending, then the
scheme, then get a hash of all of it; a query itself may be a signature and is shown nowhere.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Sequence

from gare.data.benchmarks.video_folder import NoSuchVideoError, VideoFolder, without_ending
from gare.errors import shown
from gare.storage.uris import is_uri, local_path, scheme_of


class VideoLocations:
    """Finds what captions name.

    Args:
        folder: whose files are named by path or file name; None where captions name whole locations alone.
        schemes: those that URIs may have; ``file`` is also that of absolute local paths without a folder.
    """

    def __init__(self, folder: VideoFolder | None, schemes: Sequence[str]) -> None:
        self.folder = folder
        self._schemes = schemes

    def find(self, name: str) -> str:
        """The key of the video that captions mean by a name: a file of the folder, a URI or an absolute path.

        Whether there is something behind a URI is left to extraction.

        Raises:
            NoSuchVideoError: if it means none, several, one outside the folder or a scheme not allowed.
        """
        location = name.strip()
        if self.folder and (found := self.folder.find_uri(location)) is not None:
            return found
        scheme = scheme_of(location)
        if scheme != "file":
            if scheme not in self._schemes:
                raise NoSuchVideoError(f"scheme not in sources.schemes, which has {', '.join(self._schemes)}")
            if any(sign in location for sign in "\0\r\n"):
                raise NoSuchVideoError("URI that is none")
            return location
        is_whole = is_uri(location) or location.startswith("/")
        if self.folder and not (self.folder.is_remote and is_whole):
            return self.folder.find(local_path(location) if is_uri(location) else name)
        path = local_path(location) if is_uri(location) or location.startswith("~") else location
        if not os.path.isabs(path):  # noqa: PTH117 - of a text
            raise NoSuchVideoError("neither a URI nor an absolute path, and data.videos names no folder")
        if "file" not in self._schemes:
            raise NoSuchVideoError("local path, without file in sources.schemes")
        if not os.path.exists(path):  # noqa: PTH110
            raise NoSuchVideoError("caption without video file")
        return os.path.normpath(path)

    def nearest(self, name: str) -> str:
        """The name in the folder that is most like this one; empty if none is."""
        return self.folder.nearest(name) if self.folder else ""

    def path(self, key: str) -> str:
        """The location of a video."""
        return self.folder.path(key) if self.folder and not _is_whole(key) else key

    def ids(self, keys: Iterable[str]) -> dict[str, str]:
        """The id of each key, and of the folder's other videos; see ``VideoFolder.ids`` and this module."""
        keys = list(keys)
        whole = {key for key in keys if _is_whole(key)}
        ids = self.folder.ids(key for key in keys if key not in whole) if self.folder else {}
        return ids | _ids_of_uris(whole)


def _is_whole(key: str) -> bool:
    return is_uri(key) or key.startswith("/")


def _ids_of_uris(uris: Iterable[str]) -> dict[str, str]:
    names = {uri: _names(uri) for uri in uris}
    level = dict.fromkeys(names, 0)
    while True:
        ids = {uri: names[uri][level[uri]] for uri in names}
        times = Counter(ids.values())
        again = [uri for uri in names if times[ids[uri]] > 1 and level[uri] + 1 < len(names[uri])]
        if not again:
            return ids
        level |= {uri: level[uri] + 1 for uri in again}


def _names(uri: str) -> list[str]:
    """Ids that a URI may get, the shortest first; with the last, different URIs have different ones."""
    if not is_uri(uri):
        return [without_ending(uri.lstrip("/")), uri.lstrip("/"), uri]
    scheme, _, rest = shown(uri).partition("://")
    name = unicodedata.normalize("NFC", urllib.parse.unquote(rest))
    secret = hashlib.sha256(uri.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return [without_ending(name), name, f"{scheme}://{name}", f"{scheme}://{name}?{secret}"]
