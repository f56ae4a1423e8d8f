"""Names of keys, columns and splits in annotation files, and the normal form of texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from gare.data.benchmarks.formats.captions_file import SPLIT_NAMES as _SPLIT_NAMES
from gare.data.benchmarks.formats.texts import clean_caption, parse_text_list, strip_invisible

#: Keys by role, the least ambiguous first; written as ``normalise_key`` returns them.
VIDEOS = (
    *("videoid", "video", "vid", "videoname", "videopath", "videofile", "clipid", "clip", "clipname"),
    *("filename", "file", "path", "imageid", "image", "vidkey", "id", "name", "key"),
)
TEXTS = (
    *("captions", "caption", "sentences", "sentence", "texts", "text", "descriptions", "description"),
    *("descs", "desc", "cap", "caps", "encap", "annotations"),
)
TIMES = ("timestamps", "timestamp", "segments", "segment")
#: Start and end of a clip in its video; in MSR-VTT, ``start time`` is a position in another video.
BOUNDS = (("start", "starts", "startsec", "startseconds"), ("end", "ends", "endsec", "endseconds"))
SPLITS = ("split", "subset")
SPLIT_NAMES = {
    **_SPLIT_NAMES,
    "val1": "val",
    "publictest": "test",
}


@lru_cache(maxsize=4096)
def normalise_key(key: str) -> str:
    """Returns a key in lower case without blanks, hyphens and underscores: ``Video_ID`` is ``videoid``."""
    return "".join(sign for sign in strip_invisible(key).lower() if sign not in "_- ")


def find_key(keys: Iterable[str], names: Sequence[str]) -> str | None:
    """Finds the first of the names that is among the keys, and returns it as written there."""
    written: dict[str, str] = {}
    for key in keys:
        written.setdefault(normalise_key(key), key)
    return next((written[name] for name in names if name in written), None)


class Roles(NamedTuple):
    """The keys of a record by role; None for a role without a key.

    Attributes:
        video: the video.
        sure_video: the same, if its name is unambiguous.
        text: a text or texts.
        times: pairs of start and end.
        start: start of a clip.
        end: end of a clip.
        split: train, val or test.
    """

    video: str | None
    sure_video: str | None
    text: str | None
    times: str | None
    start: str | None
    end: str | None
    split: str | None


def roles_of(keys: Iterable[str]) -> Roles:
    """Finds the roles of a record's keys."""
    return _roles_of(tuple(keys))


@lru_cache(maxsize=256)
def _roles_of(keys: tuple[str, ...]) -> Roles:
    # All records of a file have the same few keys.
    return Roles(*(find_key(keys, names) for names in (VIDEOS, VIDEOS[:3], TEXTS, TIMES, *BOUNDS, SPLITS)))


def normalise_spaces(text: str) -> str:
    """Strips a text and reduces each run of whitespace to one blank, as the tokeniser does.

    Copies of the same captions differ in whitespace: double blanks, line ends, leading blanks.
    """
    return " ".join(clean_caption(text).split())


def texts_of_cell(cell: str) -> tuple[str, ...]:
    """Returns the texts in a text field: one, or the items of a list written by JSON or pandas.

    Raises:
        ValueError: for a list of other values than texts.
    """
    texts = parse_text_list(cell)
    return tuple(map(normalise_spaces, texts or [cell]))
