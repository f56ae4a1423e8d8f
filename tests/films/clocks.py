"""Films with unusual clocks: unusual start, rate, jumps or wraps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.films.film import (
    FITS,
    TICKS,
    Film,
    Showing,
    Track,
    draw_track,
    moved,
    shift_flv,
    showing,
    started_at,
    write,
)

#: Seconds after which the clock of a transport stream, 33 bits of 1/90000 s, starts at 0 again.
WRAP_S = 2**33 / TICKS


def one_of(rng: np.random.Generator, *names: str) -> str:
    """Draws one of the names."""
    return names[int(rng.integers(len(names)))]


def made(
    path: Path,
    container: str,
    tracks: Sequence[Track],
    what: str = "",
    *,
    film: Track | None = None,
    options: Mapping[str, str] | None = None,
    is_sound: bool = True,
) -> Film:
    """Writes the tracks; second 0 is the start of the first one.

    Args:
        path: where to write, without the ending.
        container: FFmpeg's name of the container.
        tracks: tracks to write.
        what: description of what is unusual about the film.
        film: track that players show; None for the first.
        options: options of the container.
        is_sound: see ``Film``.
    """
    path = path.with_name(f"{path.name}.{FITS[container][1]}")
    write(path, container, tracks, options)
    film = film or tracks[0]
    assert film.recipe is not None
    start_s = min(float(track.times_s[0]) for track in tracks if not track.is_text)
    shown = showing(film, start_s=start_s, clock_s=[started_at(path)])
    what = f"{container}, {film.recipe}, {len(film.numbers)} pictures{', ' if what else ''}{what}"
    return Film(path, what, (shown,), film.recipe.frame_s, frozenset(film.keys), is_sound=is_sound)


def with_sound(rng: np.random.Generator, track: Track) -> list[Track]:
    """Returns the track, in half of the cases with sound that begins with it."""
    return (
        [track] if rng.random() < 0.5 else [track, Track(None, times_s=[track.times_s[0], track.times_s[-1]])]
    )


def steady(rng: np.random.Generator, path: Path) -> Film:
    """Starts at 0 and runs evenly: the baseline for all other kinds."""
    container = one_of(rng, *FITS)
    # AVI stores no presentation times; AVI files with B-frames are in ``order``.
    track = draw_track(rng, container, two_way=False if container == "avi" else None)
    return made(path, container, with_sound(rng, track))


def late(rng: np.random.Generator, path: Path) -> Film:
    """Starts seconds or minutes above zero; second 0 is its first picture."""
    container, start_s = one_of(rng, "mp4", "matroska", "mpegts", "webm", "flv"), float(rng.uniform(0.5, 90))
    track = moved(draw_track(rng, container), start_s)
    return made(path, container, with_sound(rng, track), f"starts at {start_s:.3f} s")


def negative(rng: np.random.Generator, path: Path) -> Film:
    """Starts below zero.

    An MP4's edit list then cuts the first pictures, which no player shows. Other containers have no such
    rule: players show all pictures, and second 0 is the first one, as in a transport stream that wraps.
    """
    container, cut_s = one_of(rng, "mp4", "mp4", "matroska", "mpegts"), float(rng.uniform(0.2, 1.5))
    track = moved(draw_track(rng, container), -cut_s)
    tracks = with_sound(rng, track)
    options = {} if container == "mp4" else {"avoid_negative_ts": "disabled"}
    film = made(path, container, tracks, f"starts at {-cut_s:.3f} s", options=options)
    if container != "mp4":
        return film
    times = np.asarray(track.times_s)
    first = int(np.searchsorted(times, 0.0, side="right")) - 1
    numbers = np.array(track.numbers[first:], dtype=np.int64)
    shown = Showing(numbers, np.maximum(times[first:-1], 0), float(times[-1]))
    return replace(film, showings=(shown,))


def sparse(rng: np.random.Generator, path: Path) -> Film:
    """Holds some pictures, or all of them, for seconds, as slides do."""
    container = one_of(rng, "mp4", "matroska", "mpegts", "flv", "webm")
    is_slides = rng.random() < 0.3
    # An MP4 derives a picture's duration from the coding order: no B-frames if the last ones are held.
    track = draw_track(rng, container, two_way=False if is_slides else None, length_s=(2.0, 5.0))
    count, frame_s = len(track.numbers), float(track.times_s[1])
    steps = np.full(count, frame_s)
    if is_slides:
        steps = rng.uniform(0.5, 4.0, count)
    else:
        held = rng.integers(1, count - 6, int(rng.integers(1, 4)))
        steps[held] = rng.uniform(1, 6, len(held))
    track.times_s = np.concatenate([[0.0], np.cumsum(steps)])
    return made(path, container, [track], f"longest {steps.max():.2f} s")


def variable(rng: np.random.Generator, path: Path) -> Film:
    """Shows each picture for a different time, as phones and screen recorders do."""
    container = one_of(rng, "mp4", "matroska", "mpegts", "flv", "webm")
    track = draw_track(rng, container)
    steps = rng.uniform(0.4, 1.9, len(track.numbers)) * float(track.times_s[1])
    track.times_s = np.concatenate([[0.0], np.cumsum(steps)])
    return made(path, container, with_sound(rng, track))


def equal(rng: np.random.Generator, path: Path) -> Film:
    """Gives two pictures the same time: keyframes and those after or before them, or any."""
    container = one_of(rng, "mp4", "matroska", "mpegts", "flv", "webm")
    track = draw_track(rng, container, two_way=False)
    assert track.recipe is not None
    times = np.array(track.times_s)
    track.coded_at_s = times.copy()
    keys = np.arange(track.recipe.gop, len(times) - 2, track.recipe.gop)
    places = rng.integers(0, len(times) - 2, int(rng.integers(1, 4)))
    if len(keys) and rng.random() < 0.7:
        places = np.unique(keys[rng.integers(0, len(keys), 3)] - int(rng.integers(2)))
    for place in places:
        times[place] = times[place + 1]  # not earlier: no picture may be shown before it is coded
    track.times_s = np.maximum.accumulate(times)
    return made(path, container, [track], f"{len(places)} shared times", is_sound=False)


def order(rng: np.random.Generator, path: Path) -> Film:
    """Stores decoding times as presentation times, although pictures are coded out of order."""
    container = one_of(rng, "avi", "avi", "mp4", "matroska", "mpegts", "flv")
    track = draw_track(rng, container, codecs=("libx264",), two_way=True)
    assert track.recipe is not None
    track.recipe = replace(track.recipe, num_b=max(2, track.recipe.num_b))
    track.in_coding_order = True
    return made(path, container, [track], "pts = dts", is_sound=False)


def wrapped(rng: np.random.Generator, path: Path) -> Film:
    """Starts shortly before the clock of a transport stream wraps, or that of FLV."""
    container = one_of(rng, "mpegts", "flv")
    track = draw_track(rng, container)
    before_s = float(rng.uniform(0.1, 0.9)) * float(track.times_s[-1])
    if container == "flv":
        num_bits = int(rng.choice([24, 32]))  # some writers leave the upper byte empty
        film = made(path, "flv", with_sound(rng, track), f"wraps {num_bits} bits after {before_s:.2f} s")
        wraps_ms, before_ms = 1 << num_bits, round(before_s * 1000)
        shift_flv(film.path, wraps_ms - before_ms, num_bits)
        (shown,) = film.showings
        clock_s = (-before_ms / 1000, (wraps_ms - before_ms) / 1000)
        return replace(film, showings=(replace(shown, clock_s=clock_s),), is_sound=num_bits == 32)
    track = moved(track, WRAP_S - before_s)
    film = made(
        path,
        "mpegts",
        with_sound(rng, track),
        f"wraps after {before_s:.2f} s",
        options={"mpegts_copyts": "1"},
    )
    (shown,) = film.showings
    return replace(film, showings=(replace(shown, clock_s=(*shown.clock_s, -before_s)),))


def joined(rng: np.random.Generator, path: Path) -> Film:
    """Two transport streams in one file, the second starting its clock anew, as ``cat`` joins them.

    Both start at 0, or the second at an earlier hour than the first.
    """
    first = draw_track(rng, "mpegts")
    assert first.recipe is not None
    count = max(8, round(rng.uniform(1.0, 6.0) * first.recipe.fps))
    second = Track(
        first.recipe,
        range(len(first.numbers), len(first.numbers) + count),
        np.arange(count + 1) / first.recipe.fps,
    )
    has_sound, is_late = rng.random() < 0.5, rng.random() < 0.5
    hours_s = sorted(rng.uniform(0, WRAP_S - 60, 2), reverse=True) if is_late else (0.0, 0.0)
    parts, starts_s = [], []
    for name, track, hour_s in zip(("one", "two"), (first, second), hours_s, strict=True):
        late = moved(track, hour_s) if is_late else track
        sound = [Track(None, times_s=[late.times_s[0], late.times_s[-1]])] if has_sound else []
        part = path.with_name(f"{path.name}.{name}")
        write(part, "mpegts", [late, *sound], {"mpegts_copyts": "1"} if is_late else None)
        track.keys |= late.keys
        parts.append(part.read_bytes())
        starts_s.append(started_at(part))
        part.unlink()
    path = path.with_name(f"{path.name}.ts")
    path.write_bytes(b"".join(parts))
    end_s = float(first.times_s[-1])
    whole = Track(
        first.recipe,
        [*first.numbers, *second.numbers],
        [*first.times_s[:-1], *(time + end_s for time in second.times_s)],
    )
    return Film(
        path,
        f"mpegts, {first.recipe}, {len(first.numbers)} and {count} pictures{', sound' if has_sound else ''}",
        (showing(whole, clock_s=starts_s[:1]),),
        2 * first.recipe.frame_s,  # the time between the parts is unknown
        frozenset(first.keys | second.keys),
        is_sound=False,
    )


def jump(rng: np.random.Generator, path: Path) -> Film:
    """Jumps far ahead in the middle. Players of a transport stream then go on at once."""
    container = one_of(rng, "mpegts", "mpegts", "matroska", "mp4", "flv")
    # FLV cannot say that a picture is shown hours after it is decoded.
    track = draw_track(rng, container, two_way=False if container == "flv" else None)
    assert track.recipe is not None
    place = int(rng.integers(2, len(track.numbers) - 2))
    by_s = float(10 ** rng.uniform(1.3 if container == "mpegts" else 3.7, 4.3))
    steady_s = np.array(track.times_s)
    track.times_s = steady_s + np.where(np.arange(len(steady_s)) >= place, by_s, 0)
    film = made(path, container, [track], f"{by_s:.0f} s ahead at picture {place}", is_sound=False)
    closed = replace(film.showings[0], times_s=steady_s[:-1], end_s=float(steady_s[-1]))
    # Other containers may hold a picture for hours; players disagree. A stream may too, but it must be noted.
    held = (replace(one, must_be_said=container == "mpegts") for one in film.showings)
    return replace(film, showings=(closed, *held))


def sound_first(rng: np.random.Generator, path: Path) -> Film:
    """Has sound that begins before or after its pictures; second 0 is the start of the earlier one."""
    container = one_of(rng, "mp4", "matroska", "mpegts", "flv", "webm")
    track = draw_track(rng, container)
    apart_s = float(rng.uniform(0.3, 3.0))
    end_s = float(track.times_s[-1])
    if rng.random() < 0.6:
        track = moved(track, apart_s)
        return made(
            path, container, [track, Track(None, times_s=[0.0, end_s])], f"sound {apart_s:.2f} s earlier"
        )
    sound = Track(None, times_s=[min(apart_s, end_s / 2), end_s])
    return made(path, container, [track, sound], f"sound {sound.times_s[0]:.2f} s later")


def held_avi(rng: np.random.Generator, path: Path) -> Film:
    """Variable rate written into AVI, which then has empty chunks where a picture is held.

    AVI has no times except the positions of its chunks. FFmpeg guesses those of H.264 one chunk late, which
    would hold the wrong picture, the one before; players that count chunks, and this truth, do not.
    """
    track = draw_track(rng, "avi", two_way=False, length_s=(2.0, 4.0))
    assert track.recipe is not None
    steps = np.ones(len(track.numbers), np.int64)
    for place in rng.integers(1, len(steps) - 1, int(rng.integers(1, 6))):
        steps[place] = int(rng.integers(2, 2 * track.recipe.fps))
    if rng.random() < 0.3:
        steps = rng.integers(1, 4, len(steps))
    if rng.random() < 0.3:
        steps[-1] = int(rng.integers(2, 4 * track.recipe.fps))
    track.times_s = np.concatenate([[0], np.cumsum(steps)]) / track.recipe.fps
    return made(path, "avi", [track], f"{int((steps > 1).sum())} held, the last for {steps[-1]}")


def held_mp4(rng: np.random.Generator, path: Path) -> Film:
    """Holds a few pictures in MP4: the first one, the last one unless there are B-frames, and another."""
    track = draw_track(rng, "mp4", length_s=(0.5, 2.0))
    assert track.recipe is not None
    steps = np.full(len(track.numbers), float(track.times_s[1]))
    # As in ``sparse``: with B-frames the last picture's duration is not stored.
    last = len(steps) - 1 if not track.recipe.num_b else 1
    steps[[0, last, int(rng.integers(max(1, len(steps) - 6)))]] = rng.uniform(0.04, 5.0, 3)
    track.times_s = np.concatenate([[0.0], np.cumsum(steps)])
    return made(path, "mp4", [track], f"first {steps[0]:.2f} s, last {steps[-1]:.2f} s")


def open_start(rng: np.random.Generator, path: Path) -> Film:
    """Begins in the middle of a group of pictures, so that the first pictures cannot be decoded."""
    container = one_of(rng, "mp4", "matroska", "mpegts", "flv")
    track = draw_track(rng, container, codecs=("libx264",), length_s=(4.0, 7.0))
    assert track.recipe is not None
    gop = int(rng.integers(10, max(11, len(track.numbers) // 2)))
    is_open = rng.random() < 0.5 and track.recipe.num_b > 0
    track.recipe = replace(track.recipe, gop=gop, open_gop=is_open)
    track.drop = int(rng.integers(1, gop))
    film = made(path, container, [track], f"without its first {track.drop} packets", is_sound=False)
    times, key_s = np.array(track.times_s), float(track.times_s[min(track.keys) - track.numbers[0]])
    start_s = float(times[track.drop])  # with B-frames off by a picture or two, which frame_s covers
    kept = times[:-1] >= start_s - 1e-6
    shown = Showing(
        np.array(track.numbers)[kept],
        times[:-1][kept] - start_s,
        float(times[-1]) - start_s,
        (0.0, started_at(film.path), start_s),
    )
    frame_s = film.frame_s * (1 + track.recipe.num_b)
    return replace(film, showings=(shown,), lost=(0.0, key_s - start_s), frame_s=frame_s)
