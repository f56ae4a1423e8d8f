"""All kinds of films by name."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.films import clocks, damage, links, tracks
from tests.films.film import Film

Make = Callable[[np.random.Generator, Path], Film]

_MAKERS: tuple[Make, ...] = (
    *(clocks.steady, clocks.late, clocks.negative, clocks.sparse, clocks.variable, clocks.equal),
    *(clocks.order, clocks.wrapped, clocks.joined, clocks.jump, clocks.sound_first, clocks.open_start),
    *(clocks.held_avi, clocks.held_mp4),
    *(tracks.two_tracks, tracks.thumbnail, tracks.cover, tracks.sound_only, tracks.subtitles),
    *(damage.hurt_mkv, damage.hurt_ts, damage.hurt_avi, damage.hurt_mp4),
    *(links.hls, links.concat, links.dash, links.sdp, links.images),
)
KINDS: dict[str, Make] = {make.__name__: make for make in _MAKERS}


def generator(seed: int, kind: str, number: int) -> np.random.Generator:
    """Returns the random generator of one file, independent of all other files."""
    return np.random.default_rng([seed, zlib.crc32(kind.encode()), number])


def make_film(kind: str, rng: np.random.Generator, folder: Path, number: int) -> Film:
    """Makes one film in a folder of its own, together with the files that it refers to."""
    own = folder_of(folder, kind, number)
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    return KINDS[kind](rng, own / "film")


def folder_of(folder: Path, kind: str, number: int) -> Path:
    """Returns the folder of one film."""
    return folder / f"{kind}-{number}"
