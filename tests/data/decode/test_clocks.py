"""Clocks that fall, wrap and start anew, held pictures, tracks, and files that begin in the middle."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from gare.data.decode import backend_pyav as from_start
from gare.data.decode import clip as decode
from gare.data.decode.clip import decode_clip
from gare.data.decode.clock import WRAP_TICKS, Clock
from gare.data.decode.decoded_clip import DecodedClip
from gare.data.decode.mkv_blocks import times_below_zero
from gare.data.decode.packets import DECODING_ORDER
from gare.data.decode.probe import probe
from tests.films.clocks import WRAP_S, made
from tests.films.film import Recipe, Track, shift_flv
from tests.films.film import write as write_film
from tests.films.numbers import read

#: Levels of grey by which pictures are told apart, after coding.
STEP = 3


def write(
    path: Path,
    numbers: range,
    *,
    codec: str = "libx264",
    rate: int = 10,
    size: int = 64,
    options: dict[str, str] | None = None,
    first_s: float = 0.0,
) -> Path:
    """A video whose n-th picture is as grey as its number says."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        for number in numbers:
            grey = np.full((size, size, 3), 40 + STEP * (number % 60), np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = number - numbers.start + round(first_s * rate), Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def without_first(folder: Path, count: int, *, gop: int) -> Path:
    """A stream of 60 pictures without its first packets: those up to the next keyframe do not decode."""
    options = {"g": str(gop), "bf": "0", "sc_threshold": "0"}
    whole, cut = write(folder / "whole.mkv", range(60), options=options), folder / "cut.mkv"
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(source.streams.video[0])):
            if packet.size and number >= count:
                packet.stream = stream
                target.mux(packet)
    return cut


def numbers_of(clip: DecodedClip) -> list[int]:
    return [round((float(frame.mean()) - 40) / STEP) for frame in clip.frames]


def test_a_clock_runs_on_where_it_starts_anew() -> None:
    """Half of a joined recording would be thrown away, or shown among the other half."""
    clock = Clock(1 / 90000)
    assert [clock.offset(dts, 9000) for dts in (0, 9000, 18000, None)] == [0, 0, 0, 0]
    # A little back within one clock is no fall.
    assert clock.offset(9000, 9000) == 0
    clock.offset(90000, 9000)
    assert clock.offset(0, 9000) == 99000
    assert clock.offset(9000, 9000) == 99000
    assert clock.num_joins == 1
    wrapping = Clock(1 / 90000, wraps=WRAP_TICKS)
    wrapping.offset(WRAP_TICKS - 9000, 9000)
    assert (wrapping.offset(0, 9000), wrapping.num_joins, wrapping.num_wraps) == (WRAP_TICKS, 0, 1)
    without_durations = Clock(1 / 10)
    assert [without_durations.offset(dts, 0) for dts in (0, 2, 40, 4)] == [0, 0, 0, 40 + 38 - 4]


