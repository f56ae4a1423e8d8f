"""Films with more than one track, or with none: which of them is the film."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.films.clocks import made, one_of
from tests.films.film import FITS, Film, Recipe, Track, draw_track, write

#: Pictures of tracks that are not the film have numbers from here on.
_OTHER = 600


def two_tracks(rng: np.random.Generator, path: Path) -> Film:
    """Two tracks of video, the second of which is marked as the default one, or the first."""
    container, is_second = one_of(rng, "mp4", "matroska"), rng.random() < 0.7
    film = draw_track(rng, container)
    other = replace(draw_track(rng, container, first=_OTHER), default=False)
    tracks = [other, film] if is_second else [film, other]
    return _shown(path, container, tracks, film, f"the {'second' if is_second else 'first'} is the default")


def thumbnail(rng: np.random.Generator, path: Path) -> Film:
    """A track of small pictures, one a second or one in all, before the film."""
    container = one_of(rng, "mp4", "matroska")
    film = draw_track(rng, container)
    count = 1 if rng.random() < 0.3 else max(1, int(film.times_s[-1]))
    recipe = Recipe(one_of(rng, "mjpeg", "libx264"), 48, 48, 1, 1)
    small = Track(recipe, range(_OTHER, _OTHER + count), np.arange(count + 1.0), default=False)
    return _shown(path, container, [small, film], film, f"after {count} of {recipe}")


def cover(rng: np.random.Generator, path: Path) -> Film:
    """A cover picture beside the film, in either order."""
    container = one_of(rng, "mp4", "matroska")
    film = draw_track(rng, container)
    picture = _cover()
    tracks = [picture, film] if rng.random() < 0.5 else [film, picture]
    return _shown(path, container, tracks, film, "a cover")


def sound_only(rng: np.random.Generator, path: Path) -> Film:
    """Sound alone, or with a cover picture: there is nothing to give."""
    container = one_of(rng, *FITS)
    tracks = [Track(None, times_s=[0.0, float(rng.uniform(1, 4))])]
    if container in ("mp4", "matroska") and rng.random() < 0.6:
        tracks.append(_cover())
    path = path.with_name(f"{path.name}.{FITS[container][1]}")
    write(path, container, tracks)
    return Film(path, f"{container}, sound{' and a cover' if len(tracks) > 1 else ''}", ())


def subtitles(rng: np.random.Generator, path: Path) -> Film:
    """Subtitles beside the film, the first of them at its start or later."""
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
