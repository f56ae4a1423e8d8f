"""Films with several tracks, or with none, where the right track must be chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.films.clocks import made, one_of
from tests.films.film import FITS, Film, Recipe, Track, draw_track, write

#: First picture number of tracks that are not the film.
_OTHER = 600


def two_tracks(rng: np.random.Generator, path: Path) -> Film:
    """Two video tracks, with the first or the second marked as default."""
    container, is_second = one_of(rng, "mp4", "matroska"), rng.random() < 0.7
    film = draw_track(rng, container)
    other = replace(draw_track(rng, container, first=_OTHER), default=False)
    tracks = [other, film] if is_second else [film, other]
    return _shown(path, container, tracks, film, f"the {'second' if is_second else 'first'} is the default")


def thumbnail(rng: np.random.Generator, path: Path) -> Film:
    """A track of small pictures before the film, one a second or a single one."""
    container = one_of(rng, "mp4", "matroska")
    film = draw_track(rng, container)
    count = 1 if rng.random() < 0.3 else max(1, int(film.times_s[-1]))
    recipe = Recipe(one_of(rng, "mjpeg", "libx264"), 48, 48, 1, 1)
    small = Track(recipe, range(_OTHER, _OTHER + count), np.arange(count + 1.0), default=False)
    return _shown(path, container, [small, film], film, f"after {count} of {recipe}")


def cover(rng: np.random.Generator, path: Path) -> Film:
    """A cover picture next to the film, in either order."""
    container = one_of(rng, "mp4", "matroska")
    film = draw_track(rng, container)
    picture = _cover()
    tracks = [picture, film] if rng.random() < 0.5 else [film, picture]
    return _shown(path, container, tracks, film, "a cover")


def sound_only(rng: np.random.Generator, path: Path) -> Film:
    """Sound alone, or with a cover picture, so that there are no pictures to return."""
    container = one_of(rng, *FITS)
    tracks = [Track(None, times_s=[0.0, float(rng.uniform(1, 4))])]
    if container in ("mp4", "matroska") and rng.random() < 0.6:
        tracks.append(_cover())
    path = path.with_name(f"{path.name}.{FITS[container][1]}")
    write(path, container, tracks)
    return Film(path, f"{container}, sound{' and a cover' if len(tracks) > 1 else ''}", ())


def subtitles(rng: np.random.Generator, path: Path) -> Film:
    """Subtitles next to the film, starting with it or later."""
    container = one_of(rng, "mp4", "matroska", "webm")
    film = draw_track(rng, container)
    first_s = 0.0 if rng.random() < 0.5 else float(rng.uniform(0.1, 1.5))
    texts = Track(None, times_s=np.linspace(first_s, float(film.times_s[-1]), 4), is_text=True)
    return _shown(path, container, [film, texts], film, f"subtitles from {first_s:.2f} s")


def _cover() -> Track:
    return Track(Recipe("mjpeg", 64, 64, 25, 1), [_OTHER], [0.0, 0.04], default=False, cover=True)


def _shown(path: Path, container: str, tracks: list[Track], film: Track, what: str) -> Film:
    """Writes the tracks in their order; players show ``film``."""
    options = {"default_mode": "passthrough"} if container == "matroska" else None
    return made(path, container, tracks, what, film=film, options=options)
