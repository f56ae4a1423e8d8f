"""Locations of videos that captions may name: files of a folder, if there is one, and URIs; and their ids.

The id of a URI is its host or bucket and its path, without the ending of a video: ``bucket/folder/clip``. So
ids do not change while a collection grows. If two URIs would share an id, the ending is kept, then the
scheme, then a hash of the whole URI is added; the query itself may be a signature and is never shown.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Sequence

from gare.data.benchmarks.video_folder import NoSuchVideoError, VideoFolder, without_ending
from gare.errors import without_secrets
from gare.storage.uris import is_uri, local_path, scheme_of


class VideoLocations:
    """Lookup of the videos that captions name.

    Args:
        folder: its files are named by path or file name; None if captions name only whole locations.
        schemes: schemes that URIs may have; ``file`` also covers absolute local paths without a folder.
    """

    def __init__(self, folder: VideoFolder | None, schemes: Sequence[str]) -> None:
        self.folder = folder
        self._schemes = schemes

    def find(self, name: str) -> str:
        """Finds the key of the video of a name: a file of the folder, a URI or an absolute path.

        Extraction finds out whether a URI exists.

        Raises:
            NoSuchVideoError: if it matches no file, several files or a file outside the folder, or its scheme
                is not allowed.
        """
        location = name.strip()
        if self.folder and (found := self.folder.find_uri(location)) is not None:
            return found
        scheme = scheme_of(location)
        if scheme != "file":
            if scheme not in self._schemes:
                raise NoSuchVideoError(f"scheme not in sources.schemes, which has {', '.join(self._schemes)}")
            if any(sign in location for sign in "\0\r\n"):
                raise NoSuchVideoError("malformed URI")
            return location
        is_whole = is_uri(location) or location.startswith("/")
        if self.folder and not (self.folder.is_remote and is_whole):
            return self.folder.find(local_path(location) if is_uri(location) else name)
        path = local_path(location) if is_uri(location) or location.startswith("~") else location
        if not os.path.isabs(path):  # noqa: PTH117 - of a text
            raise NoSuchVideoError("neither a URI nor an absolute path, and data.videos names no folder")
        if "file" not in self._schemes:
            raise NoSuchVideoError("local path, but sources.schemes does not list file")
        if not os.path.exists(path):  # noqa: PTH110
            raise NoSuchVideoError("caption without video file")
        return os.path.normpath(path)

    def holds(self, name: str) -> bool:
        """Returns True for the name of a video that is there."""
        try:
            self.find(name)
        except NoSuchVideoError:
            return False
        return True

    def nearest(self, name: str) -> str:
        """Returns the most similar name in the folder; empty if none is similar."""
        return self.folder.nearest(name) if self.folder else ""

    def path(self, key: str) -> str:
        """Returns the location of a video."""
        return self.folder.path(key) if self.folder and not _is_whole(key) else key

    def ids(self, keys: Iterable[str]) -> dict[str, str]:
        """Returns the id of each key; see ``VideoFolder.ids``."""
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
    """Lists ids that a URI may get, the shortest first; the last is unique to the URI."""
    if not is_uri(uri):
        return [without_ending(uri.lstrip("/")), uri.lstrip("/"), uri]
    scheme, _, rest = without_secrets(uri).partition("://")
    name = unicodedata.normalize("NFC", urllib.parse.unquote(rest))
    secret = hashlib.sha256(uri.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return [without_ending(name), name, f"{scheme}://{name}", f"{scheme}://{name}?{secret}"]
