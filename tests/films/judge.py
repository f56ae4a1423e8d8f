"""Requests for clips of a film, and the check of the answers against what players show.

The pictures that a policy must choose are computed here from the truth, so that half a film, a clip from
elsewhere or a picture under a wrong time is detected whatever the answer says about itself.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import av
import numpy as np
from numpy.typing import NDArray

from gare.data.decode.clip_request import ClipRequest
from gare.data.decode.decoded_clip import DecodedClip
from gare.data.decode.process import DecodeProcess, DecoderCrashError, DecodeTimeoutError
from gare.data.decode.sampling import (
    equally_spaced,
    frames_on_screen,
    keyframes_within,
    sample_times,
    uniform_times,
)
from gare.errors import DataError
from tests.films.film import Film, Showing
from tests.films.numbers import read

#: right: whole and true. said: true as far as it goes, and marked. garbled: marked, with unreadable pictures.
#: mistimed: marked, from overwritten bytes, with pictures at wrong times. failed: an error with its reason.
#: unseen: wrong, but undetectable in FFmpeg's log and the clock. wrong: silently wrong, or marked without any
#: damage that would excuse it.
Ending = Literal["right", "said", "garbled", "mistimed", "failed", "unseen", "wrong"]
ENDINGS: tuple[Ending, ...] = get_args(Ending)
#: Rounding of times by containers, seconds.
ROUNDING_S = 0.002
#: Padding that audio encoders put before the first sound, by which second 0 may move, seconds.
PRIMING_S = 0.024
SIZE_PX, DEADLINE_S, MEMORY_MB = 40, 60.0, 1000.0
#: Note that describes the request, not a fault of the file.
_NEAREST = "no keyframe inside the clip, the nearest is taken"
_BEYOND = re.compile(r"end_s \S+ lies beyond the video's \S+ s")


@dataclass(frozen=True)
class Ask:
    """A request for a clip: ``decode_clip``'s arguments."""

    start_s: float | None
    end_s: float | None
    sampling: Literal["released", "uniform", "keyframes"]
    sample_fps: float
    num_frames: int
    decoder: Literal["auto", "pyav"]

    def __str__(self) -> str:
        first = "start" if self.start_s is None else f"{self.start_s:.3f}"
        last = "end" if self.end_s is None else f"{self.end_s:.3f}"
        return f"{self.sampling} {first}..{last} {self.sample_fps:g} fps F={self.num_frames} {self.decoder}"


@dataclass(frozen=True)
class Verdict:
    """Judgement of one answer.

    Attributes:
        ending: see ``Ending``.
        why: what is wrong, or the reason given in the answer.
        is_needless: True if a sound film was not returned as right.
    """

    ending: Ending
    why: str
    is_needless: bool = False


def draw_ask(rng: np.random.Generator, film: Film) -> Ask:
    """Draws a request; half of the requests are for whole films."""
    start_s = end_s = None
    if film.showings and rng.random() < 0.5:
        last_s = film.showings[0].end_s
        start_s = float(rng.uniform(0, 0.8)) * last_s
        end_s = start_s + float(rng.uniform(0.3, 1.2)) * max(last_s - start_s, 0.5)
        start_s, end_s = [(start_s, end_s), (start_s, None), (None, end_s)][int(rng.integers(3))]
    return Ask(
        start_s,
        end_s,
        sampling=("released", "uniform", "keyframes")[int(rng.integers(3))],
        sample_fps=float(rng.choice([1.0, 2.0, 5.0])),
        num_frames=int(rng.choice([1, 4, 8, 12])),
        decoder="auto" if rng.random() < 0.75 else "pyav",
    )