def test_a_wrap_counts_once_whoever_runs_on_from_it() -> None:
    """FFmpeg runs on by itself for a day; a clip that crosses the wrap could not be told from any other."""
    step = WRAP_TICKS // 10_000
    for first in (-step // 2, WRAP_TICKS - step // 2, WRAP_TICKS // 3):
        clock = Clock(1 / 90000, wraps=WRAP_TICKS)
        times = [first + step * count for count in range(10_000)]
        assert {clock.offset(time, step) for time in times} == {0}
        assert clock.num_wraps == 1
        # Behind its first time FFmpeg starts at it again, which is no wrap.
        assert clock.offset(times[-1] + step - WRAP_TICKS, step) == WRAP_TICKS
        assert (clock.num_wraps, clock.num_joins, clock.jumps) == (1, 0, [])
    # No other clock has 33 bits.
    other = Clock(1 / 90000)
    assert [other.offset(time, 9000) for time in (-9000, 0, WRAP_TICKS - 9000, WRAP_TICKS)] == [0] * 4
    assert other.num_wraps == 0


def ts_from(path: Path, numbers: range, start_s: float, step_s: float = 0.1) -> bytes:
    """A transport stream whose clock starts at any second of its 26 hours."""
    track = Track(Recipe("libx264", 64, 64, 10, 5), numbers, start_s + step_s * np.arange(len(numbers) + 1))
    write_film(path, "mpegts", [track], {"mpegts_copyts": "1"})
    return path.read_bytes()


@pytest.mark.parametrize(
    ("start_s", "step_s", "wraps"),
    [(WRAP_S - 1, 0.1, True), (WRAP_S - 100, 8, True), (WRAP_S - 100, 0.1, False), (500, 0.1, False)],
)
def test_a_wrapped_clock_is_a_trait(tmp_path: Path, start_s: float, step_s: float, wraps: bool) -> None:
    """Clips that an older version cut at other seconds could not be found among those in a store."""
    path = tmp_path / "wrapped.ts"
    ts_from(path, range(20), start_s, step_s)
    source = probe(path)
    assert ("wrapped clock" in source.traits) == wraps
    assert (source.fault, source.remark) == ("", "")
    clip = decode_clip(path, sampling="uniform", num_frames=4, end_s=17 * step_s)
    assert [read(frame) for frame in clip.frames] == [2, 6, 10, 14]
    assert clip.duration_s == pytest.approx(20 * step_s, abs=step_s)


@pytest.mark.parametrize("sound", [True, False])
@pytest.mark.parametrize(
    ("num_bits", "before_ms", "trait"),
    [
        (32, 2000, "wrapped clock"),
        (32, 70_000, ""),  # ends before
        (32, 2**31 + 2000, ""),  # FFmpeg reads no sign
        (24, 2000, "joined clocks"),  # the writer fills no upper byte
        (24, 2**24, ""),
    ],
)
def test_the_clock_of_flv_wraps(
    tmp_path: Path, num_bits: int, before_ms: int, trait: str, sound: bool
) -> None:
    """Recordings of a stream that runs for hours would show one picture for 49 days, and count as whole."""
    tracks = [Track(Recipe("libx264", 64, 64, 10, 5, 1), range(40), np.arange(41) / 10)]
    if sound:
        tracks.append(Track(None, times_s=[0.0, 4.0]))
    path = made(tmp_path / "live", "flv", tracks).path
    whole = decode_clip(path, start_s=1, end_s=3.5, sampling="uniform", num_frames=5)
    shift_flv(path, 2**num_bits - before_ms, num_bits)
    clip = decode_clip(path, start_s=1, end_s=3.5, sampling="uniform", num_frames=5)
    assert ({"wrapped clock", "joined clocks"} & probe(path).traits) == {trait} - {""}
    assert (clip.complete, "starts anew" in clip.note) == (True, trait == "joined clocks")
    assert clip.frame_idx.tolist() == whole.frame_idx.tolist()
    assert [read(frame) for frame in clip.frames] == [read(frame) for frame in whole.frames]
    assert clip.duration_s == pytest.approx(whole.duration_s)


def test_a_stream_of_flv_that_was_interrupted_is_one(tmp_path: Path) -> None:
    """Recorders of live streams start their clock anew after each break: the rest came 49 days later."""
    parts = []
    for name, first, by_ms in (("one", 0, 100_000), ("two", 20, 3000)):
        track = Track(Recipe("flv", 64, 64, 10, 5), range(first, first + 20), np.arange(21) / 10)
        path = made(tmp_path / name, "flv", [track]).path
        shift_flv(path, by_ms)
        parts.append(path.read_bytes())
    path = tmp_path / "both.flv"
    path.write_bytes(parts[0] + parts[1][13:])
    clip = decode_clip(path, sampling="uniform", num_frames=4, end_s=3.6)
    assert [read(frame) for frame in clip.frames] == [4, 13, 22, 31]
    assert (clip.complete, "starts anew 1 times" in clip.note) == (True, True)
    assert clip.duration_s == pytest.approx(4.0, abs=0.11)


@pytest.mark.parametrize("sound", [True, False])
@pytest.mark.parametrize("variable", [True, False])
@pytest.mark.parametrize(
    ("codec", "num_b"), [("libx264", 0), ("libx264", 2), ("mpeg4", 1), ("mjpeg", 0), ("libvpx", 0)]
)
def test_a_matroska_file_that_begins_below_zero(
    tmp_path: Path, codec: str, num_b: int, variable: bool, sound: bool
) -> None:
    """FFmpeg gives such blocks no time, or a guess: their pictures came by others' times, or not at all."""
    times = np.cumsum([0, *[1, 3, 1, 2, 2] * 8]) / 20 if variable else np.arange(41) / 10
    tracks = [Track(Recipe(codec, 64, 64, 10, 8, num_b), range(40), times - 1.25)]
    if sound:
        tracks.append(Track(None, times_s=[-1.25, 2.0]))
    path = made(tmp_path / "cut", "matroska", tracks, options={"avoid_negative_ts": "disabled"}).path
    source = probe(path)
    assert (source.traits - {"open GOP"}, source.fault) == ({"negative times"}, "")
    assert np.abs(source.pts * source.time_base_s - (times[:40] - 1.25)).max() < 0.0006
    assert source.origin_s == -1.25  # where a player shows 0
    seconds = [(times[place] + times[place + 1]) / 2 for place in (2, 9, 25)]
    clips = [decode_clip(path, start_s=at, num_frames=1) for at in seconds]
    assert [read(clip.frames[0]) for clip in clips] == [2, 9, 25]
    assert [clip.frame_idx.tolist() for clip in clips] == [[2], [9], [25]]
    keys = decode_clip(path, sampling="keyframes", num_frames=40)
    assert (keys.complete, keys.note) == (True, "")
    assert [read(frame) for frame in keys.frames] == keys.frame_idx.tolist()
    assert keys.frame_idx[0] == 0


def test_blocks_of_any_bytes_have_times_or_none(tmp_path: Path, rng: np.random.Generator) -> None:
    """The reason why a file cannot be read would be an error of the code that looks into it."""
    options = {"avoid_negative_ts": "disabled"}
    track = Track(Recipe("libx264", 64, 64, 10, 5), range(40), np.arange(41) / 10 - 1)
    path = made(tmp_path / "cut", "matroska", [track], options=options).path
    good = path.read_bytes()
    assert list(times_below_zero(str(path)).values()) == list(range(-1000, 0, 100))
    for _ in range(200):
        data = bytearray(good)
        for at in rng.integers(0, len(data), 30):
            data[at] = int(rng.integers(256))
        path.write_bytes(data[: int(rng.integers(0, len(data) + 1))])
        assert all(-(2**15) <= time < 0 for time in times_below_zero(str(path)).values())
    assert times_below_zero(str(tmp_path / "gone")) == times_below_zero(str(tmp_path)) == {}


@pytest.mark.parametrize(
    ("first_s", "second_s"), [(5000, 200), (5000, 4930), (95300, 40), (95440, 90000), (500, 499)]
)
def test_joined_recordings_of_any_hours_are_one(tmp_path: Path, first_s: float, second_s: float) -> None:
    """A broadcast of an earlier hour was put a day after the one before it, and called damaged."""
    joined = tmp_path / "joined.ts"
    parts = (ts_from(joined, range(20), first_s), ts_from(joined, range(20, 40), second_s))
    joined.write_bytes(b"".join(parts))
    clip = decode_clip(joined, sampling="uniform", num_frames=4)
    assert (clip.complete, "starts anew 1 times" in clip.note) == (True, True)
    assert clip.frame_idx.tolist() == [5, 15, 25, 35]
    assert clip.duration_s == pytest.approx(4.0, abs=0.01)
    assert [read(frame) for frame in clip.frames] == [5, 15, 25, 35]


@pytest.mark.parametrize("sampling", ["released", "uniform", "keyframes"])
def test_joined_recordings_are_one(tmp_path: Path, sampling: Any) -> None:
    """Cameras and downloaders join segments with cat; the second part was lost or mixed with the first."""
    options = {"g": "10", "bf": "2"}
    parts = [write(tmp_path / f"{i}.ts", range(20 * i, 20 * i + 20), options=options) for i in (0, 1)]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    clip = decode_clip(joined, sampling=sampling, num_frames=4)
    assert clip.duration_s == pytest.approx(4.0, abs=0.05)
    assert numbers_of(clip) == [5, 15, 25, 35] if sampling == "uniform" else [0, 10, 20, 30]
    assert (clip.complete, "starts anew 1 times" in clip.note) == (True, True)
    assert np.all(np.diff(clip.time_s) > 0.5)
    inside = decode_clip(joined, start_s=2.5, end_s=3.5, sampling="uniform", num_frames=2)
    assert numbers_of(inside) == [27, 32]


def test_the_shared_joined_recording(shared: Path) -> None:
    """Six seconds of red and six of blue."""
    clip = decode_clip(shared / "data/faults/01/concat.ts")
    colours = np.array([frame.mean(axis=(0, 1)).argmax() for frame in clip.frames])
    assert colours.tolist() == [0] * 6 + [2] * 6
    assert clip.duration_s == pytest.approx(12.0)


def test_a_clock_that_wraps_starts_where_players_show_0(shared: Path) -> None:
    """After a day of recording the clock wraps: seconds 0 to 3 were 3.7 to 5.7."""
    path = shared / "data/faults/03/wrap.ts"
    clip = decode_clip(path, start_s=0, end_s=3)
    assert clip.frame_idx.tolist() == [0, 10, 20]
    assert clip.duration_s == pytest.approx(6.0, abs=0.01)
    assert decode_clip(path, start_s=4, end_s=6).frame_idx.tolist() == [40, 50]


def test_held_pictures_of_avi_are_no_damage(shared: Path) -> None:
    """FFmpeg writes empty chunks from any variable rate: whole files were called cut off."""
    for name in ("gap264.avi", "gapm4.avi"):
        clip = decode_clip(shared / "data/faults/02" / name)
        assert (clip.complete, clip.note, len(clip.frames)) == (True, "", 6)
        # One picture is held from second 2 to second 4.
        assert (clip.frames[2] == clip.frames[3]).all()
        assert len(set(clip.frame_idx.tolist())) == 4


def test_an_avi_that_is_cut_off_is_said_to_be(shared: Path, tmp_path: Path) -> None:
    """Held pictures must not excuse the end that is missing."""
    data = (shared / "data/faults/02/gapm4.avi").read_bytes()
    cut = tmp_path / "cut.avi"
    cut.write_bytes(data[: int(0.7 * len(data))])
    clip = decode_clip(cut)
    assert not clip.complete
    assert "cut off" in clip.note


def held_end(path: Path, codec: str, *, sound: bool) -> Path:
    """A second of pictures in AVI, of which the last is held for two seconds: it has 19 empty chunks."""
    times = np.array([*range(10), 29]) / 10
    tracks = [Track(Recipe(codec, 64, 64, 10, 5), range(10), times)]
    return made(path, "avi", [*tracks, Track(None, times_s=[0.0, 1.0])] if sound else tracks).path


@pytest.mark.parametrize("sound", [True, False])
@pytest.mark.parametrize("codec", ["mpeg4", "mjpeg", "libx264"])
def test_a_last_picture_of_avi_that_is_held_is_no_damage(tmp_path: Path, codec: str, sound: bool) -> None:
    """Slides end so: the whole film was called cut off, and was as short as if the end were not there."""
    path = held_end(tmp_path / "slides", codec, sound=sound)
    clip = decode_clip(path, sampling="uniform", num_frames=5)
    assert (clip.complete, clip.note) == (True, "")
    assert clip.duration_s == pytest.approx(2.9, abs=0.11)  # FFmpeg guesses H.264 a picture late
    assert clip.frame_idx.tolist() == [2, 8, 9, 9, 9]
    late = decode_clip(path, start_s=2, end_s=2.5)
    assert (late.complete, late.note, late.frame_idx.tolist()) == (True, "", [9])


@pytest.mark.parametrize("cut", ["the index", "three empty chunks", "the last picture", "a header within"])
def test_a_held_end_does_not_excuse_what_is_missing(tmp_path: Path, cut: str) -> None:
    """Downloads that broke off would pass for slides."""
    path = held_end(tmp_path / "slides", "mpeg4", sound=True)
    data = bytearray(path.read_bytes())
    index = data.rindex(b"idx1")
    last = max(chunk.start() for chunk in re.finditer(rb"00dc[^\0]", data[:index]))
    if cut == "a header within":
        data[last : last + 8] = bytes(8)
    path.write_bytes(
        data[: {"the index": index, "three empty chunks": index - 24, "the last picture": last}.get(cut)]
    )
    fault = probe(path).fault
    # Without its index all pictures are there, and as long as they were.
    assert ("cut off" in fault) == (cut != "the index")


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
@pytest.mark.parametrize("name", ["h264b.avi", "h264b_remux.mp4"])
def test_pictures_and_times_belong_together(shared: Path, name: str, decoder: Any) -> None:
    """Where presentation times are decoding times, pictures were up to three apart under one time."""
    clip = decode_clip(shared / "data/faults/21" / name, decoder=decoder)
    assert clip.frame_idx.tolist() == [0, 10, 20, 30, 40, 50]
    with av.open(str(shared / "data/faults/21" / name)) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for place, frame in zip(clip.frame_idx, clip.frames, strict=True):
        assert (shown[place] == frame).all()


def test_packets_times_that_run_backwards_are_seen_in_the_pictures(shared: Path) -> None:
    """XviD's packed pictures get times of another order, of which packets tell nothing: UCF101 is so."""
    path = shared / "data/videos/apply_eye_makeup.avi"
    assert probe(path).traits == set()
    clip = decode_clip(path)
    with av.open(str(path)) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert clip.frame_idx.tolist() == [0, 25, 50, 75, 100, 125, 150]
    for place, frame in zip(clip.frame_idx, clip.frames, strict=True):
        assert (shown[place] == frame).all()


def test_a_keyframe_is_taken_by_its_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another picture that shares its time was decoded alone, and stored in the keyframe's place."""
    path = write(
        tmp_path / "a.mkv", range(20), codec="mpeg4", options={"g": "10", "sc_threshold": "1000000000"}
    )
    shared_time = tmp_path / "b.mkv"
    with av.open(str(path)) as source, av.open(str(shared_time), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size == 0:
                continue
            step = round(1 / (10 * packet.time_base))
            packet.stream = stream
            if packet.pts is not None and round(packet.pts / step) == 9:
                packet.pts = packet.dts = packet.pts + step  # the time of the second keyframe
            target.mux(packet)
    monkeypatch.setattr(decode, "unfit_for_decord", lambda source: "as asked")
    assert "shared timestamps" in probe(shared_time).traits
    clip = decode_clip(shared_time, sampling="keyframes")
    assert numbers_of(clip) == [0, 10]


@pytest.fixture
def without_start(tmp_path: Path) -> Path:
    """A stream whose first 15 of 60 pictures refer to a keyframe that is not there."""
    return without_first(tmp_path, 5, gop=20)


@pytest.mark.parametrize("sampling", ["released", "uniform", "keyframes"])
def test_a_start_that_does_not_decode_is_said(without_start: Path, sampling: Any) -> None:
    """One and a half seconds were missing without a word, after three decodes of the whole file."""
    clip = decode_clip(without_start, sampling=sampling, num_frames=4)
    if sampling != "keyframes":
        assert not clip.complete
        assert "1.50 s do not decode" in clip.note
    expected = {"released": [20, 30, 40, 50], "uniform": [25, 35, 45, 55], "keyframes": [20, 40]}[sampling]
    assert numbers_of(clip) == expected
    # One meaning for all policies: the position among the pictures of the stream.
    assert clip.frame_idx.tolist() == [number - 5 for number in expected]


def test_a_start_that_does_not_decode_is_said_whatever_is_chosen(without_start: Path) -> None:
    """One frame from the middle says nothing of a start that is missing; a clip behind it lacks nothing."""
    clip = decode_clip(without_start, sampling="uniform", num_frames=1)
    assert (clip.complete, numbers_of(clip)) == (False, [40])
    assert "1.50 s do not decode" in clip.note
    behind = decode_clip(without_start, sampling="uniform", num_frames=1, start_s=2.5, end_s=3.5)
    assert (behind.complete, behind.note, numbers_of(behind)) == (True, "", [35])


def test_a_start_that_does_not_decode_costs_one_pass(
    without_start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []

    def counting(*arguments: Any, **options: Any) -> Any:
        passes.append(arguments)
        return from_start.decode_from_start(*arguments, **options)

    monkeypatch.setattr(decode, "decode_from_start", counting)
    decode_clip(without_start)
    assert len(passes) == 1


@pytest.mark.parametrize("damage", ["zeros", "noise"])
def test_damage_that_only_the_demuxer_tells_of(
    shared: Path, tmp_path: Path, rng: np.random.Generator, damage: str
) -> None:
    """A quarter of the packets was gone, and the clip was called whole."""
    data = bytearray((shared / "data/videos/crystal.webm").read_bytes())
    at, size = int(len(data) * rng.uniform(0.3, 0.6)), len(data) // 5
    data[at : at + size] = bytes(size) if damage == "zeros" else rng.bytes(size)
    path = tmp_path / "damaged.webm"
    path.write_bytes(data)
    clip = decode_clip(path)
    assert not clip.complete
    assert "container is damaged" in clip.note or "cut off" in clip.note


def two_tracks(path: Path, tracks: list[dict[str, Any]]) -> Path:
    """Tracks of one colour each, some marked as default."""
    with av.open(str(path), "w") as container:
        streams = []
        for track in tracks:
            stream = container.add_stream("libx264", rate=track.get("rate", 10), options={"bf": "0"})
            stream.width = stream.height = track.get("size", 64)
            stream.pix_fmt = "yuv420p"
            stream.disposition = av.stream.Disposition.default if track["default"] else 0
            streams.append(stream)
        for stream, track in zip(streams, tracks, strict=True):
            side, rate = track.get("size", 64), track.get("rate", 10)
            for number in range(2 * rate):
                picture = np.full((side, side, 3), track["grey"], np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, rate)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    "tracks",
    [
        [{"grey": 200, "default": False}, {"grey": 60, "default": True}],
        [{"grey": 60, "default": True}, {"grey": 200, "default": True, "size": 128}],
        [{"grey": 200, "default": True, "size": 32, "rate": 1}, {"grey": 60, "default": True, "size": 128}],
    ],
    ids=["the default one", "the first of two", "no thumbnails"],
)
def test_the_track_that_players_show(tmp_path: Path, tracks: list[dict[str, Any]]) -> None:
    """A track of thumbnails, or another language's, would be the video in training."""
    clip = decode_clip(two_tracks(tmp_path / "two.mkv", tracks))
    assert all(abs(float(frame.mean()) - 60) < 8 for frame in clip.frames)


def test_damage_is_told_of_each_file_and_of_no_other(shared: Path, tmp_path: Path) -> None:
    """One process decodes many files: what FFmpeg said of the last one was not said again, or of the next."""
    data = bytearray((shared / "data/videos/crystal.webm").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 50_000] = bytes(50_000)
    damaged = tmp_path / "damaged.webm"
    damaged.write_bytes(data)
    faults = [probe(damaged).fault for _ in range(3)]
    assert faults[0]
    assert faults == [faults[0]] * 3
    assert probe(shared / "data/videos/crystal.webm").fault == ""


@pytest.mark.parametrize("sound", [True, False])
def test_a_held_picture_of_a_stream_stays(tmp_path: Path, sound: bool) -> None:
    """Slides last longer than cameras pause; cut out of the clock, the film would lose its seconds.

    Without sound beside it nobody can tell it from a clock that was set anew, which is said.
    """
    path = tmp_path / "slides.ts"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"bf": "0", "g": "1"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        speaker = container.add_stream("mp2", rate=48000) if sound else None
        shown = dict(zip([0, 1, 2, 3, 4, 150, 151, 152], range(8), strict=True))
        for tick in range(153):
            if speaker is not None:
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.int16), "s16", "mono")
                silence.sample_rate, silence.pts, silence.time_base = 48000, 4800 * tick, Fraction(1, 48000)
                container.mux(speaker.encode(silence))
            if tick in shown:
                grey = np.full((64, 64, 3), 40 + STEP * shown[tick], np.uint8)
                frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
                frame.pts, frame.time_base = tick, Fraction(1, 10)
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if speaker is not None:
            container.mux(speaker.encode(None))
    clip = decode_clip(path, start_s=5, end_s=10, sampling="uniform", num_frames=2)
    assert set(numbers_of(clip)) == {4}
    assert clip.complete == sound
    assert ("jumps 14.6 s ahead" in clip.note) != sound
    assert clip.duration_s == pytest.approx(15.3, abs=0.1)


