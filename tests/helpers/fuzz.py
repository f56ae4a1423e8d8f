"""Damaged files from real clips, drawn from a seed: cuts, flipped bits, zeros, and pieces of two clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gare.data.decode.clip_request import ClipRequest
from gare.data.decode.process import DecodeProcess
from gare.errors import DataError

Bytes = bytearray
Damage = Callable[[np.random.Generator, Bytes, Bytes], Bytes]

#: Settings with which the fuzzer decodes its files.
SIZE_PX, DEADLINE_S, MEMORY_MB = 32, 60.0, 1000.0


def place(rng: np.random.Generator, data: Bytes) -> int:
    """Draws a position: half of the time in the first 4 kB, where headers lie, else in the rest."""
    return int(rng.integers(min(len(data), 4096) if rng.random() < 0.5 else len(data)))


def cut(rng: np.random.Generator, data: Bytes, other: Bytes) -> Bytes:
    """Returns the file cut off at a random byte."""
    return data[: int(rng.integers(len(data)))]


def cut_out(rng: np.random.Generator, data: Bytes, other: Bytes) -> Bytes:
    """Returns the file without a piece."""
    first = place(rng, data)
    return data[:first] + data[first + int(rng.integers(1, 20_000)) :]


def flip_few(rng: np.random.Generator, data: Bytes, other: Bytes) -> Bytes:
    """Flips one to eight bits."""
    for _ in range(int(rng.integers(1, 9))):
        data[place(rng, data)] ^= 1 << int(rng.integers(8))
    return data


def flip_many(rng: np.random.Generator, data: Bytes, other: Bytes) -> Bytes:
    """Flips bits all over the file, from one in ten thousand to one in a hundred bytes."""
    for _ in range(int(len(data) * 10 ** rng.uniform(-4, -2))):
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    return data


def zeros(rng: np.random.Generator, data: Bytes, other: Bytes) -> Bytes:
    """Overwrites a piece with zeros, as on a bad disk or in an unfinished download."""
    first = place(rng, data)
    count = min(int(10 ** rng.uniform(0, 5.5)), len(data) - first)
    data[first : first + count] = bytes(count)
    return data


def noise(rng: np.random.Generator, data: Bytes, other: Bytes) -> Bytes:
    """Overwrites a piece with noise."""
    first = place(rng, data)
    count = min(int(10 ** rng.uniform(0, 4.5)), len(data) - first)
    data[first : first + count] = rng.bytes(count)
    return data


def swap_head(rng: np.random.Generator, data: Bytes, other: Bytes) -> Bytes:
    """Replaces the first bytes by those of another clip."""
    count = int(10 ** rng.uniform(1, 4.5))
    return other[:count] + data[count:]


def swap_tail(rng: np.random.Generator, data: Bytes, other: Bytes) -> Bytes:
    """Replaces the last bytes by those of another clip; many containers have their index there."""
    count = int(10 ** rng.uniform(1, 4.5))
    return data[:-count] + other[-count:]


def join_two(rng: np.random.Generator, data: Bytes, other: Bytes) -> Bytes:
    """Joins two clips in one file, the first possibly cut."""
    return data[: len(data) if rng.random() < 0.5 else int(rng.integers(1, len(data)))] + other


DAMAGES: tuple[Damage, ...] = (
    cut,
    cut_out,
    flip_few,
    flip_many,
    zeros,
    noise,
    swap_head,
    swap_tail,
    join_two,
)


def damaged_files(
    rng: np.random.Generator, clips: Sequence[Path], count: int, folder: Path
) -> Iterator[tuple[str, Path]]:
    """Writes damaged files one by one, with each kind of damage in turn.

    Yields:
        What was done to which clip, and the file, which is deleted before the next one.
    """
    for number in range(count):
        what, path = damaged_file(rng, clips, number, folder)
        yield what, path
        path.unlink()


def damaged_file(
    rng: np.random.Generator, clips: Sequence[Path], number: int, folder: Path
) -> tuple[str, Path]:
    """Writes a damaged file, with the damage given by its number; returns what was done, and the file."""
    damage = DAMAGES[number % len(DAMAGES)]
    one, two = (clips[int(rng.integers(len(clips)))] for _ in range(2))
    path = folder / f"{number}{one.suffix}"
    path.write_bytes(damage(rng, Bytes(one.read_bytes()), Bytes(two.read_bytes())))
    return f"{damage.__name__} of {one.name} ({two.name})", path


def outcome(process: DecodeProcess, path: Path) -> str:
    """Decodes a file; returns ``whole``, ``damaged``, ``empty picture``, or the reason of its failure."""
    try:
        request = ClipRequest(str(path), image_size=SIZE_PX, encoding="raw")
        clip = process.extract(request, deadline_s=DEADLINE_S, memory_mb=MEMORY_MB)
    except DataError as error:
        return f"{type(error).__name__}: {error.what.split(':')[0].split('(')[0].strip()}"
    pictures = [np.frombuffer(data, np.uint8).reshape(-1, 3) for data in clip.frames]
    if not pictures or any(is_empty(rgb) for rgb in pictures):
        return "empty picture"
    return "whole" if clip.complete else "damaged"


def is_empty(rgb: np.ndarray) -> bool:
    """Returns True for zeros, the green of zero luma and chroma, or the grey of a lost reference picture."""
    red, green, blue = (int(value) for value in rgb[0])
    grey = red == green == blue and 124 <= red <= 132
    return bool((rgb == rgb[0]).all()) and (grey or (red, blue) == (0, 0))


def real_clips(folder: Path, largest: float = np.inf) -> list[Path]:
    """Returns the clips to damage: those without a black picture of their own, up to a size in bytes."""
    own_black = {"big_buck_bunny_0_30.webm", "slides_talk.mp4"}
    files = (path for path in sorted(folder.iterdir()) if path.name not in own_black)
    return [path for path in files if path.stat().st_size <= largest]


def table(outcomes: Counter[str]) -> str:
    """Formats outcomes with their counts, the most frequent first."""
    return "\n".join(f"{count:6d}  {reason}" for reason, count in outcomes.most_common())