def judge(process: DecodeProcess, film: Film, ask: Ask) -> Verdict:
    """Decodes a request in the decoding process, as extraction does, and judges the answer."""
    try:
        request = ClipRequest(str(film.path), **vars(ask), image_size=SIZE_PX, encoding="raw")
        clip = process.extract(request, deadline_s=DEADLINE_S, memory_mb=MEMORY_MB)
    except (DecoderCrashError, DecodeTimeoutError) as error:
        return Verdict("wrong", error.what)
    except DataError as error:
        return Verdict("failed", error.what, is_needless=film.is_sound and _has_pictures(film, ask))
    numbers = [read(np.frombuffer(data, np.uint8).reshape(SIZE_PX, SIZE_PX, 3)) for data in clip.frames]
    if not film.showings:
        return Verdict("wrong", f"{len(numbers)} frames of a file that is to be refused: {numbers}")
    note = _BEYOND.sub("", clip.note.replace(_NEAREST, "")).strip("; ")
    is_said = bool(note) or not clip.complete
    times = ", ".join(f"{time:.3f}" for time in clip.time_s)
    got = f"pictures {numbers} at {times} s, duration {clip.duration_s:.2f} s" + (
        f" ({clip.note}; complete={clip.complete})" if is_said or clip.note else ""
    )
    faults = [_faults(film, shown, ask, clip, numbers, is_said=is_said) for shown in film.showings]
    if any(not fault for fault in faults):
        ending: Ending = "said" if is_said else "right"
        if is_said and None in numbers:
            ending = "garbled"
        return Verdict(ending, note, is_needless=film.is_sound and ending != "right")
    if film.is_damaged and is_said:
        return Verdict("mistimed", f"{faults[0]}; {got}")
    if film.is_damaged and not signs(film):
        return Verdict("unseen", f"{faults[0]}; {got}")
    return Verdict("wrong", f"{faults[0]}; {got}")


def _has_pictures(film: Film, ask: Ask) -> bool:
    """Returns True if there is a picture to return: edit lists cut keyframes, sound may begin earlier."""
    if not film.showings:
        return False
    (shown, *_) = film.showings
    if ask.end_s is not None and ask.end_s <= shown.times_s[0] + film.frame_s:
        return False
    return ask.sampling != "keyframes" or not film.keys.isdisjoint(shown.numbers.tolist())


def _faults(
    film: Film,
    shown: Showing,
    ask: Ask,
    clip: DecodedClip[bytes],
    numbers: list[int | None],
    *,
    is_said: bool,
) -> str:
    """Returns what is wrong with an answer if players show the film in this way; empty if nothing."""
    if shown.must_be_said and not is_said:
        return "that it is unclear is not said"
    near_s = film.frame_s + ROUNDING_S
    fault = _mistimed(shown, clip.time_s, numbers, near_s) or _outside(shown, ask, numbers, near_s, clip.note)
    if fault or is_said:
        return fault
    if None in numbers:
        return "a picture that shows no number"
    lost_s = min(film.lost[1], shown.end_s if ask.end_s is None else ask.end_s) - (ask.start_s or 0.0)
    if lost_s > 0.5 + near_s and ask.sampling != "keyframes":
        return f"{lost_s:.2f} s without pictures are not said"
    if lost_s <= 0 or not film.lost[1]:
        fault = _not_chosen(film, shown, ask, [number for number in numbers if number is not None], near_s)
    last_s = float(shown.end_s - shown.times_s[-1])
    if not fault and abs(clip.duration_s - shown.end_s) > 0.5 + last_s:
        fault = f"a duration of {clip.duration_s:.2f} s for {shown.end_s:.2f} s"
    return fault


def _away(shown: Showing, number: int, time_s: float) -> float:
    """Returns the seconds between a moment and the nearest one at which a picture is on screen."""
    place = int(np.searchsorted(shown.numbers, number))
    until_s = shown.times_s[place + 1] if place + 1 < len(shown.times_s) else shown.end_s
    return float(max(shown.times_s[place] - time_s, time_s - until_s, 0.0))


def _mistimed(shown: Showing, time_s: NDArray[np.float64], numbers: list[int | None], near_s: float) -> str:
    if (np.diff(time_s) < 0).any():
        return "times that fall"
    known = [
        (number, float(time)) for number, time in zip(numbers, time_s, strict=True) if number is not None
    ]
    if others := [number for number, _ in known if number not in shown.numbers]:
        return f"pictures {others} are not of this film"
    for (one, first), (two, second) in itertools.pairwise(known):
        if one == two and first != second:
            return f"picture {one} at two times, {first:.3f} and {second:.3f} s"
        if two < one:
            return f"picture {one} at {first:.3f} s before picture {two} at {second:.3f} s"
    away = [[_away(shown, number, time - zero) for number, time in known] for zero in shown.clock_s]
    if known and min(max(row) for row in away) > near_s:
        row = min(away, key=max)
        number, time = known[int(np.argmax(row))]
        return f"picture {number} at {time:.3f} s is {max(row):.3f} s from where it is shown"
    return ""


