"""The truth about a film, which is how players show it, and the encoder and writer of films."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from numpy.typing import NDArray

from tests.films.numbers import draw

TICKS = 90_000
_OPTIONS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "superfast", "crf": "20", "threads": "1", "sc_threshold": "0"},
    "mpeg4": {"qmin": "2", "qmax": "6", "b": "900000"},
    "flv": {"qmin": "2", "qmax": "6", "b": "900000"},
    "mjpeg": {"qmin": "2", "qmax": "6"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "b": "900000", "auto-alt-ref": "0"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "24", "b": "0", "auto-alt-ref": "0"},
}
#: Codecs that each container accepts, and its file name's suffix.
FITS: dict[str, tuple[tuple[str, ...], str]] = {
    "mp4": (("libx264", "mpeg4", "mjpeg", "libvpx-vp9"), "mp4"),
    "matroska": (("libx264", "mpeg4", "mjpeg", "libvpx", "libvpx-vp9"), "mkv"),
    "avi": (("mpeg4", "mjpeg", "libx264"), "avi"),
    "mpegts": (("libx264", "mpeg4"), "ts"),
    "webm": (("libvpx", "libvpx-vp9"), "webm"),
    "flv": (("libx264", "flv"), "flv"),
}
#: Codecs with B-frames: pictures coded after a picture that is shown later.
TWO_WAY = frozenset({"libx264", "mpeg4"})
_SOUNDS = {"mp4": "aac", "matroska": "aac", "avi": "mp2", "mpegts": "mp2", "webm": "libopus", "flv": "aac"}


@dataclass(frozen=True)
class Recipe:
    """Encoding of a video track: FFmpeg's encoder name, pixels, frame rate and keyframe interval."""

    codec: str
    width: int
    height: int
    fps: int
    gop: int
    num_b: int = 0
    open_gop: bool = False

    @property
    def frame_s(self) -> float:
        """Duration of a picture at the nominal rate, seconds."""
        return 1 / self.fps

    def __str__(self) -> str:
        kind = f"{self.codec} {self.width}x{self.height} {self.fps} fps, GOP {self.gop}"
        return kind + (f", {self.num_b} B" if self.num_b else "") + (", open" if self.open_gop else "")


@dataclass(frozen=True, eq=False)
class Showing:
    """One way in which players show a film. Seconds count from the player's second 0.

    Attributes:
        numbers: numbers of the F pictures, in the order shown, (F,).
        times_s: start time of each picture, increasing, (F,).
        end_s: end of the last picture.
        clock_s: times that the file's own clock may show at second 0.
        must_be_said: True if an answer is right only with a note that something is unclear.
    """

    numbers: NDArray[np.int64]
    times_s: NDArray[np.float64]
    end_s: float
    clock_s: tuple[float, ...] = (0.0,)
    must_be_said: bool = False


@dataclass(frozen=True, eq=False)
class Film:
    """A generated file and the truth about it.

    Attributes:
        path: the file.
        what: how it was made, for the log.
        showings: ways of showing it, all of them right; empty if the file must be refused.
        frame_s: seconds by which a picture may be off.
        keys: numbers of the pictures that can be decoded alone.
        is_sound: True if nothing is wrong with the file, so that it must be returned whole.
        lost: seconds (start, end) of pictures that cannot be decoded.
        is_damaged: True if bytes were overwritten, so that a wrong picture may be undetectable.
    """

    path: Path
    what: str
    showings: tuple[Showing, ...]
    frame_s: float = 0.04
    keys: frozenset[int] = frozenset()
    is_sound: bool = True
    lost: tuple[float, float] = (0.0, 0.0)
    is_damaged: bool = False


@dataclass
class Track:
    """Packets of one stream to be written; positions count its pictures as shown.

    Attributes:
        recipe: its encoding; None for sound and subtitles.
        numbers: numbers of its pictures.
        times_s: start times of its pictures, then the end of the last one: one more than ``numbers``.
        default: True for the track that players choose.
        cover: True for a picture that is not video.
        is_text: True for subtitles, one shown from each time to the next.
        in_coding_order: True to store decoding times as presentation times.
        coded_at_s: times to derive decoding times from; empty for ``times_s``.
        drop: number of packets to leave out at the start.
        keys: numbers of its keyframes, once written.
    """

    recipe: Recipe | None
    numbers: Sequence[int] = ()
    times_s: Sequence[float] | NDArray[np.float64] = ()
    default: bool = True
    cover: bool = False
    is_text: bool = False
    in_coding_order: bool = False
    coded_at_s: Sequence[float] | NDArray[np.float64] = ()
    drop: int = 0
    keys: set[int] = field(default_factory=set)


