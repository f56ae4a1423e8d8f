"""Films with overwritten bytes: the damage shows only in FFmpeg's log or in the clock, if at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.films.clocks import made, with_sound
from tests.films.film import Film, draw_track


def hurt_mkv(rng: np.random.Generator, path: Path) -> Film:
    """A Matroska file with damaged bytes in the middle."""
    return _hurt(rng, path, "matroska")


def hurt_ts(rng: np.random.Generator, path: Path) -> Film:
    """A transport stream with damaged bytes in the middle."""
    return _hurt(rng, path, "mpegts")


def hurt_avi(rng: np.random.Generator, path: Path) -> Film:
    """An AVI file with damaged bytes in the middle."""
    return _hurt(rng, path, "avi")


def hurt_mp4(rng: np.random.Generator, path: Path) -> Film:
    """An MP4 file with damaged bytes in the middle of its pictures."""
    return _hurt(rng, path, "mp4")


def _hurt(rng: np.random.Generator, path: Path, container: str) -> Film:
    """Overwrites one to three pieces with zeros or noise, away from the headers and the index."""
    track = draw_track(rng, container, two_way=False if container == "avi" else None)
    film = made(path, container, with_sound(rng, track))
    data = bytearray(film.path.read_bytes())
    first, last = int(0.15 * len(data)), int(0.85 * len(data))
    if container == "mp4":
        first = data.index(b"mdat") + 4
        last = first - 8 + int.from_bytes(data[first - 8 : first - 4], "big")
        assert first < last <= len(data)
    pieces = []
    for _ in range(int(rng.integers(1, 4))):
        count = min(int(10 ** rng.uniform(1.5, 3.7)), (last - first) // 3)
        place = int(rng.integers(first, last - count))
        is_noise = rng.random() < 0.5
        data[place : place + count] = rng.bytes(count) if is_noise else bytes(count)
        pieces.append(f"{count} bytes of {'noise' if is_noise else 'zeros'} at {place}")
    film.path.write_bytes(data)
    return replace(film, what=f"{film.what}, {', '.join(pieces)}", is_sound=False, is_damaged=True)