def test_decoding_order_after_a_start_that_does_not_decode(tmp_path: Path) -> None:
    """Pictures are counted to get their times; those that never came must be counted too."""
    cut = without_first(tmp_path, 5, gop=30)
    source_facts = probe(cut)
    as_if = dataclasses.replace(source_facts, traits=source_facts.traits | {DECODING_ORDER})
    wanted = {int(source_facts.pts[40])}
    times = dict(enumerate(source_facts.pts.tolist()))
    found = from_start.decode_from_start(as_if, wanted, np.asarray, times=times, by_packets=True)
    assert found.first == int(source_facts.pts[25])
    assert round((float(found.kept[wanted.pop()].mean()) - 40) / STEP) == 45


def test_lost_fragments_are_damage(tmp_path: Path) -> None:
    """A live recording with a hole was called whole, and showed one picture through it."""
    path = tmp_path / "fragments.mp4"
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=10, options={"bf": "0", "g": "10", "sc_threshold": "0"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(60):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 40 + STEP * number, np.uint8), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    whole = decode_clip(path)
    assert (whole.complete, whole.note) == (True, "")
    data = path.read_bytes()
    starts = [match.start() - 4 for match in re.finditer(b"moof", data)]
    path.write_bytes(data[: starts[2]] + data[starts[4] :])
    clip = decode_clip(path)
    assert not clip.complete
    assert "2.00 s are missing" in clip.note