def draw_recipe(
    rng: np.random.Generator, codec: str, *, two_way: bool | None = None, open_gop: bool = False
) -> Recipe:
    """Draws a recipe for a codec; ``two_way`` says if there are B-frames, None draws that too."""
    sizes = ((64, 64), (80, 64), (96, 64), (128, 96), (64, 96), (160, 120))
    width, height = sizes[int(rng.integers(len(sizes)))]
    num_b = 0
    if codec in TWO_WAY and two_way is not False and (two_way or rng.random() < 0.5):
        num_b = int(rng.integers(1, 4)) if codec == "libx264" else 1
    fps, gop = int(rng.choice([8, 10, 12, 15, 24, 25, 30])), int(rng.choice([1, 5, 8, 12, 25, 250]))
    if num_b or open_gop:
        gop = max(gop, 8)
    return Recipe(codec, width, height, fps, 1 if codec == "mjpeg" else gop, num_b, open_gop)


def draw_track(
    rng: np.random.Generator,
    container: str,
    *,
    codecs: Sequence[str] = (),
    two_way: bool | None = None,
    first: int = 0,
    length_s: tuple[float, float] = (2.0, 6.0),
) -> Track:
    """Draws a track of constant rate for a container, with pictures numbered from ``first``."""
    fitting = [codec for codec in FITS[container][0] if not codecs or codec in codecs]
    recipe = draw_recipe(rng, fitting[int(rng.integers(len(fitting)))], two_way=two_way)
    count = max(8, round(rng.uniform(*length_s) * recipe.fps))
    return Track(recipe, range(first, first + count), np.arange(count + 1) / recipe.fps)


def showing(track: Track, *, start_s: float = 0.0, clock_s: Sequence[float] = ()) -> Showing:
    """Returns the showing of a track as written; ``start_s`` is second 0 on the track's clock."""
    times = np.asarray(track.times_s, dtype=np.float64) - start_s
    return Showing(
        np.array(track.numbers, dtype=np.int64), times[:-1], float(times[-1]), (0.0, start_s, *clock_s)
    )


def encode(stream: av.VideoStream, track: Track) -> list[av.Packet[Any]]:
    """Encodes a track; each packet's times follow its times_s, in ticks of 1/90000 s."""
    recipe = track.recipe
    assert recipe is not None
    stream.width, stream.height = recipe.width, recipe.height
    stream.pix_fmt = "yuvj420p" if recipe.codec == "mjpeg" else "yuv420p"
    stream.codec_context.thread_count = 1
    packets = []
    for place, number in enumerate(track.numbers):
        frame = av.VideoFrame.from_ndarray(draw(number, recipe.width, recipe.height), format="rgb24")
        frame.pts, frame.time_base = place, Fraction(1, recipe.fps)
        packets += stream.encode(frame)
    packets += stream.encode()
    base = packets[0].time_base
    ticks = [round(time * TICKS) for time in track.times_s]
    coded = [round(time * TICKS) for time in track.coded_at_s] if len(track.coded_at_s) else ticks
    places = [round(int(packet.pts or 0) * float(base or 0) * recipe.fps) for packet in packets]
    assert sorted(places) == list(range(len(track.numbers)))
    delay = max(order - place for order, place in enumerate(places))
    step = TICKS // recipe.fps
    for order, (packet, place) in enumerate(zip(packets, places, strict=True)):
        packet.time_base = Fraction(1, TICKS)
        before = order - delay
        packet.dts = coded[before] if before >= 0 else coded[0] + before * step
        packet.pts = ticks[place]
        packet.duration = ticks[place + 1] - ticks[place]
        if track.in_coding_order:
            packet.dts = packet.pts = ticks[order]
        if packet.is_keyframe and order >= track.drop:
            track.keys.add(int(track.numbers[place]))
    return packets[track.drop :]


def _add_video(out: av.container.OutputContainer, track: Track) -> av.VideoStream:
    recipe = track.recipe
    assert recipe is not None
    options = dict(_OPTIONS[recipe.codec])
    if recipe.codec != "mjpeg":
        options["g"] = options["keyint_min"] = str(recipe.gop)
    if recipe.codec in TWO_WAY:
        options["bf"] = str(recipe.num_b)
    if recipe.open_gop:
        options["x264-params"] = "open-gop=1"
    return out.add_stream(recipe.codec, rate=recipe.fps, options=options)