def _outside(shown: Showing, ask: Ask, numbers: list[int | None], near_s: float, note: str) -> str:
    """Returns a fault for a picture that is not shown within the clip, or an empty string."""
    if _NEAREST in note:
        return ""
    start_s = 0.0 if ask.start_s is None else ask.start_s
    end_s = shown.end_s if ask.end_s is None else ask.end_s
    for number in numbers:
        if number is not None:
            middle = min(max(shown.times_s[0], start_s), end_s)
            inside = [moment for moment in (start_s, end_s) if _away(shown, number, moment) <= near_s]
            place = int(np.searchsorted(shown.numbers, number))
            is_first = place == 0 and middle <= shown.times_s[0] + near_s
            if not inside and not is_first and not start_s <= shown.times_s[place] <= end_s:
                return f"picture {number}, shown from {shown.times_s[place]:.3f} s, is not of the clip"
    return ""


def _not_chosen(film: Film, shown: Showing, ask: Ask, numbers: list[int], near_s: float) -> str:
    """Returns how the pictures differ from those the policy must choose; the ends may be off by one."""
    wanted: list[list[float]] = []
    for start_s, end_s in _bounds(film, shown, ask):
        moments = _moments(film, shown, ask, start_s, end_s)
        wanted.append(moments.tolist())
        if len(moments) == len(numbers) and all(
            _away(shown, number, moment) <= near_s
            for number, moment in zip(numbers, moments.tolist(), strict=True)
        ):
            return ""
    expected = [int(shown.numbers[place]) for place in frames_on_screen(shown.times_s, np.array(wanted[0]))]
    return f"pictures {expected} are to be chosen"


def _bounds(film: Film, shown: Showing, ask: Ask) -> Iterator[tuple[float, float]]:
    first, last = float(shown.times_s[0]), float(shown.times_s[-1])
    starts = {first, 0.0} if ask.start_s is None else {max(ask.start_s, first)}
    ends = [shown.end_s, shown.end_s - film.frame_s, shown.end_s + film.frame_s, last, last + film.frame_s]
    if ask.end_s is not None:
        ends = [min(ask.end_s, end) for end in ends]
    for start_s, end_s in itertools.product(sorted(starts, reverse=True), dict.fromkeys(ends)):
        for off_s in (0.0, -ROUNDING_S, ROUNDING_S, -PRIMING_S, PRIMING_S):
            if end_s > start_s:
                yield start_s + off_s, end_s
                yield start_s + off_s, end_s + ROUNDING_S
    yield max(starts), max(*ends, max(starts))


def _moments(film: Film, shown: Showing, ask: Ask, start_s: float, end_s: float) -> NDArray[np.float64]:
    """Returns the moments whose pictures the policy keeps, or the times of the keyframes."""
    end_s = max(start_s, end_s)
    if ask.sampling == "keyframes":
        keys = np.isin(shown.numbers, sorted(film.keys))
        times = shown.times_s[keys]
        return times[keyframes_within(times, start_s, end_s, ask.num_frames)] if len(times) else times
    if ask.sampling == "uniform":
        return uniform_times(start_s, end_s, ask.num_frames)
    moments = sample_times(start_s, end_s, ask.sample_fps)
    return moments[equally_spaced(len(moments), ask.num_frames)]


def signs(film: Film) -> list[str]:
    """Returns the signs of damage in a film: FFmpeg's log, errors, decoder flags, gaps in the clock."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.WARNING)
    found: list[str] = []
    ticks: list[float] = []
    try:
        with av.logging.Capture() as log, av.open(str(film.path)) as container:
            stream: Any = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    found.append("corrupt packet")
                if packet.pts is not None:
                    ticks.append(float(packet.pts * packet.time_base))
                try:
                    found += ["corrupt picture" for frame in packet.decode() if frame.is_corrupt]
                except av.error.FFmpegError as error:
                    found.append(str(error))
    except (av.error.FFmpegError, IndexError) as error:
        return [*found, str(error)]
    finally:
        av.logging.set_level(level)
    steps = np.diff(np.sort(np.array(ticks)))
    if len(steps) and steps.max() > 2.5 * max(float(np.median(steps)), film.frame_s):
        found.append(f"a gap of {steps.max():.2f} s")
    return found + [text for _, _, text in log]