def _sound(stream: av.AudioStream, track: Track) -> list[av.Packet[Any]]:
    context = stream.codec_context
    start_s, end_s = track.times_s[0], track.times_s[-1]
    count = int((end_s - start_s) * context.sample_rate)
    tone = (np.sin(np.arange(count) * 0.05) * 8000).astype(np.int16)
    packets: list[av.Packet[Any]] = []
    resampler = av.AudioResampler(context.format, context.layout, context.sample_rate, context.frame_size)
    frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
    frame.sample_rate, frame.pts = context.sample_rate, 0
    for piece in (*resampler.resample(frame), *resampler.resample(None)):
        packets += stream.encode(piece)
    packets += stream.encode()
    for packet in packets:
        step = float(packet.time_base or 0) * TICKS
        packet.duration = round((packet.duration or 0) * step)
        packet.pts = packet.dts = round(int(packet.pts or 0) * step + start_s * TICKS)
        packet.time_base = Fraction(1, TICKS)
    return packets


def _texts(stream: av.stream.Stream, track: Track, container: str) -> list[av.Packet[Any]]:
    packets = []
    for first_s, last_s in itertools.pairwise(track.times_s):
        text = f"shown from {first_s:.2f} s".encode()
        packet = av.Packet(len(text).to_bytes(2, "big") + text if container == "mp4" else text)
        packet.stream, packet.time_base = stream, Fraction(1, TICKS)
        packet.pts = packet.dts = round(first_s * TICKS)
        packet.duration = round((last_s - first_s) * TICKS)
        packets.append(packet)
    return packets


def jpeg(number: int, width: int, height: int) -> bytes:
    """Returns a picture of a number as a JPEG file."""
    context = av.CodecContext.create("mjpeg", "w")
    assert isinstance(context, av.VideoCodecContext)
    context.width, context.height, context.pix_fmt = width, height, "yuvj420p"
    context.time_base = Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(draw(number, width, height), format="rgb24")
    frame.pts = 0
    return b"".join(bytes(packet) for packet in (*context.encode(frame), *context.encode()))


def _add(out: av.container.OutputContainer, container: str, track: Track) -> av.stream.Stream:
    if track.is_text:
        return out.add_mux_stream({"mp4": "mov_text", "webm": "webvtt"}.get(container, "subrip"))
    if track.recipe is None:
        sound = out.add_stream(_SOUNDS[container], rate=48_000 if container == "webm" else 44_100)
        assert isinstance(sound, av.AudioStream)
        sound.layout = "mono"
        return sound
    if track.cover and container == "matroska":
        data = jpeg(track.numbers[0], track.recipe.width, track.recipe.height)
        return out.add_attachment("cover.jpg", "image/jpeg", data)
    stream = _add_video(out, track)
    if container == "mp4":
        stream.time_base = Fraction(1, TICKS)
    flags = Disposition.attached_pic if track.cover else Disposition(0)
    stream.disposition = flags | (Disposition.default if track.default else Disposition(0))
    return stream


def write(
    path: Path, container: str, tracks: Sequence[Track], options: Mapping[str, str] | None = None
) -> None:
    """Writes a film; its tracks' packets lie in the order of their decoding times."""
    packets: list[av.Packet[Any]] = []
    with av.open(str(path), "w", format=container, options=dict(options or {})) as out:
        for stream, track in [(_add(out, container, track), track) for track in tracks]:
            if isinstance(stream, av.VideoStream):
                packets += encode(stream, track)
            elif isinstance(stream, av.AudioStream):
                packets += _sound(stream, track)
            elif track.is_text:
                packets += _texts(stream, track, container)
        out.start_encoding()
        for packet in sorted(packets, key=lambda packet: int(packet.dts or 0)):
            out.mux(packet)


def shift_flv(path: Path, by_ms: int, num_bits: int = 32) -> None:
    """Shifts all times of an FLV file, which wrap to 0 after ``num_bits`` bits."""
    data = bytearray(path.read_bytes())
    at = 13  # after the header and the size field before the first tag
    while at < len(data):
        size, low = (int.from_bytes(data[first : first + 3], "big") for first in (at + 1, at + 4))
        time_ms = (by_ms + (data[at + 7] << 24 | low)) % (1 << num_bits)
        if data[at] != 18:  # not a script tag
            data[at + 4 : at + 7], data[at + 7] = (time_ms & 0xFFFFFF).to_bytes(3, "big"), time_ms >> 24
        at += 11 + size + 4
    path.write_bytes(data)


def started_at(path: Path) -> float:
    """Returns the seconds on the file's clock at which its first stream starts, from its packets."""
    with av.open(str(path)) as container:
        return (container.start_time or 0) / av.time_base


def moved(track: Track, by_s: float) -> Track:
    """Returns the track shifted by some seconds."""
    return replace(track, times_s=[time + by_s for time in track.times_s], keys=set())
